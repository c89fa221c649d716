"""Tests that an interrupted run resumes to the same bits as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState

from localdit.training.checkpointing import files_in, newest_checkpoint, verify_checkpoint
from localdit.training.reporting import Reporter
from localdit.training.run_folder import RunFolder
from tests.training.workplace import (
    ROOT,
    command,
    descendants,
    environment,
    kill,
    lines,
    load_main,
    make_image_encoder,
    make_workplace,
    options,
    start,
    weights,
)

STEPS = 20  # of 2 samples: with 6 and 2 of them in two buckets, an epoch has 4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    shape = json.loads((folder / "shape.json").read_text())
    # Dropout draws from the global generators, which have to go on where they were as well.
    (folder / "shape.json").write_text(json.dumps(shape | {"dropout": 0.1}))
    stages = [
        {"image-size": 96, "max-train-steps": 7},
        {"image-size": 64, "max-train-steps": 13, "gradient-accumulation-steps": 2},
    ]
    (folder / "stages.json").write_text(json.dumps(stages))
    make_image_encoder(folder / "encoder")
    return folder


def case(workplace, *names):
    """The options of each case, by its name."""
    if "lora" in names:
        pytest.importorskip("peft")
    if "muon" in names and not hasattr(torch.optim, "Muon"):
        pytest.skip("needs PyTorch 2.9")
    known = {
        "folder": ["--data-root", workplace / "pictures"],
        "tars": ["--data-root", workplace / "shard-{0..1}.tar"],
        "workers": ["--num-workers", "2"],
        "accumulation": ["--batch-size", "1", "--gradient-accumulation-steps", "2"],
        "stages": ["--stages", workplace / "stages.json"],
        "validation": ["--validation-interval", "3", "--validation-samples", "2"],
        "half": ["--batch-size", "1"],
        "muon": ["--optimizer", "muon"],
        "post-hoc": ["--post-hoc-ema"],
        "learning": [
            *("--contrastive-weight", "0.05", "--alignment-weight", "0.5"),
            *("--alignment-blocks", "1", "2"),
            *("--token-routing", "0.5", "--routing-blocks", "2", "2"),
        ],
        "repa": ["--repa-weight", "0.5", "--repa-encoder", workplace / "encoder"],
        "lora": [
            "--transformer",
            workplace / "pipeline/transformer",
            "--lora-rank",
            "2",
            "--lora-alpha",
            "3",
            "--lora-dropout",
            "0.2",
        ],
    }
    more = ["--max-train-steps", STEPS, "--save-interval", "2", "--lr-schedule", "cosine",
            "--warmup-steps", "3", "--log-interval", "3", "--horizontal-flip", "0.5"]  # fmt: skip
    return more + [option for name in names for option in known[name]]


def assert_same(run, expected, processes=1):
    """Compare losses, sample ids and all that the newest checkpoint and `final` hold."""
    timeless = ("step", "loss", "grad_norm", "learning_rate")
    for line, other in zip(lines(run), lines(expected), strict=True):
        assert [line.get(name) for name in timeless] == [other.get(name) for name in timeless]
    for rank in range(processes):
        name = f"samples-{rank}.jsonl"
        assert lines(run, name) == lines(expected, name)
    (checkpoint, _), (other, _) = newest_checkpoint(run), newest_checkpoint(expected)
    assert checkpoint.name == other.name
    for folder, same in ((checkpoint, other), (run / "final", expected / "final")):
        tensors, others = weights(folder), weights(same)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
        files = files_in(folder)
        assert files == files_in(same)
        for name in files:
            if not name.endswith((".safetensors", "state.json")):
                assert (folder / name).read_bytes() == (same / name).read_bytes(), name
    states = [
        json.loads((folder / "training/state.json").read_text()) for folder in (checkpoint, other)
    ]
    for state in states:
        del state["options"]
    assert states[0] == states[1]


CASES = [
    ("folder",),
    ("tars", "workers"),
    ("folder", "accumulation", "validation"),
    ("tars", "stages"),
    ("folder", "lora", "validation"),
    ("folder", "muon", "post-hoc"),
    ("folder", "learning", "stages"),
    ("tars", "repa", "muon"),
    ("folder", "repa", "lora", "learning"),
]


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_an_interrupted_run_resumes_to_the_same_bits(names, workplace, tmp_path, monkeypatch):
    """Run in this process, with an exception instead of the kill, to be fast."""
    main = load_main()

    def run(name, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = ["train.py", *options(workplace, tmp_path / name, *case(workplace, *names), *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == 0

    run("whole")
    advance = Reporter.advance
    for last in (3, 10):  # in the first epoch, and in the third

        def interrupt(reporter, last=last):
            advance(reporter)
            if reporter.step == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Reporter, "advance", interrupt)
            run("broken", "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save_final", Mock(side_effect=KeyboardInterrupt))
        run("broken", "--resume", "auto")
    run("broken", "--resume", "auto")
    assert_same(tmp_path / "broken", tmp_path / "whole")


def test_a_run_that_branches_off_and_is_killed_goes_on_from_where_it_began(
    workplace, tmp_path, monkeypatch
):
    main = load_main()

    def run(name, *more):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = ["train.py", *options(workplace, tmp_path / name, *case(workplace, "folder"), *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == 0

    run("trunk", "--max-train-steps", "4")
    branch = ["--learning-rate", "2e-3", "--max-train-steps", "6", "--save-interval", "100"]
    start = ["--resume", tmp_path / "trunk/checkpoint-2"]
    run("whole", *branch, *start)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reporter, "advance", Mock(side_effect=[None, KeyboardInterrupt]))
        run("broken", *branch, *start)
    run("broken", *branch, "--resume", "auto")
    assert_same(tmp_path / "broken", tmp_path / "whole")


def wait_for(process, condition, seconds=120):
    """Wait until a condition holds while a process runs."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.002)


