import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from localdit import LocalDiTPipeline
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[1]
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with six captioned pictures, a pipeline to take encoders from, and a shape."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "pictures").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (40, 32), colour).save(folder / f"pictures/{colour}.png")
        (folder / f"pictures/{colour}.txt").write_text(f"a {colour} picture")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "pipeline")
    shape = dict(pipeline.transformer.config) | {"sample_size": 4}
    (folder / "shape.json").write_text(json.dumps(shape))
    return folder


def options(workplace, output, *more):
    return [
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        "--transformer-config", f"{workplace}/shape.json", "--output", str(output),
        "--image-size", "32", "--batch-size", "4", "--num-workers", "0", "--log-interval", "1",
        "--max-train-steps", "3", "--learning-rate", "1e-3", "--gradient-clip", "1", *more,
    ]  # fmt: skip


@pytest.fixture
def train(main, workplace, tmp_path, monkeypatch):
    """Runs `train.py` with options added to the common ones; returns its run folder."""

    def run(name, *more):
        argv = ["train.py", *options(workplace, tmp_path / name, *more)]
        monkeypatch.setattr(sys, "argv", argv)
        main()
        return tmp_path / name

    return run


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run, part="final"):
    return load_file(run / part / "transformer/diffusion_pytorch_model.safetensors")


def test_a_run_leaves_a_pipeline_that_makes_pictures(train):
    run = train(
        "run", "--prediction-type", "v_prediction", "--save-interval", "2", "--lr-schedule",
        "cosine", "--validation-prompts", "a red picture", "--validation-interval", "3",
    )  # fmt: skip
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert metrics(run)[-1]["learning_rate"] == 0
    assert json.loads((run / "config.json").read_text())["batch_size"] == 4
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-2", "config.json", "final", "metrics.jsonl", "validation",
    ]  # fmt: skip
    assert Image.open(run / "validation/00000003.png").size == (32, 32)

    pipeline = LocalDiTPipeline.from_pretrained(run / "final")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.beta_end == 0.02
    (image,) = pipeline("a red picture", num_inference_steps=2).images
    assert image.size == (32, 32)
    early, late = weights(run, "checkpoint-2"), weights(run)
    assert early.keys() == late.keys()
    assert any(not torch.equal(early[name], late[name]) for name in early)


def test_the_same_seed_gives_the_same_run(train):
    first, second = train("first", "--seed", "5"), train("second", "--seed", "5")
    other = train("other", "--seed", "6")
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in metrics(run)] for run in (first, second, other)]
        assert values[0] == values[1] != values[2]
    a, b = weights(first), weights(second)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_cache_changes_nothing(train):
    direct, cached = train("direct"), train("cached", "--cache-latents")
    for a, b in zip(metrics(direct), metrics(cached), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_training_fits_what_it_sees(train):
    run = train(
        "run", "--cache-latents", "--max-train-steps", "60", "--learning-rate", "5e-3",
        "--prediction-type", "v_prediction", "--batch-size", "6",
    )  # fmt: skip
    losses = [line["loss"] for line in metrics(run)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_accumulated_batches_make_one_step(train):
    run = train("run", "--gradient-accumulation-steps", "2", "--batch-size", "3")
    assert len(metrics(run)) == 3


def test_training_goes_on_from_a_checkpoint(train):
    first = train("first")
    folder = first / "final/transformer"
    second = train("second", "--transformer", str(folder), "--learning-rate", "1e-12")
    a, b = weights(first), weights(second)
    assert all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(train, tmp_path):
    with pytest.raises(FloatingPointError, match="Step"):
        train("run", "--learning-rate", "1e30", "--max-train-steps", "20", "--gradient-clip", "1e9")
    assert not (tmp_path / "run/final").exists()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--data-root", "nowhere"], FileNotFoundError, "--data-root nowhere is no folder"),
        (["--transformer-config", "huge"], ValueError, "--transformer-config huge is neither"),
        (["--transformer-config", "released"], ValueError, "takes captions of 4096 channels"),
        (["--output", str(ROOT / "tests")], FileExistsError, "is not empty"),
    ],
)
def test_what_cannot_work_is_refused(train, more, error, message, monkeypatch):
    # The released shape would take gigabytes to refuse.
    monkeypatch.setattr("localdit.models.presets.PRESETS", {"released": {"num_layers": 1}})
    with pytest.raises(error, match=message):
        train("run", *more)


def test_an_unreadable_picture_is_named(train, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/bad.png").write_bytes(b"nothing")
    (tmp_path / "data/bad.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"bad\.png"):
        train("run", "--data-root", str(tmp_path / "data"))


def test_help_answers_at_once():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--data-root" in result.stdout
    assert "torch" not in result.stderr


@pytest.mark.slow
def test_two_processes_see_what_one_sees(train, workplace, tmp_path):
    alone = train("alone", "--batch-size", "4", "--token-dropout", "0")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "train.py", *options(workplace, tmp_path / "both", "--batch-size", "2"),
        "--token-dropout", "0", "--cache-latents",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    printed = subprocess.run(
        command, cwd=ROOT, check=True, env=environment, capture_output=True, text=True
    )
    assert "2 processes on cpu; 2 x 2 x 1 pictures to a step" in printed.stdout
    both = tmp_path / "both"
    assert [line["step"] for line in metrics(both)] == [1, 2, 3]
    # The first loss is the mean square of the noise, whoever draws it; each rank draws its own.
    assert metrics(both)[0]["loss"] == pytest.approx(metrics(alone)[0]["loss"], rel=0.2)
    assert metrics(both)[0]["loss"] != metrics(alone)[0]["loss"]
    assert LocalDiTPipeline.from_pretrained(both / "final").transformer is not None
