import torch
from torch.nn.attention import SDPBackend

from benchmarks import attention_kernels
from benchmarks.cases import LOCALDIT, PIXART, Case


def choose(monkeypatch, times, case):
    """Return PixArt's kernels if they take these times and no others run."""
    monkeypatch.setattr(attention_kernels, "_seconds", lambda names, *_, **__: times.get(names[0]))
    return attention_kernels.attention_of(PIXART, case)


def test_the_fastest_kernel_goes_first(monkeypatch):
    times = {"FLASH_ATTENTION": 0.3, "CUDNN_ATTENTION": 0.2, "MATH": 0.9}
    names, choice = choose(monkeypatch, times, Case(pixels=1024, device="cuda"))
    assert names == ["CUDNN_ATTENTION", "FLASH_ATTENTION", "MATH"]
    assert choice.startswith("CUDNN_ATTENTION, the fastest of FLASH_ATTENTION 0.3 s")


def test_the_math_kernel_is_not_timed_on_large_images(monkeypatch):
    times = {"FLASH_ATTENTION": 0.3, "MATH": 0.1}
    assert choose(monkeypatch, times, Case(pixels=1024))[0] == ["MATH"]
    names, choice = choose(monkeypatch, times, Case(pixels=1040))
    assert names == ["FLASH_ATTENTION", "MATH"]
    assert choice == "FLASH_ATTENTION, the only usable one"


def test_kernels_that_the_cpu_lacks_are_detected():
    case = Case(pixels=64)
    assert attention_kernels._seconds(["CUDNN_ATTENTION"], case, 16) is None
    assert attention_kernels._seconds(["FLASH_ATTENTION"], case, 16) > 0


def test_localdit_has_the_kernels_that_it_chooses_itself():
    case = Case(pixels=64, dtype="bfloat16", task="training")
    assert attention_kernels.attention_of(LOCALDIT["local"], case)[0] == []


def test_only_the_named_kernels_are_allowed():
    with attention_kernels.kernels(["MATH"], "cpu"):
        allowed = torch.nn.attention._cur_sdpa_kernel_backends()
    assert allowed == [SDPBackend.MATH]
