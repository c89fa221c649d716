"""Linear layers by oneDNN, and computing in bands."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from localdit.models import cpu
from localdit.models.cpu import Linear, bands, write_band
from localdit.models.layers import FeedForward
from localdit.models.windows import WindowGrid
from tests.models.test_transformer import inputs, make, run
from tests.tiny import tiny_components

# --- bands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [{}, {"use_global": True}, {"layer_types": "local_pooled"}], ids=str
)
@pytest.mark.parametrize("size", [(16, 16), (26, 14)])  # the second is padded: 13 x 7 tokens
def test_a_model_in_bands_gives_the_result_of_the_whole_map(monkeypatch, size, kind):
    model = make(**kind, num_layers=4)
    whole = run(model, **inputs(*size))
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 60 * 24 * 4)
    in_parts = run(model, **inputs(*size))
    torch.testing.assert_close(in_parts, whole, atol=2e-6, rtol=0)


def test_a_block_in_bands_leaves_its_input_as_it_is(monkeypatch):
    model, seen = make(num_layers=4), []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0].clone())))
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 60 * 24 * 4)
    run(model, **inputs(16, 16))
    assert len(seen) == 4
    assert all(torch.equal(given, before) for given, before in seen)


def heights_of_bands(grid, like):
    heights, out = [], None
    for tokens, band in bands(grid, like):
        heights.append(band.height)
        out = write_band(out, like[:, tokens] + 1, tokens, grid)
    assert torch.equal(out, like + 1)
    return heights


def test_the_maps_of_a_batch_share_the_tokens_of_a_band(monkeypatch):
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 64 * 3 * 4)
    grid = WindowGrid(16, 8, 4)
    with torch.no_grad():
        assert heights_of_bands(grid, torch.randn(1, 128, 3)) == [8, 8]
        assert heights_of_bands(grid, torch.randn(2, 128, 3)) == [4, 4, 4, 4]
        assert heights_of_bands(grid, torch.randn(99, 128, 3)) == [4, 4, 4, 4]


def test_a_band_has_more_tokens_where_they_are_smaller(monkeypatch):
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 64 * 6 * 4)
    grid = WindowGrid(32, 8, 4)
    with torch.no_grad():
        assert heights_of_bands(grid, torch.randn(1, 256, 6)) == [8] * 4
        assert heights_of_bands(grid, torch.randn(1, 256, 3)) == [16] * 2
        assert heights_of_bands(grid, torch.randn(1, 256, 6).bfloat16()) == [16] * 2


def test_training_computes_the_whole_map_at_once(monkeypatch):
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 64 * 3 * 4)
    assert heights_of_bands(WindowGrid(16, 8, 4), torch.randn(1, 128, 3)) == [16]


def test_a_band_is_written_into_the_given_tensor():
    grid, given, part = WindowGrid(8, 4, 4), torch.zeros(1, 32, 3), torch.ones(1, 16, 3)
    assert write_band(given, part, slice(16, 32), grid) is given
    assert given[:, 16:].all() and not given[:, :16].any()


# --- linear layers -----------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """A list of the arguments of each call of oneDNN's linear layer."""
    if not cpu.onednn_is_available():
        pytest.skip("this PyTorch has no oneDNN beside MKL")
    real, made = torch.ops.mkldnn._linear_pointwise, []

    def counted(*args):
        made.append(args)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return made


def rounding(dtype):
    return {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 40, 24), (2, 7, 24), (24,), (0, 24)])
def test_inference_agrees_with_float64(shape, dtype, gelu):
    layer, x = Linear(24, 20).to(dtype), torch.randn(shape, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    expected = F.gelu(expected, approximate="tanh") if gelu else expected
    with torch.no_grad():
        result = layer(x, gelu=gelu)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), expected, atol=rounding(dtype), rtol=rounding(dtype)
    )


def test_inputs_need_not_be_contiguous(calls):
    layer, x = Linear(24, 20), torch.randn(2, 9, 30)
    part = x[:, 2:7, 3:27]
    with torch.no_grad():
        torch.testing.assert_close(layer(part), F.linear(part, layer.weight, layer.bias))
    assert len(calls) == 1


def test_inference_calls_onednn_once_per_layer(calls):
    ff = FeedForward(16, 0.0, "gelu-approximate").eval()
    with torch.inference_mode():
        ff(torch.randn(1, 4, 16))
    assert [args[3] for args in calls] == ["gelu", "none"]


