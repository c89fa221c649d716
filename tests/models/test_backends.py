from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from localdit.models import (
    FullAttnProcessor,
    LocalAttnProcessor,
    LocalDiTTransformer2DModel,
    LocalGlobalAttnProcessor,
    backends,
)
from localdit.models import window_attention_triton as kernel
from localdit.models.layers import RMSNorm
from localdit.models.window_attention import window_attention
from localdit.models.windows import WindowGrid

GRID = WindowGrid(8, 8, 4)
WHY_NOT_ON_GPU = backends._why_not_on_gpu
WHY_NOT_TRUSTED = backends.why_not_trusted.__wrapped__


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with Triton and a recent GPU; tests remove parts of it."""
    monkeypatch.setattr(backends, "_triton_version", lambda: (3, 7))
    monkeypatch.setattr(backends, "_is_interpreting", lambda: False)
    monkeypatch.setattr(backends, "_why_not_on_gpu", lambda index: None)
    monkeypatch.setattr(backends, "why_not_trusted", lambda *_: None)
    return monkeypatch


def packed(device="cuda", dtype=torch.bfloat16, channels=16 * 72):
    """The properties of packed queries, keys and values that the choice depends on."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 64, 3 * channels))


def chosen(backend, qkv, grid=GRID, heads=16, norms=None, bias=None):
    """Return the name of the chosen backend; neither computes anything."""
    with (
        mock.patch.object(backends, "window_attention", lambda *_: "torch"),
        mock.patch.object(kernel, "window_attention", lambda *_: "triton"),
    ):
        return backends.attend_within_windows(backend, qkv, grid, heads, norms, True, bias)


def test_auto_uses_the_kernel_only_on_a_gpu():
    assert chosen("auto", packed("cuda")) == "triton"
    assert chosen("auto", packed("cpu")) == "torch"
    assert chosen("auto", packed("mps")) == "torch"


def test_auto_does_not_interpret(machine):
    machine.setattr(backends, "_is_interpreting", lambda: True)
    assert chosen("auto", packed("cpu")) == "torch"
    assert chosen("triton", packed("cpu")) == "triton"


def test_the_backend_torch_never_uses_the_kernel():
    assert chosen("torch", packed("cuda")) == "torch"


def test_weights_that_hooks_bring_are_left_to_their_modules():
    there = SimpleNamespace(
        weight=SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    )
    assert chosen("auto", packed(), norms=(there, there)) == "triton"
    for norms, bias in (((there, RMSNorm(72, 1e-10)), None), (None, torch.zeros(49, 16))):
        assert chosen("auto", packed(), norms=norms, bias=bias) == "torch"
        with pytest.raises(ValueError, match="offloading"):
            chosen("triton", packed(), norms=norms, bias=bias)


@pytest.mark.parametrize(
    ("qkv", "window", "reason"),
    [
        (packed("cpu"), 4, "CUDA devices, not on cpu"),
        (packed("mps"), 4, "CUDA devices, not on mps"),
        (packed(dtype=torch.float64), 4, "not in torch.float64"),
        (packed(), 9, "at most 8 tokens a side, not 9"),
        (packed(channels=16 * 7), 4, "even number of channels, at most 128, not 7"),
        (packed(channels=16 * 132), 4, "even number of channels, at most 128, not 132"),
    ],
)
def test_the_limits_of_the_kernel(qkv, window, reason):
    grid = WindowGrid(18, 18, window)
    assert chosen("auto", qkv, grid) == "torch"
    with pytest.raises(ValueError, match=f"{reason}.*set_window_attention_backend..torch"):
        chosen("triton", qkv, grid)