def steps_of(run):
    file = run / "samples-0.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def finish(workplace, run, *more, processes=1):
    process = start(workplace, run, *more, processes=processes)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "names",
    [
        ("folder",),
        ("folder", "workers"),
        ("tars",),
        ("tars", "workers"),
        ("tars", "accumulation", "workers"),
        ("folder", "stages", "workers"),
        ("folder", "lora", "workers"),
        ("folder", "muon", "post-hoc"),
    ],
    ids="-".join,
)
def test_kill_9_and_resume_give_the_same_bits(names, processes, workplace, tmp_path):
    """Run in new processes, killed in the first, second and third epoch."""
    more = case(workplace, *names, *["half"] * (processes == 2 and "accumulation" not in names))
    more += ["--resume", "auto"]
    finish(workplace, tmp_path / "whole", *more, processes=processes)
    run = tmp_path / "broken"
    for last in (2, 6, 10):
        process = start(workplace, run, *more, processes=processes)
        wait_for(process, lambda last=last: steps_of(run) >= last)
        kill(process)
        assert steps_of(run) < STEPS
    finish(workplace, run, *more, processes=processes)
    assert_same(run, tmp_path / "whole", processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_save_and_end_the_run(name, processes, workplace, tmp_path):
    run = tmp_path / "run"
    more = [*case(workplace, "folder", "workers"), "--save-interval", "100000"]
    more += ["--max-train-steps", "100000"]
    process = start(workplace, run, *more, processes=processes)
    wait_for(process, lambda: steps_of(run) >= 3)
    since = time.monotonic()
    # To one of the processes that train, as a scheduler or a person may do.
    target = process.pid if processes == 1 else descendants(process.pid)[0]
    os.kill(target, getattr(signal, name))
    printed, _ = process.communicate(timeout=60)
    assert time.monotonic() - since < 30
    assert process.returncode == 0, printed
    assert f"{name}: saved and stopped after step" in printed
    checkpoint, _ = newest_checkpoint(run)
    saved = int(checkpoint.name.split("-")[1])
    assert saved == steps_of(run)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_run_with_one_message(processes, workplace, tmp_path):
    run, limit = tmp_path / "run", 200_000
    finish(workplace, run, *case(workplace, "folder"), "--max-train-steps", "2",
           processes=processes)  # fmt: skip
    # No file may grow beyond the limit: writing weights fails as it does on a full disk.
    script = (
        f"import resource, signal, subprocess, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit // 10}, {limit // 10}));"
        f"sys.exit(subprocess.call(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script,
         *command(workplace, run, *case(workplace, "folder"), "--resume", "auto",
                  processes=processes)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("error: The checkpoint of step 4 could not be written") == 1
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-2"]
    verify_checkpoint(run / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_all(processes, workplace, tmp_path):
    run = tmp_path / "run"
    more = [*case(workplace, "folder", *["half"] * (processes == 2)), "--save-interval", "1"]
    more += ["--max-train-steps", "4"]
    launch = command(workplace, run, *more, processes=processes)
    launch[launch.index("train.py")] = "tests/training/not_finite_run.py"
    result = subprocess.run(
        launch, cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    broken = lines(run, f"samples-{processes - 1}.jsonl")[2]
    assert broken["loss"] is None
    assert f"Step 3: the loss is not finite, for {broken['samples'][0]}." in result.stdout
    state = json.loads((run / "checkpoint-4/training/state.json").read_text())
    assert (state["progress"]["step"], state["progress"]["skipped"]) == (4, 1)
    for name, tensor in weights(run / "checkpoint-4").items():
        assert torch.isfinite(tensor.float()).all(), name


@pytest.mark.slow
def test_more_processes_continue_the_rest_of_the_epoch(workplace, tmp_path):
    run = tmp_path / "run"
    more = [*case(workplace, "folder"), "--batch-size", "3"]
    finish(workplace, run, *more, "--max-train-steps", "2")
    first = [name for line in lines(run, "samples-0.jsonl") for name in line["samples"]]
    printed = finish(
        workplace, run, *more, "--max-train-steps", "9", "--resume", "auto", processes=2
    )
    assert "An optimizer step has 6 samples now, it had 3" in printed
    rest = [
        (line["step"], name)
        for rank in range(2)
        for line in lines(run, f"samples-{rank}.jsonl")
        if line["step"] > 2
        for name in line["samples"]
    ]
    epoch = first + [name for _, name in sorted(rest) if name]
    seen = [name for name in epoch if name][:8]
    assert len(set(seen)) == 8
