"""Tests of processes: their agreement, and the same sums on one process and on several."""

import subprocess

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from localdit.errors import FieldTypeError
from localdit.training.processes import Agreement
from localdit.training.shutdown import TrainingStopped
from tests.training.test_sharding import FSDP2, needs_fsdp2
from tests.training.workplace import ROOT, command, environment, lines, make_workplace, weights

STEPS = 50


@pytest.fixture
def agreement():
    return Agreement(Accelerator(cpu=True))


def test_a_single_process_agrees_with_itself(agreement):
    assert agreement.total(1, True, 2.5) == [1.0, 1.0, 2.5]
    assert agreement.gathered(["a", "b"]) == ["a", "b"]
    assert agreement.on_main(lambda: 3) == agreement.on_all(lambda: 3) == 3


@pytest.mark.parametrize("error", [OSError, ValueError, FieldTypeError, ModuleNotFoundError])
def test_errors_that_a_user_can_mend_stop_training(agreement, error):
    def fail():
        raise error("the reason")

    for call in (agreement.on_main, agreement.on_all):
        with pytest.raises(TrainingStopped, match="the reason"):
            call(fail)


def test_other_errors_keep_their_traceback(agreement):
    def fail():
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        agreement.on_all(fail)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def train(workplace, tmp_path_factory):
    def run(processes, batch_size, accumulated=1, **engine):
        folder = tmp_path_factory.mktemp("run") / "run"
        more = ["--batch-size", batch_size, "--gradient-accumulation-steps", accumulated]
        more += ["--max-train-steps", STEPS, "--save-interval", "1", "--keep-checkpoints", "100"]
        result = subprocess.run(
            command(workplace, folder, *more, processes=processes),
            cwd=ROOT, env=environment() | engine, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return folder

    return run


@pytest.fixture(scope="module")
def alone(train):
    return train(1, 4)


def first_gradient(run):
    """Return the clipped gradient of the first step: ten times AdamW's first moment after it."""
    moments = load_file(run / "checkpoint-1/training/optimizer.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(moments.items()) if k.endswith("exp_avg")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulated", "engine"),
    [
        (1, 1, 4, {}),
        (2, 2, 1, {}),
        (2, 1, 2, {}),
        pytest.param(2, 2, 1, FSDP2, marks=needs_fsdp2),
    ],
    ids=["accumulation", "DDP", "DDP-accumulation", "FSDP2"],
)
def test_processes_and_accumulation_compute_the_same_sum(
    train, alone, processes, batch_size, accumulated, engine
):
    run = train(processes, batch_size, accumulated, **engine)
    expected, gradient = first_gradient(alone), first_gradient(run)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5
    for line, other in zip(lines(run), lines(alone), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    last = f"checkpoint-{STEPS}"
    tensors, others = weights(run / last / "training"), weights(alone / last / "training")
    differences = [
        (tensors[name] - others[name]).abs().max().item()
        for name in others
        if name[0] == "model.safetensors"
    ]
    assert max(differences) < 1e-4
    print(f"first gradient {(gradient - expected).norm() / expected.norm():.1e}, "
          f"weights {max(differences):.1e}")  # fmt: skip
