import json
import time

import pytest
import torch

from localdit.training import metrics
from localdit.training.metrics import Metrics, Stopwatch, peak_flops

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_line_has_means_pace_and_shares(clock):
    found = Metrics(CPU, num_devices=2, peak=1e12)
    for loss in (1.0, 3.0):
        with found.watch("data"):
            clock.wait(1)
        with found.watch("compute"):
            clock.wait(2)
        clock.wait(1)  # saving, say
        found.add(loss, grad_norm=loss / 2, learning_rate=loss / 100, images=8, flops=2 * 10**12)
    assert found.line(20) == {
        "step": 20,
        "loss": 2.0,
        "grad_norm": 1.0,
        "learning_rate": 0.03,
        "images_per_second": 2.0,
        "data_share": 0.25,
        "encoding_share": 0.0,
        "compute_share": 0.5,
        "tflops": 0.25,
        "mfu": 0.25,
    }
    clock.wait(1)
    found.add(5.0, 0.0, 0.1, images=8)
    line = found.line(21)
    assert (line["loss"], line["images_per_second"], line["compute_share"]) == (5.0, 8.0, 0.0)
    assert "tflops" not in line


def test_skipped_steps_are_counted_and_have_no_loss(clock):
    found = Metrics(CPU)
    found.skip()
    clock.wait(1)
    line = found.line(1)
    assert line["skipped_steps"] == 1
    assert not {"loss", "grad_norm", "learning_rate"} & line.keys()
    found.skip()
    again = Metrics(CPU)
    again.load_state_dict(json.loads(json.dumps(found.state_dict())))
    again.add(3.0, 1.0, 0.1, images=1)
    clock.wait(1)
    line = again.line(3)
    assert (line["loss"], line["skipped_steps"]) == (3.0, 1)
    again.add(3.0, 1.0, 0.1, images=1)
    clock.wait(1)
    assert "skipped_steps" not in again.line(4)


def test_utilisation_is_left_out_if_the_peak_is_unknown(clock):
    found = Metrics(CPU)
    clock.wait(1)
    found.add(1.0, 1.0, 0.1, images=1, flops=10**12)
    line = found.line(1)
    assert line["tflops"] == 1.0
    assert "mfu" not in line


def test_an_interrupted_run_logs_the_same_line(clock):
    losses = torch.rand(7, generator=torch.Generator().manual_seed(0)).tolist()
    whole, before = Metrics(CPU), Metrics(CPU)
    for step, loss in enumerate(losses):
        whole.add(loss, loss * 3, 0.1 * step, images=4)
    for step, loss in enumerate(losses[:3]):
        before.add(loss, loss * 3, 0.1 * step, images=4)
    after = Metrics(CPU)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step, loss in enumerate(losses[3:], start=3):
        after.add(loss, loss * 3, 0.1 * step, images=4)
    clock.wait(2)
    expected, found = whole.line(7), after.line(7)
    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert found[name] == expected[name], name
    # The clock saw only the four steps since.
    assert found["images_per_second"] == 8.0


def test_a_saved_state_does_not_change(clock):
    found = Metrics(CPU)
    found.add(1.0, 1.0, 0.1, images=1)
    state = found.state_dict()
    found.add(9.0, 9.0, 0.1, images=1)
    assert state["sums"] == {"loss": 1.0, "grad_norm": 1.0}


def test_stopwatch_adds_up_real_time():
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch("data"):
            time.sleep(0.02)
    with watch("compute"):
        pass
    seconds = watch.collect()
    assert 0.04 <= seconds["data"] < 1
    assert 0 <= seconds["compute"] < 0.02
    assert watch.collect() == {}


class Event:
    """A CUDA event on a device whose queue moves with a clock of its own."""

    queue = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.queue

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1000


def test_on_cuda_the_stopwatch_measures_the_device(monkeypatch, clock):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    with watch("data"):
        clock.wait(5)
        Event.queue += 1  # it had work left for four of the five seconds
    with watch("compute"):
        Event.queue += 3
    assert watch.collect() == {"data": 1.0, "compute": 3.0}
    assert watch.collect() == {}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5e12),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2e12),
        ("NVIDIA L40S", torch.float32, 91.6e12),
        ("NVIDIA H200", torch.float64, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
    ],
)
def test_peaks_are_known_for_whole_devices_only(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda:0"), dtype) == peak


def test_no_peak_is_claimed_without_cuda_or_in_tensorfloat32(monkeypatch):
    assert peak_flops(CPU, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), torch.float32) is None
