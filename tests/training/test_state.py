import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from localdit.training.data.order import Position, Step
from localdit.training.metrics import Metrics
from localdit.training.processes import Agreement
from localdit.training.stages import Stage
from localdit.training.state import (
    ExponentialMovingAverage,
    Progress,
    TrainedModel,
    TrainingState,
    random_state,
    set_random_state,
)
from tests.training import two_models_run


def model(value, dtype=torch.float32):
    module = torch.nn.Linear(2, 1, dtype=dtype)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return module


def test_the_average_trails_with_a_decay_that_warms_up():
    ema = ExponentialMovingAverage(model(0.0).named_parameters(), decay=0.5)
    expected = 0.0
    for update in range(1, 20):
        ema.update(model(1.0).named_parameters())
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay)
        assert ema.averages["weight"].tolist() == [[pytest.approx(expected)] * 2]
    assert ema.updates == 19


def test_the_model_is_unchanged_and_the_average_has_no_gradient():
    module = model(3.0)
    ema = ExponentialMovingAverage(module.named_parameters(), decay=0.9)
    with torch.no_grad():
        module.weight.fill_(5.0)
    assert (ema.averages["weight"] == 3).all()
    ema.update(module.named_parameters())
    assert (module.weight == 5).all()
    assert not ema.averages["weight"].requires_grad


def test_averages_are_float32_for_any_type_of_model():
    ema = ExponentialMovingAverage(model(1.0, torch.bfloat16).named_parameters(), 0.999, "cpu")
    assert ema.averages["bias"].dtype == torch.float32
    before = ema.averages["bias"].clone()
    for _ in range(100):
        ema.update(model(1.01, torch.bfloat16).named_parameters())
    assert before < ema.averages["bias"] < 1.01  # bfloat16 would have rounded each update away


ROOT = Path(__file__).parents[2]


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)


def test_global_generators_continue_where_they_were(tmp_path):
    for seed in range(3):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        np.random.randn(), random.gauss(0, 1)  # both leave a second number behind
        state = random_state()
        expected = draw(), np.random.randn()
        draw()
        set_random_state(state)
        assert (draw(), np.random.randn()) == expected


def test_a_process_without_a_state_keeps_its_own():
    before = torch.get_rng_state()
    set_random_state({})
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_counts_steps_and_the_broken_samples_of_an_epoch():
    progress = Progress()
    progress.begin("data", 0)

    def step(epoch, *taken):
        return Step(np.array([0]), 0, 0, Position(epoch, taken))

    progress.advance(step(0, (4, 1)), broken=2, skipped=False)
    progress.advance(step(0, (4, 2)), broken=1, skipped=True)
    assert (progress.step, progress.broken, progress.skipped) == (2, 3, 1)
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress
    progress.advance(step(1), broken=5, skipped=False)
    assert (progress.step, progress.broken, progress.position) == (3, 0, Position(1))


def test_a_position_counts_for_its_data_and_stage_alone():
    saved = {"step": 9, "position": {"epoch": 2, "taken": [[4, 1]]}, "skipped": 0, "broken": 3}
    there, anew, later = Position(2, ((4, 1),)), Position(0), Position(3)
    for stage, data, first_step, position, said in [
        ({"stage": 1}, "data", 5, there, ""),
        ({"stage": 1}, "data", 9, there, ""),  # the lengths changed: the stage is not new
        ({}, "data", 5, there, ""),  # earlier versions stored no stage
        ({}, "data", 9, anew, ""),
        ({"stage": 0}, "other", 9, anew, ""),
        ({"stage": 1}, "other", 5, later, "The data has changed: a new epoch"),
        ({"stage": 0}, "data", 5, later, "This step is in another stage now: a new epoch"),
        ({"stage": 0}, "other", 5, later, "This step is in another stage now: a new epoch"),
        ({"stage": 2}, "data", 9, later, "This step is in another stage now: a new epoch"),
    ]:
        progress = Progress.from_json(saved | {"data": "data"} | stage)
        now = Stage(1, first_step, "data", 64, 4, 1, 10, 1e-4, "constant", 0)
        assert (progress.enter(now, data, 4) or "").startswith(said)
        assert (progress.data, progress.stage, progress.position) == (data, 1, position)
        assert progress.broken == (3 if position == there else 0)


@pytest.fixture
def run(tmp_path):
    """Trains the models of `two_models_run.py`, and returns the folder of their state."""

    def train(name, source="-", steps=2, processes=1):
        (tmp_path / name).mkdir()
        if processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            two_models_run.main(str(source), tmp_path / name, steps)
            return tmp_path / name
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        script = str(Path(__file__).with_name("two_models_run.py"))
        done = subprocess.run(
            [sys.executable, *launcher, str(processes), script, source, tmp_path / name,
             str(steps)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    return train


def require_same_state(folder, other):
    files = [{f.relative_to(path) for f in path.rglob("*.*")} for path in (folder, other)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.suffix == ".json":
            assert (folder / file).read_text() == (other / file).read_text()
        elif file.stem != "random":
            one, two = load_file(folder / file), load_file(other / file)
            assert one.keys() == two.keys()
            assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_other_models_are_saved_by_name_and_resume_to_the_same_bits(run):
    half = run("half")
    assert sorted(path.name for path in (half / "training").iterdir()) == [
        "average-critic.safetensors", "model-critic.safetensors", "model-student.safetensors",
        "model.safetensors", "optimizer-critic.safetensors", "optimizer-student.safetensors",
        "optimizer.safetensors", "random.safetensors", "state.json",
    ]  # fmt: skip
    require_same_state(run("restored", half, steps=0), half)
    require_same_state(run("resumed", half, steps=2), run("whole", steps=4))


@pytest.mark.slow
def test_other_models_pass_between_one_process_and_two(run):
    two = run("two", processes=2)
    alone = run("alone", two, steps=0)
    for name in ("model", "model-critic", "average-critic", "optimizer-student"):
        one = load_file(alone / f"training/{name}.safetensors")
        other = load_file(two / f"training/{name}.safetensors")
        assert all(torch.equal(one[key], other[key]) for key in other)
    require_same_state(run("resumed", two, processes=2), run("whole", steps=4, processes=2))


def one_model(name="transformer"):
    module = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    model = TrainedModel(module, optimizer, ExponentialMovingAverage(module.named_parameters(), 0))
    return TrainingState({name: model}, None, Metrics(torch.device("cpu")), Progress())


def test_the_files_of_a_single_transformer_keep_their_first_format(tmp_path):
    state = one_model()
    snapshot = state.snapshot(Agreement(Accelerator(cpu=True)), {"seed": 3})
    assert list(snapshot.tensors) == ["model", "optimizer", "random"]
    assert list(snapshot.values) == [
        "progress", "positions", "ema_updates", "optimizer", "scaler", "metrics", "options",
    ]  # fmt: skip
    assert snapshot.averages.keys() == {"weight", "bias"}
    snapshot.write(tmp_path / "training")
    with pytest.raises(ValueError, match="training state of transformer, but this run trains cont"):
        one_model("control").restore(tmp_path / "training", {}, rank=0)
