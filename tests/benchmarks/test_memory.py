import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import memory
from benchmarks.cases import LOCALDIT, PIXART, Case, make_model, weight_bytes
from benchmarks.worker import encode, in_own_process

CASE = Case(pixels=128, layers=1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@linux
def test_a_peak_is_what_was_held_since_it_was_reset():
    held = torch.ones(2**26)  # 256 MiB, before
    del held
    memory.give_back_unused()
    before = memory.resident_bytes()
    memory.reset_peak()
    assert memory.peak_bytes() - before < 2**24
    passing = torch.ones(2**25)  # 128 MiB
    del passing
    assert memory.peak_bytes() - before == pytest.approx(2**27, rel=0.1)


@linux
@pytest.mark.slow
def test_a_child_does_not_count_the_memory_of_its_parent():
    held = torch.ones(2**28)  # 1 GiB, which a child would begin with in `ru_maxrss`
    found = in_own_process(
        "worker:memory", case=encode(CASE), denoiser=PIXART.name, layers=1, attention=[]
    )
    del held
    assert found["weights"] == weight_bytes(make_model(PIXART, 1, CASE))
    assert 2**20 < found["beside"] < 2**28


@linux
@pytest.mark.slow
def test_training_holds_gradients_and_the_state_of_the_optimizer():
    case = replace(CASE, pixels=64, task="training")
    found = memory.measure_memory(case, LOCALDIT["local"], 1, [])
    parameters = found["weights"]  # with a few positions
    assert 2.9 * parameters < found["beside"] < 4.5 * parameters


def test_where_there_is_no_proc_the_highest_peak_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none/either")
    memory.reset_peak()
    assert memory.peak_bytes() == memory.resident_bytes() > 2**20
