import pytest
import torch
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from localdit.models import cpu
from localdit.models.layers import FeedForward, PatchEmbedding, apply_rope, rope_angles
from tests.models.oracle import rotated

# --- rotary positions --------------------------------------------------------------------------


def rotate(x, height, width):
    angles = rope_angles(height, width, x.shape[-1], x.device, x.dtype)
    return apply_rope(x, angles[:, None])  # (B, tokens, heads, d)


def test_pairs_rotate_by_absolute_positions():
    x = torch.randn(2, 5 * 3, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, 5, 3), rotated(x, 5, 3), atol=1e-14, rtol=0)


def test_the_first_token_stays_and_columns_rotate_the_first_half():
    x = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    out = rotate(x, 2, 2)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[:, 1, :, 4:], x[:, 1, :, 4:])  # row 0, column 1
    assert torch.equal(out[:, 2, :, :4], x[:, 2, :, :4])  # row 1, column 0
    assert not torch.equal(out[:, 1, :, :4], x[:, 1, :, :4])


def test_portrait_and_landscape_with_equally_many_tokens_differ():
    x = torch.randn(1, 64 * 48, 1, 8)
    assert not torch.equal(rotate(x, 64, 48), rotate(x, 48, 64))


def test_logits_depend_on_differences_of_positions():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    grid_q = rotate(q.expand(1, 36, 1, 16), 6, 6)[0, :, 0].view(6, 6, 16)
    grid_k = rotate(k.expand(1, 36, 1, 16), 6, 6)[0, :, 0].view(6, 6, 16)
    near = grid_q[1, 2] @ grid_k[3, 1]
    moved = grid_q[3, 4] @ grid_k[5, 3]
    torch.testing.assert_close(near, moved, atol=1e-13, rtol=0)


# --- patch embedding ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (24, 8), (10, 30)])
@pytest.mark.parametrize(("base_size", "scale"), [(8, 1), (5, 2), (64, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_equal_those_of_diffusers(monkeypatch, size, base_size, scale, dtype):
    theirs = PatchEmbed(
        2 * base_size, 2 * base_size, 2, in_channels=4, embed_dim=24, interpolation_scale=scale
    )
    ours = PatchEmbedding(2, 4, 24, base_size, scale)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "proj" in k})
    latents = torch.randn(2, 4, *size).to(dtype)
    theirs.to(dtype).pos_embed.data = theirs.pos_embed.float()
    expected = theirs(latents)
    for at_once in (10_000, 7):
        monkeypatch.setattr(cpu, "BAND_ON_CPU", at_once * 24 * 4)
        with torch.no_grad():
            tokens = ours.to(dtype)(latents)
        assert tokens.is_contiguous()
        torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)


# --- feed-forward ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu-approximate", "gelu", "geglu", "swiglu"])
def test_the_feed_forward_agrees_with_that_of_diffusers(activation):
    theirs = DiffusersFeedForward(16, activation_fn=activation)
    ours = FeedForward(16, 0.0, activation)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16)
    for inference in (True, False):
        with torch.inference_mode(inference):
            torch.testing.assert_close(ours(x), theirs(x), atol=2e-6, rtol=1e-5)


def test_the_feed_forward_has_the_same_weights_as_that_of_diffusers_for_a_seed():
    made = []
    for cls in (FeedForward, DiffusersFeedForward):
        torch.manual_seed(0)
        made.append(cls(16, dropout=0.0, activation_fn="gelu-approximate").state_dict())
    ours, theirs = made
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_layer_that_replaces_a_projection_is_called():
    """Adapters and quantized layers replace it."""
    ff, x = FeedForward(16, 0.0, "gelu-approximate"), torch.randn(3, 16)
    with torch.no_grad():
        before = ff(x)
        ff.net[0].proj = nn.Sequential(ff.net[0].proj, nn.Tanh())
        assert not torch.allclose(ff(x), before)