def test_training_autocast_and_other_dtypes_use_pytorch(calls):
    layer, x = Linear(24, 20), torch.randn(4, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(x.double())
    layer.weight = nn.Parameter(torch.randn(20, 24).to(torch.float16))
    with torch.no_grad():
        layer.half()(x.half())
    assert not calls


@pytest.mark.parametrize("gelu", [False, True])
def test_bfloat16_is_computed_in_float32_on_processors_without_it(calls, monkeypatch, gelu):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(cpu, "WIDENED", 24 * 6)  # 7 of 20 rows at a time
    layer, x = Linear(24, 20).bfloat16(), torch.randn(2, 4, 24).bfloat16()
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    with torch.no_grad():
        result = layer(x, gelu=gelu)
        once_rounded = exact.bfloat16()
    assert [args[1].shape[0] for args in calls] == [7, 7, 6]
    assert all(tensor.dtype == torch.float32 for args in calls for tensor in args[:3])
    assert result.dtype == torch.bfloat16
    # One rounding: half of the distance between neighbours, which is up to 2**-7 of a value.
    torch.testing.assert_close(result.double(), exact, atol=1e-6, rtol=2**-8 + 1e-6)
    assert (result == once_rounded).float().mean() > 0.99


def test_a_layer_without_bias_is_computed_in_float32_as_well(calls, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    layer, x = Linear(24, 20, bias=False).bfloat16(), torch.randn(4, 24).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))
    assert len(calls) == 1


def test_every_linear_layer_of_the_blocks_can_use_onednn():
    blocks = tiny_components(use_global=True)["transformer"].transformer_blocks
    others = {
        name.split(".", 1)[1]
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not Linear
    }
    assert all("query_feat_extract" in name for name in others)


def test_caches_of_primitives_are_small_unless_their_variables_are_set():
    program = (
        f"import localdit.models, os; print(*[os.environ[name] for name in {[*cpu.PRIMITIVES]}])"
    )
    for given, expected in (
        ({}, [*cpu.PRIMITIVES.values()]),
        ({"LRU_CACHE_CAPACITY": "7"}, ["7", "32"]),
    ):
        environment = {k: v for k, v in os.environ.items() if k not in cpu.PRIMITIVES} | given
        printed = subprocess.check_output(
            [sys.executable, "-c", program], env=environment, text=True
        )
        assert printed.split() == expected


def attended(attend, dtype):
    """Return the result of attention to 5 keys, 2 of them masked, and the gradients."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, tokens, 3, 8).to(dtype).requires_grad_() for tokens in (7, 5, 5)]
    bias = torch.zeros(2, 1, 1, 5, dtype=dtype)
    bias[1, ..., 3:] = -10_000
    out = attend(*tensors, bias)
    out.square().sum().backward()
    return [one.double() for one in (out, *(tensor.grad for tensor in tensors))]


def fused(query, key, value, bias):
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_explicit_attention_agrees_with_float64(dtype, error):
    wanted = attended(fused, torch.float64)
    for found, true in zip(attended(cpu.attention, dtype), wanted, strict=True):
        assert (found - true).norm() <= error * true.norm()


def test_attention_is_explicit_in_bfloat16_training_with_few_keys_only(monkeypatch):
    monkeypatch.setattr(cpu, "MOST_KEYS", 5)
    query, few, many = (torch.randn(1, tokens, 1, 8, requires_grad=True) for tokens in (9, 5, 6))
    bfloat16 = query.bfloat16()
    assert cpu.trains_faster_explicitly(bfloat16, few.bfloat16())
    assert not cpu.trains_faster_explicitly(bfloat16, many.bfloat16())
    assert not cpu.trains_faster_explicitly(query, few)
    assert not cpu.trains_faster_explicitly(bfloat16.detach(), few.bfloat16())
    with torch.no_grad():
        assert not cpu.trains_faster_explicitly(bfloat16, few.bfloat16())
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not cpu.trains_faster_explicitly(bfloat16, few.bfloat16())


def test_training_in_bfloat16_uses_explicit_attention_unless_a_backend_is_chosen(monkeypatch):
    calls = []
    explicit = cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda *args: calls.append(1) or explicit(*args))
    model = make().train()
    for backend, expected in ((None, True), ("native", False)):
        if backend:
            model.set_attention_backend(backend)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs()).sample.float().mean().backward()
        assert bool(calls) == expected
