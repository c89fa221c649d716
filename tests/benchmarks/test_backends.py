import torch
from torch.nn.attention import SDPBackend

from benchmarks import backends
from benchmarks.cases import LOCALDIT, PIXART, Case


def choose(monkeypatch, times, case):
    """What PixArt gets where its kernels take these seconds; the others do not run."""
    monkeypatch.setattr(backends, "_seconds", lambda names, *_, **__: times.get(names[0]))
    return backends.attention_of(PIXART, case)


def test_the_fastest_kernel_goes_first(monkeypatch):
    times = {"FLASH_ATTENTION": 0.3, "CUDNN_ATTENTION": 0.2, "MATH": 0.9}
    names, choice = choose(monkeypatch, times, Case(pixels=1024, device="cuda"))
    assert names == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH"]
    assert choice.startswith("CUDNN_ATTENTION, the fastest of FLASH_ATTENTION 0.3 s")


def test_plain_products_are_not_tried_on_large_pictures(monkeypatch):
    times = {"FLASH_ATTENTION": 0.3, "MATH": 0.1}
    assert choose(monkeypatch, times, Case(pixels=1024))[0] == ["MATH"]
    names, choice = choose(monkeypatch, times, Case(pixels=1040))
    assert names == ["FLASH_ATTENTION", "MATH"]
    assert choice == "FLASH_ATTENTION, the only usable one"


def test_kernels_that_the_cpu_lacks_are_found_out():
    case = Case(pixels=64)
    assert backends._seconds(["CUDNN_ATTENTION"], case, 16) is None
    assert backends._seconds(["FLASH_ATTENTION"], case, 16) > 0


def test_localdit_trains_on_the_kernels_that_train_py_chooses():
    mixed = Case(pixels=64, dtype="bfloat16", task="training")
    assert backends.attention_of(LOCALDIT["local"], mixed)[0] == ["MATH"]
    assert backends.attention_of(LOCALDIT["local"], Case(pixels=64))[0] == []


def test_kernels_are_those_that_are_named():
    with backends.kernels(["MATH"], "cpu"):
        allowed = torch.nn.attention._cur_sdpa_kernel_backends()
    assert allowed == [SDPBackend.MATH]
