"""`localdit train`: its checks, and the hand-over to Accelerate."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from localdit.cli import main
from localdit.cli.train import MODULE
from tests.training.workplace import ROOT, environment, lines, make_workplace, options


@pytest.fixture
def became(monkeypatch):
    """The command and environment of the process that would replace this one."""
    found = []
    monkeypatch.setattr(os, "execvpe", lambda file, argv, env: found.append((argv, env)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found


def test_a_single_training_replaces_the_command(became):
    argv = ["--num_processes", "1", "--", "--data-root", "x", "--batch-size", "2"]
    assert main(["train", *argv]) == 0
    ((command, env),) = became
    assert command == [sys.executable, "-m", MODULE, "--data-root", "x", "--batch-size", "2"]
    assert "OMP_NUM_THREADS" not in env
    assert env["ACCELERATE_MIXED_PRECISION"] == "no"


def test_options_reach_accelerate(became):
    launcher = ["--cpu", "--mixed_precision", "bf16", "--num_cpu_threads_per_process", "1"]
    assert main(["train", *launcher, "--", "--data-root", "x"]) == 0
    ((_, env),) = became
    assert env["ACCELERATE_USE_CPU"] == "True"
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert env["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --data-root"),
        (["--data-root", "x", "--batch-size", "0"], "--batch-size is 0; expected more than 0"),
        (["--data-root", "x", "--num_machines", "2"], "go before a --"),
        (["--mixed_precision", "x", "--", "--data-root", "x"], "accelerate launch: "),
        (["fast", "--", "--data-root", "x"], "'fast' before -- is no option of accelerate launch"),
        (["--multi_gpu", "--cpu", "--", "--data-root", "x"], "You can only use one of"),
    ],
)
def test_mistakes_give_one_line_and_start_nothing(argv, message, became, capsys):
    assert main(["train", *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("localdit train: error: ") and said.count("\n") == 1
    assert message in said
    assert not became


@pytest.mark.slow
def test_it_trains_with_only_the_package(tmp_path):
    """And a signal to the command reaches the training, which leaves a checkpoint."""
    workplace = make_workplace(tmp_path)
    argv = options(workplace, tmp_path / "run", "--max-train-steps", "100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "localdit", "train", *argv], cwd=tmp_path, text=True,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert "step 1 of 100000: loss " in told and "it/s" not in told and "step/s" not in told
    last = lines(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoint-{last}").is_dir()


@pytest.mark.slow
def test_accelerate_starts_several_processes(tmp_path):
    workplace = make_workplace(tmp_path)
    config = ROOT / "recipes/accelerate/two_cpus.yaml"
    argv = shlex.split(f"--config_file {config} -- ") + options(workplace, tmp_path / "run")
    for more, code in (([], 0), (["--data-root", "nowhere", "--output", "other"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "localdit", "train", *argv, *more], cwd=tmp_path, text=True,
            env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert ("2 x 2 processes on cpu" in done.stdout) == (code == 0)
    assert "error: " in done.stderr and "localdit/cli" not in done.stderr
