import json
import os
import re
import shutil
import signal
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from localdit import LocalDiTPipeline
from localdit.training.checkpointing import Manifest, read_manifest
from localdit.training.data.encoded import read_encoded_manifest
from localdit.training.methods import fine_tuning
from tests.tiny import tiny_pipeline, tiny_text_encoder
from tests.training.workplace import ROOT, lines, load_main, make_workplace, options, weights

BOX = ROOT / "localdit/box"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def main():
    return load_main()


@pytest.fixture
def train(main, workplace, tmp_path, monkeypatch):
    """Runs `train.py` with additional options, and returns its run folder."""

    def run(name, *more, expect=0):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = ["train.py", *options(workplace, tmp_path / name, *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == expect
        return tmp_path / name

    return run


def rewrite_options(checkpoint, **changes):
    """Change the options in a checkpoint, or leave out those that become `...`."""
    path = checkpoint / "training/state.json"
    state = json.loads(path.read_text())
    options = state["options"] | changes
    state["options"] = {name: value for name, value in options.items() if value is not ...}
    path.write_text(json.dumps(state))
    step, sums = read_manifest(checkpoint)
    sums["training/state.json"] = sha256(path.read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_bytes(Manifest(step, sums).text().encode())


def test_a_run_writes_pipelines_that_draw_pictures(train):
    run = train(
        "run", "--prediction-type", "v_prediction", "--save-interval", "2", "--lr-schedule",
        "cosine", "--validation-prompts", "a red picture", "a cat", "--validation-interval", "2",
        "--max-train-steps", "6",
    )  # fmt: skip
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert lines(run)[0]["learning_rate"] == 1e-3
    assert 0 < lines(run)[-1]["learning_rate"] < 1e-4
    assert json.loads((run / "config.json").read_text())["batch_size"] == 2
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoint-4", "checkpoint-6", "config.json", "curves.png", "final",
        "metrics.jsonl", "samples-0.jsonl", "validation",
    ]  # fmt: skip
    assert Image.open(run / "validation/00000004.png").size == (192, 96)
    for name in ("checkpoint-4", "checkpoint-6", "final"):
        pipeline = LocalDiTPipeline.from_pretrained(run / name)
        assert pipeline.scheduler.config.prediction_type == "v_prediction"
        assert pipeline.scheduler.config.beta_end == 0.02
        (image,) = pipeline("a red picture", num_inference_steps=2).images
        assert image.size == (96, 96)
    early, late, final = (weights(run / name / "transformer") for name in
                          ("checkpoint-4", "checkpoint-6", "final"))  # fmt: skip
    assert any(not torch.equal(early[name], late[name]) for name in early)
    assert all(torch.equal(late[name], final[name]) for name in late)


def test_validation_pictures_come_from_fixed_noise(train):
    run = train(
        "run", "--learning-rate", "1e-12", "--validation-prompts", "a cat", "--validation-interval",
        "1", "--max-train-steps", "2",
    )  # fmt: skip
    first, second = (Image.open(run / f"validation/0000000{step}.png") for step in (1, 2))
    assert first.tobytes() == second.tobytes()


def test_validation_losses_are_measured_on_held_out_samples(train):
    run = train("run", "--validation-samples", "3", "--validation-interval", "4")
    (line,) = [line for line in lines(run) if "validation/ema/loss" in line]
    assert line["step"] == 4
    assert {"validation/model/loss", "validation/ema/0.00-0.25"} <= line.keys()
    seen = {name for line in lines(run, "samples-0.jsonl") for name in line["samples"] if name}
    assert len(seen) == 5


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", [[], ["--method", "distil", "--teacher-guidance-scale", "3"]])
def test_validation_compares_model_and_average_in_one_precision(
    train, workplace, precision, method
):
    if method:
        method = [*method, "--teacher", workplace / "pipeline/transformer"]
    run = train(
        "run", *method, "--validation-samples", "3", "--validation-interval", "2",
        "--ema-decay", "0", "--mixed-precision", precision, "--max-train-steps", "2",
    )  # fmt: skip
    (line,) = [line for line in lines(run) if "validation/ema/loss" in line]
    assert line["validation/ema/loss"] == line["validation/model/loss"]


def test_the_same_seed_gives_the_same_run(train):
    first, second = train("first", "--seed", "5"), train("second", "--seed", "5")
    other = train("other", "--seed", "6")
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in lines(run)] for run in (first, second, other)]
        assert values[0] == values[1] != values[2]
    a, b = weights(first / "final"), weights(second / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_epoch_visits_each_sample_once(train):
    run = train("run", "--max-train-steps", "10", "--batch-size", "3")
    seen = [line["samples"] for line in lines(run, "samples-0.jsonl")]
    epochs = [
        sorted(name for batch in seen[start : start + 3] for name in batch if name)
        for start in (0, 3, 6)
    ]
    assert all(len(epoch) == len(set(epoch)) == 8 for epoch in epochs)


def test_accumulation_equals_the_step_of_a_larger_batch(train):
    large = train("large", "--batch-size", "4")
    small = train("small", "--batch-size", "1", "--gradient-accumulation-steps", "4")
    assert len(lines(small)) == 4
    for a, b in zip(lines(large), lines(small), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_stages_may_change_the_accumulation(train, tmp_path):
    """Check that each step is taken, and is that of a larger batch."""
    runs = []
    for name in ("gradient-accumulation-steps", "batch-size"):
        one = {"batch-size": 1, "max-train-steps": 2}
        stages = [one | {name: 1}, one | {name: 3}, one | {name: 2}]
        (tmp_path / "stages.json").write_text(json.dumps(stages))
        runs.append(train(name, "--stages", tmp_path / "stages.json", "--crop", "center"))
    for a, b in zip(*map(lines, runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


def test_encoded_data_trains_like_the_pictures(train, workplace, tmp_path, monkeypatch, capsys):
    from localdit.training import setup
    from localdit.training.encode.__main__ import main as encode

    AcceleratorState._reset_state(reset_partial_state=True)
    encode([
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        "--output", f"{tmp_path}/encoded", "--image-size", "96", "--window-size", "2",
        "--samples-per-shard", "3", "--num-workers", "0", "--crop", "center",
    ])  # fmt: skip
    direct = train("direct", "--crop", "center")

    def forbidden(*args):
        raise AssertionError("encoders are not needed")

    with monkeypatch.context() as patch:
        patch.setattr(setup, "load_encoders", forbidden)
        ahead = train("ahead", "--data-root", tmp_path / "encoded")
    for a, b in zip(lines(direct), lines(ahead), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # text in bfloat16
    assert (
        lines(direct, "samples-0.jsonl")[0]["samples"]
        == (lines(ahead, "samples-0.jsonl")[0]["samples"])
    )
    LocalDiTPipeline.from_pretrained(ahead / "final")

    train("pictures", "--data-root", tmp_path / "encoded", "--validation-prompts", "a cat")
    shutil.copytree(tmp_path / "encoded", tmp_path / "rescaled")
    manifest = tmp_path / "rescaled/encoded.json"
    values = json.loads(manifest.read_text()) | {"scaling_factor": 0.5}
    manifest.write_text(json.dumps(values))
    digest = read_encoded_manifest(tmp_path / "rescaled").digest()
    for index in (tmp_path / "rescaled").glob("shard-*.json"):
        index.write_text(
            json.dumps(json.loads(index.read_text()) | {"set": digest, "sha256": None})
        )
    stages = [{}, {"data-root": f"{tmp_path}/rescaled"}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    other = tiny_pipeline(seed=1)
    other.save_pretrained(tmp_path / "other")
    tiny_text_encoder("flan-t5").save_pretrained(tmp_path / "wide")
    vae = LocalDiTPipeline.from_pretrained(f"{workplace}/pipeline").vae
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "scaled")
    for more, message in [
        (["--image-size", "64"], "was encoded for 96 pixels, but --image-size is 64"),
        (["--max-caption-length", "9"], "captions cut at 120 tokens"),
        (["--crop", "buckets"], "was encoded with --crop center, but --crop is buckets"),
        (
            ["--validation-prompts", "a", "--pretrained", tmp_path / "other"],
            "differ in text_encoder",
        ),
        # The result would have an autoencoder or a text encoder of other latents or states.
        (["--vae", tmp_path / "other"], "differ in vae"),
        (["--vae", tmp_path / "scaled"], "its VAE has scaling_factor 0.5"),
        (["--stages", tmp_path / "stages.json"], "rescaled was encoded with scaling_factor 0.5"),
        (
            ["--text-encoder", tmp_path / "wide", "--tokenizer", f"{workplace}/pipeline"],
            f"{tmp_path / 'encoded'} has text states of 16 channels, but the text encoder "
            f"{tmp_path / 'wide'} has 40",
        ),
    ]:
        train("no", "--data-root", tmp_path / "encoded", *more, expect=1)
        assert message in capsys.readouterr().err
        shutil.rmtree(tmp_path / "no", ignore_errors=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_training_fits_its_data(train, prediction):
    run = train(
        "run", "--max-train-steps", "40", "--learning-rate", "1e-2", "--prediction-type",
        prediction, "--batch-size", "6", "--token-dropout", "0",
    )  # fmt: skip
    losses = [line["loss"] for line in lines(run)]
    assert sum(losses[-8:]) < 0.85 * sum(losses[:8])


@pytest.mark.parametrize(
    "more",
    [
        ["--gradient-checkpointing"],
        ["--mixed-precision", "bf16"],
        ["--ema-on-cpu"],
        ["--num-workers", "2"],
        ["--crop", "center", "--horizontal-flip", "0.5"],
        ["--timestep-sampling", "logit_normal", "--min-snr-gamma", "5"],
        ["--data-format", "folder", "--max-upscale", "1"],
        ["--contrastive-weight", "0.1", "--alignment-weight", "0.5", "--token-routing", "0.5",
         "--routing-blocks", "2", "2", "--mixed-precision", "bf16", "--gradient-checkpointing"],
    ],
)  # fmt: skip
def test_options_that_suit_any_run(train, more):
    assert [line["step"] for line in lines(train("run", *more))] == [1, 2, 3, 4]


def test_recomputed_activations_change_nothing(train):
    plain, checkpointed = train("plain"), train("checkpointed", "--gradient-checkpointing")
    assert [a["loss"] for a in lines(plain)] == [b["loss"] for b in lines(checkpointed)]


def test_training_starts_from_weights(train):
    first = train("first")
    folder = first / "final/transformer"
    second = train("second", "--transformer", folder, "--learning-rate", "1e-12")
    a, b = weights(first / "final"), weights(second / "final")
    assert all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


def test_the_folder_of_a_pipeline_names_its_transformer(train, workplace):
    once, pipeline = ["--max-train-steps", "1"], workplace / "pipeline"
    for start in (["--transformer"], ["--method", "distil", "--teacher"]):
        part = train("part" + start[-1], *once, *start, pipeline / "transformer")
        whole = train("whole" + start[-1], *once, *start, pipeline)
        expected, found = weights(part / "final"), weights(whole / "final")
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_stages_change_the_size(train, tmp_path):
    stages = [{"image-size": 64, "max-train-steps": 3}, {"image-size": 96, "max-train-steps": 2}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    run = train("run", "--stages", tmp_path / "stages.json", "--save-interval", "3")
    sizes = [
        json.loads((run / f"checkpoint-{step}/transformer/config.json").read_text())["sample_size"]
        for step in (3, 5)
    ]
    assert sizes == [8, 12]


def test_stages_of_other_lengths_begin_an_epoch_of_their_own_order(train, tmp_path, capsys):
    """Check that a position in the order of one stage is not applied to that of another."""
    stages, once = tmp_path / "stages.json", ["--batch-size", "1", "--max-train-steps", "14"]

    def lengths(*steps):
        stages.write_text(json.dumps([{"max-train-steps": count} for count in steps]))
        return [*once, "--stages", stages]

    run = train("run", *lengths(5))
    train("run", *lengths(3, 11), "--resume", "auto")
    assert "This step is in another stage now" in capsys.readouterr().out
    seen = [line["samples"][0] for line in lines(run, "samples-0.jsonl")]
    assert len(seen) == 14 and len(set(seen[5:13])) == 8
    # The boundary of a stage needs no such epoch, nor does a longer stage.
    run = train("longer", *lengths(5))
    train("longer", *lengths(8, 6), "--resume", "auto")
    assert "another stage" not in capsys.readouterr().out
    seen = [line["samples"][0] for line in lines(run, "samples-0.jsonl")]
    assert len(set(seen[:8])) == 8
    # A stage that now begins where it was goes on in its epoch.
    run = train("same", *lengths(3, 2))
    train("same", *lengths(5, 9), "--resume", "auto")
    seen = [line["samples"][0] for line in lines(run, "samples-0.jsonl")]
    assert len(set(seen[3:11])) == 8


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(train, capsys):
    run = train(
        "run", "--learning-rate", "1e30", "--max-train-steps", "20", "--gradient-clip", "1e9",
        "--max-skipped-steps", "2", "--save-interval", "1", expect=1,
    )  # fmt: skip
    captured = capsys.readouterr()
    assert captured.out.count("The step is skipped.") == 2
    assert "is not finite" in captured.err
    assert "2 steps were skipped for this reason before" in captured.err
    for folder in run.glob("checkpoint-*"):
        assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    assert not (run / "final").exists()


@pytest.fixture
def not_finite_in(monkeypatch):
    """Make the loss of some steps NaN."""
    sound, calls = fine_tuning.denoising_errors, []

    def make(steps):
        def errors(prediction, target):
            calls.append(1)
            return sound(prediction, target) * (float("nan") if len(calls) in steps else 1.0)

        calls.clear()
        monkeypatch.setattr(fine_tuning, "denoising_errors", errors)

    return make


@pytest.mark.parametrize(
    ("steps", "interval", "kept", "status"),
    [
        (range(4, 99), 1, ["2", "3"], 1),  # diverged
        ([2], 2, ["3", "4"], 0),  # a sample is bad: the checkpoint waits for the next step
        ([5], 1, ["3", "4", "5"], 0),  # the last step is saved, and displaces no other
    ],
)
def test_checkpoints_of_skipped_steps_displace_no_others(
    steps, interval, kept, status, train, not_finite_in, capsys
):
    not_finite_in(steps)
    last = 4 if interval == 2 else 5 if status == 0 else 20
    run = train("run", "--save-interval", interval, "--max-train-steps", last, expect=status)
    assert sorted(run.glob("checkpoint-*")) == [run / f"checkpoint-{step}" for step in kept]
    if status:
        not_finite_in([])
        train("run", "--resume", "auto", "--learning-rate", "1e-4", "--max-train-steps", "6")
        assert "checkpoint-3, after step 3." in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(train, capsys):
    train("run", "--max-train-steps", "2", "--save-interval", "1")
    more = ["--resume", "auto", "--weight-decay", "1e308", "--max-train-steps", "3"]
    run = train("run", *more, expect=1)
    assert "The weights after step 3 are not finite" in capsys.readouterr().err
    train("new", "--weight-decay", "1e308", "--max-train-steps", "1", expect=1)
    folders = [*run.parent.glob("new/*/"), *run.glob("checkpoint-*")]
    assert sorted(folders) == [run / "checkpoint-1", run / "checkpoint-2"]


def test_broken_pictures_are_skipped_and_listed(train, workplace, tmp_path):
    shutil.copytree(workplace / "pictures", tmp_path / "data")
    whole = (tmp_path / "data/red.png").read_bytes()
    middle = len(whole) // 2
    broken = whole[:middle] + b"\xff" * 8 + whole[middle + 8 :]  # only decoding shows it
    (tmp_path / "data/red.png").write_bytes(broken)
    more = ["--data-root", tmp_path / "data", "--max-train-steps", "4", "--max-broken", "0.2"]
    run = train("run", *more)
    seen = [name for line in lines(run, "samples-0.jsonl") for name in line["samples"] if name]
    assert len(set(seen)) == len(seen) == 7
    (fault,) = lines(run, "broken.jsonl")
    assert (fault["kind"], fault["id"]) == ("damaged", "red.png")
    train("strict", *more, "--max-broken", "0.1", expect=1)


def test_steps_with_nothing_but_broken_pictures_are_not_those_that_are_not_finite(
    train, workplace, tmp_path, capsys
):
    shutil.copytree(workplace / "pictures", tmp_path / "data")
    for file in (tmp_path / "data").glob("*.png"):
        data = file.read_bytes()
        place = data.index(b"IDAT") + 8  # only decoding shows it
        file.write_bytes(data[:place] + b"\xff" * 8 + data[place + 8 :])
    options = ["--data-root", tmp_path / "data", "--max-broken", "1", "--max-skipped-steps", "0"]
    run = train("run", *options, "--save-interval", "2", "--keep-checkpoints", "2")
    said = capsys.readouterr().out
    assert said.count("all of its samples are broken, so nothing is learned.") == 4
    assert "not finite" not in said
    assert sorted(run.glob("checkpoint-*")) == [run / "checkpoint-2", run / "checkpoint-4"]
    state = json.loads((run / "checkpoint-4/training/state.json").read_text())
    assert state["progress"]["skipped"] == 0
    for line in lines(run):
        assert not {"loss", "skipped_steps"} & line.keys()
    assert {line["loss"] for line in lines(run, "samples-0.jsonl")} == {None}


def test_broken_held_out_pictures_are_listed_once(train, workplace, tmp_path, capsys):
    validated = ["--data-root", tmp_path / "data", "--validation-samples", "2",
                 "--validation-interval", "2"]  # fmt: skip
    shutil.copytree(workplace / "pictures", tmp_path / "data")
    run = train("whole", *validated)
    trained = {name for line in lines(run, "samples-0.jsonl") for name in line["samples"]}
    held_out = sorted({file.name for file in (tmp_path / "data").glob("*.png")} - trained)
    for count, name in enumerate(held_out, start=1):
        data = (tmp_path / "data" / name).read_bytes()
        place = data.index(b"IDAT") + 8
        (tmp_path / "data" / name).write_bytes(data[:place] + b"\xff" * 8 + data[place + 8 :])
        capsys.readouterr()
        run = train(f"broken-{count}", *validated)
        found = lines(run, "broken.jsonl")
        assert [fault["id"] for fault in found] == held_out[:count]
        assert {fault["step"] for fault in found} == {2}
        said = f"{count} of 2 held-out samples are broken"
        assert capsys.readouterr().out.count(said) == 1
        measured = [line for line in lines(run) if "loss" not in line]
        assert len(measured) == (2 if count == 1 else 0)
        assert all("validation/ema/loss" in line for line in measured)
        train(f"broken-{count}", *validated, "--max-train-steps", "6", "--resume", "auto")
        assert lines(run, "broken.jsonl") == found  # also once in a run that is resumed
        assert said not in capsys.readouterr().out


def test_a_run_beyond_its_last_step_is_refused(train, capsys):
    run = train("run", "--save-interval", "2")
    before = (run / "final/manifest.json").read_bytes(), (run / "config.json").read_bytes()
    train("run", "--resume", "auto", "--max-train-steps", "3", expect=1)
    assert "checkpoint-4 is after step 4, but the run is to end at step 3." in (
        capsys.readouterr().err
    )
    after = (run / "final/manifest.json").read_bytes(), (run / "config.json").read_bytes()
    assert before == after
    train("run", "--resume", run / "checkpoint-2", "--max-train-steps", "3")
    assert read_manifest(run / "final").step == 3


@pytest.mark.parametrize("place", ["final", "ema-2"])
def test_resuming_a_result_is_refused(train, tmp_path, capsys, place):
    train("run", "--max-train-steps", "2", "--post-hoc-ema")
    train("run", "--post-hoc-ema", "--resume", tmp_path / f"run/{place}", expect=1)
    assert (
        f"{place} can't be resumed: it is a result, without the state of the training. Name a "
        "folder checkpoint-STEP of the run, or give --resume auto."
    ) in capsys.readouterr().err


def test_resuming_another_run_is_refused(train, capsys):
    run = train("run", "--max-train-steps", "2")
    train("run", "--resume", "auto", "--seed", "9", expect=1)
    assert (
        "is of a run with --seed 0, not with --seed 9. Resume it with --seed 0"
        in capsys.readouterr().err
    )
    train("run", "--resume", "auto", "--learning-rate", "2e-3")
    assert "Changed since: learning_rate: 0.001 -> 0.002" in capsys.readouterr().out
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_a_changed_file_of_a_single_stage_is_listed(train, tmp_path, capsys):
    stages = ["--stages", tmp_path / "stages.json"]
    stages[1].write_text('[{"learning-rate": 0.002, "max-train-steps": 2}]')
    run = train("run", *stages)
    saved = json.loads((run / "config.json").read_text())
    assert (saved["learning_rate"], saved["max_train_steps"]) == (0.002, 2)
    stages[1].write_text('[{"learning-rate": 0.003, "max-train-steps": 3}]')
    train("run", *stages, "--resume", "auto")
    printed = capsys.readouterr().out
    assert "Changed since: learning_rate: 0.002 -> 0.003" in printed
    assert "Changed since: max_train_steps: 2 -> 3" in printed


def test_the_precision_of_accelerate_is_one_of_the_options(train, capsys, monkeypatch):
    run = train("run", "--max-train-steps", "1")
    assert json.loads((run / "config.json").read_text())["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train("run", "--max-train-steps", "2", "--resume", "auto")
    assert "Changed since: mixed_precision: no -> bf16" in capsys.readouterr().out
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    # An earlier version saved only what was given.
    rewrite_options(run / "checkpoint-2", mixed_precision=None)
    train("run", "--max-train-steps", "3", "--resume", "auto")
    assert "mixed_precision" not in capsys.readouterr().out


def test_a_default_that_is_given_is_no_change(train, workplace, capsys):
    """Check values that come from elsewhere, also in checkpoints that do not name them."""
    lora = ["--transformer", workplace / "pipeline", "--lora-rank", "2"]
    distil = ["--method", "distil", "--teacher", workplace / "pipeline"]
    for name, more, flag, value, other in (
        ("lora", lora, "--lora-alpha", "2", "4"),
        ("distil", distil, "--teacher-guidance-scale", "7", "3"),
    ):
        run = train(name, *more, "--max-train-steps", "1")
        train(name, *more, flag, value, "--max-train-steps", "2", "--resume", "auto")
        rewrite_options(run / "checkpoint-2", **{flag[2:].replace("-", "_"): None})
        for given in ([flag, value], []):
            train(name, *more, *given, "--max-train-steps", "2", "--resume", "auto")
        assert flag[2:].replace("-", "_") not in capsys.readouterr().out
        train(name, *more, flag, other, "--resume", "auto", expect=1)
        assert f"not with {flag} {other}" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_skipped(train, capsys):
    run = train("run", "--save-interval", "2")
    expected = lines(run)
    file = run / "checkpoint-4/training/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    train("run", "--resume", "auto")
    printed = capsys.readouterr().out
    assert "checkpoint-4 is skipped: training/model.safetensors is damaged" in printed
    assert "checkpoint-4 is kept as set-aside-4" in printed
    assert "Resuming from" in printed and "after step 2." in printed
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in expected]


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(train, capsys):
    run = train("run", "--max-train-steps", "2")
    folder = run / "checkpoint-2"
    file = folder / "training/model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    manifest = read_manifest(folder)
    sums = manifest.sums | {"training/model.safetensors": sha256(file.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(manifest._replace(sums=sums).text())
    train("run", "--resume", "auto", expect=1)
    assert "has values that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data-root", "nowhere"], "nowhere"),
        (["--transformer-config", "huge"], "--transformer-config huge is neither"),
        (
            ["--transformer-config", "unknown.json"],
            "unknown.json has 'num_layer', which the transformer does not take. It takes num_att",
        ),
        (["--transformer-config", "text.json"], "text.json: `patch_size` is '2'; it has to be at"),
        (["--transformer-config", "wide.json"], "takes captions of 4096 channels"),
        (
            ["--output", str(ROOT / "tests")],
            "is not empty and holds no run. Choose another folder",
        ),
        (["--validation-samples", "8"], "held out for validation"),
        (
            ["--transformer", str(BOX / "transformer"), "--transformer-config", "tiny"],
            f"this one starts from {BOX / 'transformer'}, which has its own shape: leave it out",
        ),
        (["--mixed-precision", "fp16"], "needs a GPU, and this run is on a CPU: give --mixed-prec"),
        (["--image-size", "100"], "is 100; expected a multiple of 16, the nearest is 96"),
        (["--image-size", "512"], "holds no picture to train on: of 8 samples, 8 are too small"),
        (
            ["--alignment-weight", "0.5", "--alignment-blocks", "1", "3", "--dry-run"],
            "--alignment-blocks is 1 3; expected a block and a later one of the 2 blocks",
        ),
        (
            ["--token-routing", "0.5", "--routing-blocks", "1", "3", "--dry-run"],
            "--routing-blocks is 1 3; expected the first and the last of the 2 blocks",
        ),
        (
            ["--token-routing", "0.5", "--routing-blocks", "2", "2", "--image-size", "32",
             "--dry-run"],
            "but maps of 2 x 2 tokens have 1 x 1 whole windows",
        ),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_in_a_line(train, workplace, more, message, capsys):
    shape = json.loads((workplace / "shape.json").read_text())
    (workplace / "wide.json").write_text(json.dumps(shape | {"caption_channels": 4096}))
    (workplace / "text.json").write_text(json.dumps(shape | {"patch_size": "2"}))
    (workplace / "unknown.json").write_text('{"num_layer": 2}')
    train("run", *(workplace / one if one.endswith("json") else one for one in more), expect=1)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_dry_run_may_plan_for_a_gpu(train, capsys):
    run = train("dry", "--dry-run", "--mixed-precision", "fp16")
    assert "Samples: 8 to train on" in capsys.readouterr().out
    assert not run.exists()


def test_a_dry_run_trains_nothing_and_leaves_interrupts_alone(train, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = train("run", "--dry-run")
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert "Samples: 8 to train on" in capsys.readouterr().out
    assert not run.exists()


def test_a_warm_up_without_an_end_is_told(train, tmp_path, capsys):
    stages = [{"max-train-steps": 3}, {"max-train-steps": 2, "warmup-steps": 1}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    train("run", "--stages", tmp_path / "stages.json", "--warmup-steps", "1000", "--dry-run")
    told = capsys.readouterr().err
    assert "--warmup-steps is 1,000, and stage 1 has 3 steps, so the learning rate does not" in told
    assert "stage 2" not in told


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named(train, tmp_path, monkeypatch, capsys, package):
    (tmp_path / "data").mkdir()
    name = {"pyarrow": "metadata.parquet", "datasets": "dataset_dict.json"}[package]
    (tmp_path / "data" / name).write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    train("run", "--data-root", tmp_path / "data", expect=1)
    assert f"needs {package}: pip install -r requirements-train.txt" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["adapters", "metrics"])
def test_a_dry_run_that_can_not_tell_the_cost_says_why(train, workplace, tmp_path, capsys, mistake):
    more, message = [], f"{tmp_path}/run/metrics.jsonl, line 1, is no JSON object"
    if mistake == "adapters":
        more = ["--transformer", workplace / "pipeline", "--lora-rank", "2",
                "--lora-target-modules", "nonsense"]  # fmt: skip
        message = "--lora-target-modules nonsense is not the end of the names of linear layers"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("[1]\n{}\n")
    train("run", "--dry-run", *more, expect=1)
    assert message in capsys.readouterr().err


def test_the_death_of_a_process_that_reads_pictures_says_what_to_do(train, monkeypatch, capsys):
    read = "localdit.training.data.batches.read_picture"
    monkeypatch.setattr(read, lambda *picture: os.kill(os.getpid(), signal.SIGKILL))
    train("dies", "--num-workers", "1", expect=1)
    told = capsys.readouterr().err
    assert "A process that reads pictures was killed" in told
    assert "Lower --num-workers, and continue with --resume auto." in told
    assert "Traceback" not in told


def test_a_dry_run_reports_what_training_would_refuse(train, workplace, tmp_path, capsys):
    shutil.copytree(workplace / "pictures", tmp_path / "data")
    (tmp_path / "data/red.png").write_bytes(b"")
    train("run", "--data-root", tmp_path / "data", "--dry-run", expect=1)
    told = capsys.readouterr()
    assert "Samples: 7 to train on" in told.out
    assert "1 of 8 samples are broken, 12.5%, more than the 10%" in told.err


def test_help_answers_at_once():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--data-root" in result.stdout
    assert "torch" not in result.stderr


def test_a_student_learns_the_predictions_of_its_teacher(train, workplace):
    """Check that the loss is the distance to the teacher, and that runs resume to the same bits."""
    teacher = workplace / "pipeline/transformer"
    distil = ["--method", "knowledge-distillation", "--teacher", teacher]
    # At the size that the teacher was made for, so that both place pictures alike.
    same = ["--transformer", teacher, "--image-size", "64"]
    twins = lines(train("twins", *distil, *same))
    assert twins[0]["loss"] < 1e-10  # the teacher itself has nothing to learn, but for rounding
    whole = train("whole", *distil)
    assert min(line["loss"] for line in lines(whole)) > 0
    train("part", *distil, "--max-train-steps", "2")
    part = train("part", *distil, "--resume", "auto")
    expected, resumed = weights(whole / "final"), weights(part / "final")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    adapters = train("lora", *distil, "--transformer", teacher, "--lora-rank", "2")
    assert (adapters / "final/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("kind", ["latent-consistency", "continuous-consistency"])
def test_a_few_step_student_is_a_folder_that_knows_its_steps(train, workplace, kind):
    """Check that a student starts as its teacher, resumes to the same bits, and draws."""
    teacher = workplace / "pipeline/transformer"
    distil = ["--method", "distil", "--distillation", kind, "--teacher", teacher,
              "--image-size", "64", "--student-steps", "2", "--validation-samples", "2",
              "--validation-interval", "3"]  # fmt: skip
    whole = train("whole", *distil)
    train("part", *distil, "--max-train-steps", "2")
    part = train("part", *distil, "--resume", "auto")
    expected, resumed = weights(whole / "final"), weights(part / "final")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    assert any("validation/ema/loss" in line for line in lines(whole))

    pipe = LocalDiTPipeline.from_pretrained(whole / "final")
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert (pipe.config.num_inference_steps, pipe.config.guidance_scale) == (2, 1.0)
    pipe("a red square", output_type="latent")
    assert pipe.num_timesteps == 2


def test_a_few_step_lora_comes_with_its_scheduler(train, workplace):
    teacher = workplace / "pipeline/transformer"
    run = train("lora", "--method", "distil", "--teacher", teacher, "--lora-rank", "2")
    assert (run / "final/pytorch_lora_weights.safetensors").is_file()
    scheduler = LCMScheduler.from_pretrained(run / "final/scheduler")
    base = json.loads((run / "final/base.json").read_text())
    assert (base["num_inference_steps"], base["guidance_scale"]) == (4, 1.0)
    pipe = LocalDiTPipeline.from_pretrained(workplace / "pipeline", scheduler=scheduler)
    pipe.load_lora_weights(run / "final")
    pipe("a red square", num_inference_steps=4, guidance_scale=1.0, output_type="latent")


def test_the_settings_of_the_start_are_those_of_the_result(train, workplace, tmp_path, capsys):
    shutil.copytree(workplace / "pipeline", tmp_path / "guided")
    index = tmp_path / "guided/model_index.json"
    values = json.loads(index.read_text()) | {"num_inference_steps": 12, "guidance_scale": 2.5}
    index.write_text(json.dumps(values))
    run = train("run", "--transformer", tmp_path / "guided/transformer", "--image-size", "64")
    written = json.loads((run / "final/model_index.json").read_text())
    assert (written["num_inference_steps"], written["guidance_scale"]) == (12, 2.5)
    index.write_text(json.dumps(values | {"num_inference_steps": 4, "guidance_scale": 1.0}))
    run = train("ordinary", "--transformer", tmp_path / "guided/transformer", "--image-size", "64")
    written = json.loads((run / "final/model_index.json").read_text())
    # Trained on the noise, a few-step model does not stay one.
    assert (written["num_inference_steps"], written["guidance_scale"]) == (20, 7.0)
    index.write_text(json.dumps(values | {"guidance_scale": "2"}))
    train("text", "--transformer", tmp_path / "guided/transformer", "--image-size", "64", expect=1)
    assert f"{index}: guidance_scale is '2' of type str; expected" in capsys.readouterr().err


def test_a_vocabulary_of_whole_words_stays_with_its_text_encoder(
    train, workplace, tmp_path, caplog
):
    whole = LocalDiTPipeline.from_pretrained(workplace / "pipeline")
    whole.register_to_config(whole_words=True)
    whole.save_pretrained(tmp_path / "whole")
    once = ["--max-train-steps", "1"]
    of_box = [*once, "--pretrained", tmp_path / "whole"]
    new = train("new", *of_box, "--post-hoc-ema", "--validation-prompts", "a cat", "a zebra",
                "--validation-interval", "1")  # fmt: skip
    assert "does not know this word and ignores it: zebra" in caplog.text
    distil = ["--method", "distil", "--teacher", workplace / "pipeline/transformer"]
    results = [
        new / "final", new / "checkpoint-1", new / "ema-1/0.05",
        train("student", *of_box, *distil) / "final",
        train("again", *once, "--pretrained", new / "final") / "final",
    ]  # fmt: skip
    for folder in results:
        assert LocalDiTPipeline.from_pretrained(folder).config.whole_words, folder
    # The words belong to the text encoder, whatever the transformer comes from.
    other = train("other", *once, "--transformer", tmp_path / "whole/transformer") / "final"
    assert not LocalDiTPipeline.from_pretrained(other).config.whole_words


@pytest.mark.parametrize("adapters", [False, True])
def test_the_start_of_a_resumed_run_has_no_effect(adapters, train, workplace, tmp_path, capsys):
    shutil.copytree(workplace / "pipeline", tmp_path / "guided")
    index = tmp_path / "guided/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"guidance_scale": 2.5}))
    more = ["--lora-rank", "2"] if adapters else []
    run = train("run", "--transformer", tmp_path / "guided/transformer", "--max-train-steps", "2",
                *more)  # fmt: skip
    train("run", "--resume", "auto", "--transformer", workplace / "pipeline/transformer", *more)
    printed = capsys.readouterr().out
    has_none = ", without effect: weights and settings are those of the checkpoint" in printed
    assert "Changed since: transformer: " in printed and has_none == (not adapters)
    if not adapters:
        assert f"parameters are trained, from {run}/checkpoint-2/transformer" in printed
        assert json.loads((run / "final/model_index.json").read_text())["guidance_scale"] == 2.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "distil"], "--method distil and --teacher go together"),
        (["--teacher", "TEACHER"], "--teacher is for --method knowledge-distillation and distil"),
        (["--teacher-steps", "10"], "--teacher-steps is for --method distil"),
        (["--method", "distil", "--teacher", "TEACHER", "--teacher-steps", "3"],
         "--teacher-steps is 3; expected at least --student-steps, which is 4"),
        (["--method", "distil", "--teacher", "TEACHER", "--teacher-steps", "2000"],
         "--teacher-steps is 2000; expected 1 to 1,000"),
        (["--method", "distil", "--teacher", "TEACHER", "--validation-guidance-scale", "3"],
         "--validation-guidance-scale is not for --method distil"),
        (["--method", "distil", "--teacher", "TEACHER", "--min-snr-gamma", "5"],
         "--min-snr-gamma is not for --method distil, whose losses are not weighted: leave it out"),
        (["--method", "distil", "--teacher", "TEACHER", "--distillation", "trajectory",
          "--timestep-sampling", "logit_normal"],
         "--timestep-sampling is not for --distillation trajectory, which trains at the steps"),
    ],
)  # fmt: skip
def test_options_of_distillation_are_checked(train, workplace, capsys, options, message):
    teacher = str(workplace / "pipeline/transformer")
    with pytest.raises(SystemExit):
        train("run", *(teacher if one == "TEACHER" else one for one in options))
    assert re.search(message, capsys.readouterr().err)


def changed_weights(folder):
    """Change all weights in a folder in place, a little."""
    for file in folder.glob("*.safetensors"):
        save_file({name: t * 1.01 for name, t in load_file(file).items()}, file, {"format": "pt"})


def test_frozen_models_count_by_their_weights_and_not_by_their_paths(
    train, workplace, tmp_path, capsys
):
    for name in ("one", "two"):
        shutil.copytree(workplace / "pipeline", tmp_path / name)

    def resumed(folder, expect=0):
        return train("run", "--method", "knowledge-distillation", "--teacher", tmp_path / folder,
                     "--pretrained", tmp_path / folder, "--resume", "auto",
                     "--max-train-steps", "1", expect=expect)  # fmt: skip

    run = resumed("one")
    capsys.readouterr()
    resumed("two")  # the same weights elsewhere
    printed = capsys.readouterr().out
    assert "Changed since: teacher: " in printed and "sha256" not in printed
    changed_weights(tmp_path / "two/vae")  # as with another --vae, the run goes on
    resumed("two")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sha256" in line]
    assert line.startswith("Changed since: vae_sha256: ")
    changed_weights(tmp_path / "two/transformer")
    resumed("two", expect=1)
    assert "whose teacher had other weights than --teacher has now" in capsys.readouterr().err
    # Checkpoints of earlier versions name only the path.
    names = [name for name in json.loads((run / "config.json").read_text()) if "sha256" in name]
    assert sorted(names) == [
        f"{one}_sha256" for one in ("teacher", "text_encoder", "tokenizer", "vae")
    ]
    rewrite_options(run / "checkpoint-1", **dict.fromkeys(names, ...))
    resumed("one")
    capsys.readouterr()
    rewrite_options(run / "checkpoint-1", **dict.fromkeys(names, ...))
    resumed("two", expect=1)
    assert "is of a run with --teacher" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["teacher", "transformer"])
def test_frozen_models_count_by_their_settings_as_by_their_weights(
    train, workplace, tmp_path, capsys, kind
):
    """Check settings that change what the same weights compute."""
    folder = tmp_path / "models"
    shutil.copytree(workplace / "pipeline", folder)
    more = {
        "teacher": ["--method", "knowledge-distillation", "--teacher", folder],
        "transformer": ["--transformer", folder, "--lora-rank", "2"],
    }[kind]

    def resumed(part="", expect=0, **changes):
        if part:
            path = folder / part / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return train("run", "--pretrained", folder, *more, "--max-train-steps", "1",
                     "--resume", "auto", expect=expect)  # fmt: skip

    run = resumed()
    resumed("vae", scaling_factor=0.5)
    assert "Changed since: vae.scaling_factor: 0.13025 -> 0.5" in capsys.readouterr().out
    resumed("transformer", interpolation_scale=3.0, expect=1)
    expected = f"whose {kind} had interpolation_scale None, but --{kind} has 3.0 now. Resume it"
    assert expected in capsys.readouterr().err
    # Checkpoints of earlier versions do not name them.
    names = [name for name in json.loads((run / "config.json").read_text()) if "." in name]
    assert {f"{kind}.layer_types", f"{kind}.sample_size", "vae.scaling_factor"} <= {*names}
    rewrite_options(run / "checkpoint-1", **dict.fromkeys(names, ...))
    resumed()
    assert "Changed since" not in capsys.readouterr().out


def test_a_run_with_another_method_is_not_resumed(train, workplace, capsys):
    teacher = workplace / "pipeline/transformer"
    train("run", "--method", "knowledge-distillation", "--teacher", teacher)
    train("run", "--resume", "auto", expect=1)
    assert "not with --method fine-tuning" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("alone", "--method", "knowledge-distillation")
    assert "--teacher go together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_types": "local_pooled"}, "layer_types is ['local"),
        ({"shift_schedule": "alternating"}, "shift_schedule is cyclic there and alternating here"),
    ],
)
def test_a_run_with_a_transformer_of_another_shape_is_not_resumed(
    train, workplace, tmp_path, capsys, change, said
):
    """The tensors have the same names and sizes; only what they compute differs."""
    folder = train("run", "--max-train-steps", "2")
    before = sorted(folder.rglob("*"))
    shape = json.loads((workplace / "shape.json").read_text()) | change
    (tmp_path / "other.json").write_text(json.dumps(shape))
    config = ["--transformer-config", str(tmp_path / "other.json")]
    train("run", "--resume", "auto", *config, expect=1)
    error = capsys.readouterr().err
    assert "checkpoint-2 is of a transformer of another shape" in error and said in error
    assert sorted(folder.rglob("*")) == before
