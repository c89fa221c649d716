import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from torch import nn

from localdit.models import linear
from localdit.models.linear import FeedForward, Linear
from tests.tiny import tiny_components


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of oneDNN's linear layer."""
    if not linear.onednn_is_there():
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


def test_rows_of_a_larger_map_need_not_lie_together(calls):
    layer, x = Linear(24, 20), torch.randn(2, 9, 30)
    part = x[:, 2:7, 3:27]
    with torch.no_grad():
        torch.testing.assert_close(layer(part), F.linear(part, layer.weight, layer.bias))
    assert len(calls) == 1


def test_inference_takes_one_call_of_onednn_for_each_layer(calls):
    ff = FeedForward(16, 0.0, "gelu-approximate").eval()
    with torch.inference_mode():
        ff(torch.randn(1, 4, 16))
    assert [args[3] for args in calls] == ["gelu", "none"]


def test_training_and_whatever_replaces_weights_go_pytorchs_way(calls):
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


@pytest.mark.parametrize("activation", ["gelu-approximate", "gelu", "geglu", "swiglu"])
def test_the_feed_forward_is_that_of_diffusers(activation):
    theirs = DiffusersFeedForward(16, activation_fn=activation)
    ours = FeedForward(16, 0.0, activation)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16)
    for inference in (True, False):
        with torch.inference_mode(inference):
            torch.testing.assert_close(ours(x), theirs(x), atol=2e-6, rtol=1e-5)


def test_the_feed_forward_draws_the_same_weights_from_a_seed():
    made = []
    for cls in (FeedForward, DiffusersFeedForward):
        torch.manual_seed(0)
        made.append(cls(16, dropout=0.0, activation_fn="gelu-approximate").state_dict())
    ours, theirs = made
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_layer_in_place_of_a_projection_is_called():
    """As an adapter, or a quantized layer, is put there."""
    ff, x = FeedForward(16, 0.0, "gelu-approximate"), torch.randn(3, 16)
    with torch.no_grad():
        before = ff(x)
        ff.net[0].proj = nn.Sequential(ff.net[0].proj, nn.Tanh())
        assert not torch.allclose(ff(x), before)


def test_every_linear_layer_of_the_blocks_is_one_of_these():
    blocks = tiny_components(use_global=True)["transformer"].transformer_blocks
    others = {
        name.split(".", 1)[1]
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and type(module) is not Linear
    }
    assert all("query_feat_extract" in name for name in others)
