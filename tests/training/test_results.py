"""Tests of adapters that `train.py` trains."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from localdit import LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.cli import main as command_line
from localdit.core.diffusion import Objective
from localdit.training.methods.fine_tuning import FineTuning
from localdit.training.options import parse_args
from localdit.training.results import add_adapters
from localdit.training.setup import make_state
from tests.tiny import tiny_components
from tests.training.test_processes import first_gradient
from tests.training.test_sharding import FSDP2, needs_fsdp2
from tests.training.workplace import (
    ROOT,
    command,
    environment,
    lines,
    load_main,
    make_workplace,
    options,
    weights,
)

pytest.importorskip("peft")
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))


def lora(workplace, *more, rank=2):
    return ["--transformer", f"{workplace}/pipeline/transformer", "--lora-rank", str(rank), *more]


@pytest.fixture
def train(workplace, tmp_path, monkeypatch):
    """Trains adapters with additional options, and returns the run folder."""
    main = load_main()

    def run(name, *more, expect=0, adapters=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        adapters = lora(workplace) if adapters is None else adapters
        argv = ["train.py", *options(workplace, tmp_path / name, *adapters, *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == expect
        return tmp_path / name

    return run


def test_the_adapters_of_a_run_draw_its_validation_pictures(train, workplace):
    run = train(
        "run", "--lora-alpha", "6", "--save-interval", "2", "--validation-prompts", "a cat",
        "--validation-interval", "4", "--validation-guidance-scale", "1", "--learning-rate", "0.1",
    )  # fmt: skip
    pipe = LocalDiTPipeline.from_pretrained(workplace / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        (image,) = pipe(
            "a cat", height=96, width=96, guidance_scale=1.0, generator=generator
        ).images
        return np.asarray(image).astype(int)

    bare = draw()
    drawn = np.asarray(Image.open(run / "validation/00000004.png")).astype(int)
    assert np.abs(drawn - bare).max() > 8
    for name in ("checkpoint-4", "final"):
        pipe.load_lora_weights(run / name)
        assert np.abs(draw() - drawn).max() <= 1
        settings = pipe.transformer.peft_config["default_0"]
        assert (settings.r, settings.lora_alpha) == (2, 6)
        pipe.unload_lora_weights()


def test_checkpoints_hold_adapters_and_nothing_of_the_base(train, workplace, capsys):
    run = train("run", "--save-interval", "2")
    assert (
        "Adapters of rank 2 on 16 layers: 2,304 parameters are trained" in capsys.readouterr().out
    )
    names = sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())
    kept = [name for name in names if name.startswith("checkpoint-4/")]
    assert kept == [
        f"checkpoint-4/{name}"
        for name in ("base.json", "manifest.json", NAME, "training/model.safetensors",
                     "training/optimizer.safetensors", "training/random.safetensors",
                     "training/state.json")
    ]  # fmt: skip
    tensors = weights(run / "checkpoint-4")
    adapted = {name for file, name in tensors if "random" not in file}
    assert all(".lora_" in name for name in adapted)
    transformer = LocalDiTTransformer2DModel.from_pretrained(workplace / "pipeline/transformer")
    layers = {name.split(".lora_")[0].removeprefix("transformer.") for name in adapted}
    assert layers == {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.")
    }
    base = json.loads((run / "final/base.json").read_text())
    assert base["transformer"] == f"{workplace}/pipeline/transformer"
    assert len(base["sha256"]) == 64


def test_a_run_says_whether_its_weights_are_new(train, workplace, capsys):
    transformer = f"{workplace}/pipeline/transformer"
    loaded = LocalDiTTransformer2DModel.from_pretrained(transformer)
    count = sum(parameter.numel() for parameter in loaded.parameters())
    train("loaded", "--max-train-steps", "1", adapters=["--transformer", transformer])
    assert f"{count:,} parameters are trained, from {transformer}" in capsys.readouterr().out
    train("new", "--max-train-steps", "1", adapters=[])
    assert " parameters are trained, all new" in capsys.readouterr().out


def test_adapters_begin_without_effect(workplace):
    transformer = tiny_components()["transformer"]
    given = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16), torch.tensor([500])
    conditions = {"resolution": torch.full((1, 2), 64.0), "aspect_ratio": torch.ones(1, 1)}
    bare = transformer(*given, conditions).sample
    names = [name for name, _ in transformer.named_parameters()]
    add_adapters(transformer, parse_args(["--data-root", "x", *lora(workplace)]))
    assert torch.equal(transformer(*given, conditions).sample, bare)
    trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
    assert trained and not trained & set(names)


def test_adapters_learn(train):
    run = train(
        "run", "--validation-samples", "3", "--validation-interval", "5", "--learning-rate", "1e-2",
        "--max-train-steps", "10",
    )  # fmt: skip
    first, second = (line for line in lines(run) if "validation/ema/loss" in line)
    for name in ("validation/model/loss", "validation/ema/loss"):
        assert second[name] < first[name]
    tensors = load_file(run / "checkpoint-10/training/model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())


def test_gradient_checkpointing_trains_the_same(train):
    plain, recomputed = train("plain"), train("recomputed", "--gradient-checkpointing")
    for a, b in zip(lines(plain), lines(recomputed), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_run_with_stages_adapts_at_every_size(train, tmp_path):
    stages = [{"image-size": 96, "max-train-steps": 2}, {"image-size": 64, "max-train-steps": 2}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    run = train("run", "--stages", tmp_path / "stages.json")
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("more", "adapters", "message"),
    [
        (["--lora-rank", "4"], None, "is of a run with --lora-rank 2, not with --lora-rank 4"),
        (["--lora-alpha", "4"], None, "with --lora-alpha 2, not with --lora-alpha 4.0"),
        (["--lora-target-modules", "to_qkv"], None, "without --lora-target-modules, not with"),
        ([], [], "with --lora-rank 2, not without --lora-rank. Resume it with --lora-rank 2, or "
                 "start a new run in another --output"),
    ],
)  # fmt: skip
def test_a_run_with_other_adapters_is_not_resumed(
    train, workplace, more, adapters, message, capsys
):
    train("run", "--max-train-steps", "1")
    train("run", "--resume", "auto", *more, adapters=adapters, expect=1)
    assert message in capsys.readouterr().err


def test_a_full_run_is_not_resumed_with_adapters(train, capsys):
    train("run", "--max-train-steps", "1", adapters=[])
    train("run", "--resume", "auto", expect=1)
    assert "of a run without --lora-rank, not with --lora-rank 2" in capsys.readouterr().err


def test_another_base_is_refused_in_any_folder(train, workplace, tmp_path, capsys):
    run = train("run", "--max-train-steps", "1")
    base = LocalDiTTransformer2DModel.from_pretrained(workplace / "pipeline/transformer")
    base.save_pretrained(tmp_path / "moved")
    train("run", "--resume", "auto", "--transformer", tmp_path / "moved", "--max-train-steps", "2")
    assert len(lines(run)) == 2
    base.proj_out.bias.data[0] += 1e-3
    base.save_pretrained(tmp_path / "other")
    train("run", "--resume", "auto", "--transformer", tmp_path / "other", expect=1)
    error = capsys.readouterr().err
    assert f"adapters of {tmp_path}/moved, whose weights are not those of --transformer" in error


def test_a_lora_in_the_place_of_a_model_is_told_with_its_model(train, workplace, tmp_path, capsys):
    lora = train("run", "--max-train-steps", "1") / "final"
    model = workplace / "pipeline/transformer"
    note = f"It holds a LoRA: name the model that the LoRA changes, {model}. To generate with both"
    for more in (
        ["--transformer", lora],
        ["--transformer", model, "--method", "knowledge-distillation", "--teacher", lora],
    ):
        train("no", *more, expect=1, adapters=[])
        assert note in capsys.readouterr().err
    assert command_line(["convert", str(lora), str(tmp_path / "a.safetensors")]) == 2
    assert note in capsys.readouterr().err
    assert command_line(["generate", "a", "--model", str(lora)]) == 2
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-target-modules", "to_query"], "--lora-target-modules to_query is not the end of"),
        (["--lora-target-modules", "attn2"], "those of this transformer are adaln_single.emb"),
        (["--prediction-type", "flow"], "comes with a scheduler for epsilon: give --prediction"),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused_in_a_line(train, more, message, capsys):
    train("run", *more, expect=1)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_pixart_can_not_have_adapters(train, tmp_path, capsys):
    (tmp_path / "pixart").mkdir()
    save_file({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)},
              tmp_path / "pixart/diffusion_pytorch_model.safetensors")  # fmt: skip
    train("run", "--transformer", tmp_path / "pixart", expect=1)
    assert "is a PixArt, whose weights must all be trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-rank", "0"], "--lora-rank is 0; expected more than 0"),
        (["--lora-rank", "4"], "--lora-rank adapts existing weights: name them with --trans"),
        (["--lora-alpha", "4"], "--lora-alpha is for adapters: also give --lora-rank"),
        (["--lora-rank", "4", "--lora-alpha", "-1"], "--lora-alpha is -1.0; expected more than 0"),
        (["--lora-rank", "4", "--lora-dropout", "2"], "--lora-dropout is 2.0; expected at least 0"),
    ],
)
def test_wrong_options_end_the_program(capsys, more, message):
    with pytest.raises(SystemExit):
        parse_args(["--data-root", "x", *more])
    assert message in capsys.readouterr().err


def test_missing_peft_is_named(capsys, monkeypatch, workplace):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        parse_args(["--data-root", "x", *lora(workplace)])
    assert "--lora-rank needs peft: pip install -r requirements-train" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [{}, pytest.param(FSDP2, marks=needs_fsdp2)], ids=["DDP", "FSDP2"]
)
def test_two_processes_train_the_same_adapters(workplace, tmp_path, engine):
    def run(name, processes, **engine):
        more = lora(workplace, "--batch-size", str(4 // processes), "--save-interval", "1")
        more += ["--keep-checkpoints", "100", "--validation-samples", "2", "--validation-interval",
                 "4", "--validation-prompts", "a cat", "a dog"]  # fmt: skip
        result = subprocess.run(
            command(workplace, tmp_path / name, *more, processes=processes),
            cwd=ROOT, env=environment() | engine, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return tmp_path / name

    alone, two = run("alone", 1), run("two", 2, **engine)
    expected, gradient = first_gradient(alone), first_gradient(two)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5
    one, other = (load_file(path / "final" / NAME) for path in (alone, two))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


def test_deepspeed_is_refused(workplace):
    args = parse_args(["--data-root", "x", *lora(workplace)])
    accelerator = SimpleNamespace(distributed_type="DEEPSPEED", mixed_precision="no")
    transformer = tiny_components()["transformer"]
    with pytest.raises(ValueError, match="--lora-rank is not supported with DeepSpeed"):
        make_state(args, FineTuning(transformer, Objective(), adapters=True), accelerator)