def test_an_old_triton_supports_small_windows(machine):
    machine.setattr(backends, "_triton_version", lambda: (3, 2))
    assert chosen("auto", packed()) == "triton"
    assert chosen("auto", packed(), WindowGrid(8, 8, 8)) == "torch"


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((9, 0), None, None),
        ((8, 0), None, None),
        ((7, 5), None, "compute capability 8.0"),
        ((9, 4), "6.2", "AMD"),
    ],
)
def test_supported_gpus(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    why = WHY_NOT_ON_GPU.__wrapped__(0)
    assert why is None if reason is None else reason in why


def test_without_triton(machine):
    machine.setattr(backends, "_triton_version", lambda: None)
    assert chosen("auto", packed("cuda")) == "torch"
    for choose in (LocalAttnProcessor, LocalGlobalAttnProcessor):
        with pytest.raises(ImportError, match=r"pip install triton.*'torch' or 'auto'"):
            choose("triton")
        assert choose().backend == "auto"


def test_unknown_backends_are_refused():
    for choose in (LocalAttnProcessor, LocalGlobalAttnProcessor):
        with pytest.raises(ValueError, match="'cuda'; choose one of auto, torch, triton"):
            choose(backend="cuda")


def small_model(**kwargs):
    return LocalDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8,
        cross_attention_dim=24, caption_channels=16, **kwargs,
    )  # fmt: skip


def test_a_model_sets_the_backend_of_its_windows():
    model = small_model(use_global=True, layer_types=["local", "local_global"])
    model.set_window_attention_backend("torch")
    assert [block.attn1.processor.backend for block in model.transformer_blocks] == ["torch"] * 2
    with pytest.raises(ValueError, match="'nope'; choose one of auto, torch, triton"):
        model.set_window_attention_backend("nope")
    assert model.transformer_blocks[0].attn1.processor.backend == "torch"

    model.set_attn_processor(FullAttnProcessor())
    model.set_window_attention_backend("triton")  # nothing to set
    assert not hasattr(model.transformer_blocks[0].attn1.processor, "backend")


def test_both_attentions_of_a_layer_with_global_context_use_the_backend(machine):
    calls = []

    def attend(backend, qkv, grid, num_heads, norms, do_rope, bias):
        calls.append((backend, norms is not None, do_rope))
        return window_attention(qkv, grid, num_heads, norms, do_rope, bias)

    machine.setattr("localdit.models.attention.attend_within_windows", attend)
    model = small_model(use_global=True)
    model.set_window_attention_backend("triton")
    attn = model.transformer_blocks[0].attn1
    attn(torch.randn(1, 64, 24), attn.grid(8, 8))
    assert sorted(calls) == [("triton", False, False), ("triton", True, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [2, 4])
def test_a_kernel_that_agrees_is_trusted_without_using_the_global_generator(machine, dtype, window):
    machine.setattr(kernel, "window_attention", lambda *arguments: window_attention(*arguments) * 1)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert WHY_NOT_TRUSTED(torch.device("cpu"), dtype, window, 2, 12) is None
    assert torch.equal(torch.get_rng_state(), state)


def values_off(qkv, *others):
    out = window_attention(qkv, *others)
    return out * torch.linspace(1, 1.5, out.shape[1])[:, None]


def gradients_off(qkv, *others):
    return window_attention(qkv * 1.2 - 0.2 * qkv.detach(), *others)


def not_numbers(*arguments):
    return window_attention(*arguments) * float("nan")


def no_kernel(*arguments):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (values_off, "largest value off"),
        (gradients_off, "largest value off"),
        (not_numbers, "largest value off"),
        (no_kernel, "no kernel image"),
    ],
)
def test_a_wrong_kernel_is_not_trusted_and_gives_a_warning(machine, broken, reason):
    machine.setattr(kernel, "window_attention", broken)
    with pytest.warns(RuntimeWarning, match=reason):
        assert reason in WHY_NOT_TRUSTED(torch.device("cpu"), torch.float32, 4, 2, 12)


def test_auto_does_not_use_an_untrusted_kernel(machine):
    machine.setattr(backends, "why_not_trusted", lambda *_: "it errs")
    assert chosen("auto", packed("cuda")) == "torch"
    assert chosen("triton", packed("cuda")) == "triton"
