import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.cases import LOCALDIT, PIXART, Case
from benchmarks.runs import make_model, weight_bytes
from benchmarks.worker import encode, in_own_process

CASE = Case(pixels=128, layers=1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


@linux
def test_the_peak_counts_from_its_reset():
    held = torch.ones(2**26)  # 256 MiB, before
    del held
    peak_memory.give_back_unused()
    before = peak_memory.resident_bytes()
    peak_memory.reset_peak()
    assert peak_memory.peak_bytes() - before < 2**24
    passing = torch.ones(2**25)  # 128 MiB
    del passing
    assert peak_memory.peak_bytes() - before == pytest.approx(2**27, rel=0.1)


@linux
@pytest.mark.slow
def test_a_child_process_does_not_count_its_parents_memory():
    held = torch.ones(2**28)  # 1 GiB, with which a child's `ru_maxrss` would start
    found = in_own_process(
        "worker:memory", case=encode(CASE), denoiser=PIXART.name, layers=1, attention=[]
    )
    del held
    assert found["weights"] == weight_bytes(make_model(PIXART, 1, CASE))
    assert 2**20 < found["beside"] < 2**28


@linux
@pytest.mark.slow
def test_training_holds_gradients_and_optimizer_state():
    case = replace(CASE, pixels=64, task="training")
    found = peak_memory.measure_memory(case, LOCALDIT["local"], 1, [])
    parameters = found["weights"]  # and the position embedding
    assert 2.9 * parameters < found["beside"] < 4.5 * parameters


def test_without_proc_the_peak_since_the_start_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path / "none/either")
    peak_memory.reset_peak()
    assert peak_memory.peak_bytes() == peak_memory.resident_bytes() > 2**20
