import sys

import pytest
from accelerate.state import AcceleratorState

from localdit.training.run_folder import RunFolder
from tests.training.workplace import load_main, make_workplace, options


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train with a tracker, and return the run folder."""

    def train(*more):
        AcceleratorState._reset_state(reset_partial_state=True)
        workplace = tmp_path / "workplace"
        if not workplace.exists():
            workplace.mkdir()
            make_workplace(workplace)
        argv = ["train.py", *options(workplace, tmp_path / "run", *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert load_main()() == 0
        return tmp_path / "run"

    return train


PICTURES = ["--validation-prompts", "a cat", "a dog", "--validation-interval", "2"]


def test_tensorboard_has_numbers_and_pictures(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("--use-tensorboard", *PICTURES)
    events = EventAccumulator(str(folder / "tensorboard/localdit"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert {event.step for event in events.Images("validation")} == {2, 4}


@pytest.mark.slow
def test_wandb_works_offline_and_resumes_its_run(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = run("--use-wandb", "--max-train-steps", "2", *PICTURES)
    name = (folder / "wandb-id.txt").read_text()
    run("--use-wandb", "--resume", "auto", *PICTURES)
    assert len(list(folder.glob(f"wandb/offline-run-*-{name}"))) in (1, 2)
    assert len(list(folder.glob("wandb/offline-run-*"))) == len(
        list(folder.glob(f"wandb/offline-run-*-{name}"))
    )
    assert len(list(folder.rglob("validation_*.png"))) >= 2


def test_a_failure_to_print_does_not_end_the_run(run, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        folder = run()
    assert (folder / "final").is_dir()
    assert "warning: can't print: No space left on device" in capsys.readouterr().err


def test_an_unwritable_log_does_not_end_the_run(run, monkeypatch, capsys):
    def full(self, line, name="metrics.jsonl"):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("localdit.training.run_folder.RunFolder.log", full)
    folder = run()
    assert "Could not write to the log: [Errno 28] No space left" in capsys.readouterr().out
    assert (folder / "final").is_dir()


def test_reports_that_fail_do_not_end_the_run(run, monkeypatch, capsys):
    pytest.importorskip("tensorboard")

    def fail(*args, **options):
        raise RuntimeError("out of order")

    for name in (
        "localdit.training.reporting.draw_curves",
        "localdit.training.run_folder.RunFolder.save_pictures",
        "accelerate.tracking.TensorBoardTracker.log_images",
        "accelerate.tracking.TensorBoardTracker.log",
        "accelerate.tracking.TensorBoardTracker.finish",
    ):
        monkeypatch.setattr(name, fail)
    folder = run("--use-tensorboard", *PICTURES)
    assert (folder / "final").is_dir()
    said = capsys.readouterr().out
    for what in ("draw curves.png", "save pictures", "log to the trackers", "end the trackers"):
        assert f"Could not {what}: out of order" in said


def test_a_tracker_that_can_not_start_does_not_end_the_run(run, capsys):
    pytest.importorskip("tensorboard")
    folder = run("--max-train-steps", "2")
    (folder / "tensorboard").write_text("a file")
    run("--use-tensorboard", "--resume", "auto", *PICTURES)
    assert "Could not start the trackers: " in capsys.readouterr().out
    assert (folder / "checkpoint-4").is_dir()


def test_a_damaged_line_of_metrics_does_not_end_the_run(run, monkeypatch, capsys):
    folder = run("--max-train-steps", "2")
    begin = RunFolder.begin

    def damage(self, options, step):
        begin(self, options, step)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "lo')

    monkeypatch.setattr(RunFolder, "begin", damage)
    run("--resume", "auto")
    assert "Could not draw curves.png: " in capsys.readouterr().out
    assert (folder / "checkpoint-4").is_dir()


def test_without_matplotlib_a_message_replaces_the_curves(run, monkeypatch, capsys):
    from importlib.util import find_spec

    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    folder = run()
    assert "curves.png needs matplotlib: pip install matplotlib" in capsys.readouterr().out
    assert (folder / "final").is_dir() and not (folder / "curves.png").exists()


def test_without_a_terminal_steps_are_printed_in_lines(run, capsys):
    run()
    captured = capsys.readouterr()
    steps = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step {n} of 4" for n in (1, 2, 3, 4)]
    assert "loss " in steps[0] and "grad_norm " in steps[0]
    assert "step/s" not in captured.err
