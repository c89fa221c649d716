import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from localdit.models.attention import (
    CrossAttention,
    FullAttnProcessor,
    LocalAttnProcessor,
    LocalDiTAttention,
    LocalGlobalAttnProcessor,
    LocalPooledAttnProcessor,
)
from tests.models.oracle import normed, rotated, self_attention, visible_tokens, window_bias


def make(window=4, shift=0, kind="local", heads=2, head_dim=12, do_rope=True, seed=0):
    """An attention with random weights: zeros would hide missing terms."""
    torch.manual_seed(seed)
    attn = LocalDiTAttention(heads, head_dim, window, shift, kind, do_rope)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attn.double()


@st.composite
def cases(draw, kinds=("local",)):
    window = draw(st.sampled_from([2, 4, 8]))
    return {
        "window": window,
        "shift": draw(st.integers(0, window - 1)),
        "kind": draw(st.sampled_from(kinds)),
        "do_rope": draw(st.booleans()),
        "size": (draw(st.integers(1, 13)), draw(st.integers(1, 13))),
        "seed": draw(st.integers(0, 999)),
    }


def outputs_and_gradients(function, attn, x):
    x = x.clone().requires_grad_()
    out = function(x)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    inputs = [x, *attn.parameters()]
    return out, torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)


def check_against_oracle(case):
    size, kind = case["size"], case["kind"]
    attn = make(case["window"], case["shift"], kind, do_rope=case["do_rope"], seed=case["seed"])
    x = torch.randn(2, size[0] * size[1], 24, dtype=torch.float64)
    ours, our_grads = outputs_and_gradients(lambda x: attn(x, attn.grid(*size)), attn, x)
    true, true_grads = outputs_and_gradients(
        lambda x: self_attention(attn, x, *size, kind), attn, x
    )
    torch.testing.assert_close(ours, true, atol=1e-12, rtol=1e-12)
    for ours_i, true_i in zip(our_grads, true_grads, strict=True):
        scale = true_i.abs().max().clamp(min=1)
        torch.testing.assert_close(ours_i / scale, true_i / scale, atol=1e-12, rtol=0)


@settings(max_examples=60)
@given(cases())
def test_local_agrees_with_dense_attention(case):
    check_against_oracle(case)


@settings(max_examples=40)
@given(cases(kinds=("local_pooled", "local_global", "full")))
def test_other_layer_types_agree_with_dense_attention(case):
    check_against_oracle(case)


@pytest.mark.parametrize(("window", "shift"), [(w, s) for w in (2, 4, 8) for s in range(w)])
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (9, 5), (1, 3)])
def test_every_window_and_shift(window, shift, size):
    case = {"window": window, "shift": shift, "kind": "local", "do_rope": True}
    check_against_oracle({**case, "size": size, "seed": 0})


@pytest.mark.parametrize("size", [(16, 16), (13, 10)])
@pytest.mark.parametrize("shift", [0, 3])
def test_bfloat16_is_as_exact_as_pytorch(size, shift):
    attn = make(shift=shift, head_dim=72)
    qkv = torch.randn(2, size[0] * size[1], 3 * 144).bfloat16()
    q, k, v = qkv.double().unflatten(-1, (3, 2, 72)).unbind(2)
    q = rotated(normed(q, attn.norm_q.weight, attn.norm_q.eps), *size)
    k = rotated(normed(k, attn.norm_k.weight, attn.norm_k.eps), *size)
    bias = window_bias(attn, attn.local_rel_pos_bias, size)

    def sdpa(*tensors):
        *qkv, mask = tensors
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), mask).transpose(
            1, 2
        )

    exact = sdpa(q, k, v, bias)
    pytorch = sdpa(*(x.bfloat16() for x in (q, k, v, bias)))
    ours = attn.bfloat16().processor(attn, qkv, attn.grid(*size)).view_as(exact)
    ours_error, pytorch_error = ((x.double() - exact).abs() for x in (ours, pytorch))
    assert ours_error.square().mean().sqrt() <= 2 * pytorch_error.square().mean().sqrt()
    assert ours_error.max() <= 2 * pytorch_error.max()


@pytest.mark.parametrize("size", [(8, 8), (10, 7)])
@pytest.mark.parametrize("shift", range(4))
def test_a_token_changes_nothing_outside_its_window(size, shift):
    attn = make(shift=shift).float()
    x = torch.randn(1, size[0] * size[1], 24)
    token = 3 * size[1] + 2
    changed = x.clone()
    changed[:, token] += 10.0
    difference = (attn(changed, attn.grid(*size)) - attn(x, attn.grid(*size))).abs().amax(-1)[0]
    visible = visible_tokens(*size, 4, shift)[0][token]
    assert (difference[~visible] == 0).all()
    assert (difference[visible] > 0).all()


def test_padding_is_masked_out_of_the_softmax():
    # 5 x 4 tokens: the second window has one row of tokens and three of padding.
    attn = make()
    attn.norm_k.weight.data.zero_()  # all logits equal: each token averages what it sees
    attn.local_rel_pos_bias.data.zero_()
    attn.to_qkv.bias.data.zero_()
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    last_row = attn.processor(attn, attn.to_qkv(x), attn.grid(5, 4))[:, 16:]
    values = attn.to_qkv(x)[:, 16:, 48:]
    torch.testing.assert_close(last_row, values.mean(1, keepdim=True).expand_as(values))


def test_a_tile_counts_as_one_token_and_its_parts_as_less():
    # 5 x 4 tokens: a tile of 16 and one of 4. All logits are equal.
    attn = make(kind="local_pooled")
    attn.norm_k.weight.data.zero_()
    attn.local_rel_pos_bias.data.zero_()
    qkv = attn.to_qkv(torch.randn(1, 20, 24, dtype=torch.float64))
    values = qkv[:, :, 48:]
    expected = (values[:, 16:].sum(1) + values.sum(1) / 16) / (4 + 20 / 16)
    last_row = attn.processor(attn, qkv, attn.grid(5, 4))[:, 16:]
    torch.testing.assert_close(last_row, expected[:, None].expand_as(last_row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooled_keys_are_as_exact_as_full_attention(dtype):
    attn = make(shift=1, head_dim=72, kind="local_pooled")
    qkv = torch.randn(2, 130, 3 * 144).to(dtype)
    errors = []
    for processor in (LocalPooledAttnProcessor(), FullAttnProcessor()):
        exact = processor(attn.double(), qkv.double(), attn.grid(13, 10))
        rounded = processor(attn.to(dtype), qkv, attn.grid(13, 10))
        assert rounded.dtype == dtype
        errors.append((rounded.double() - exact).square().mean().sqrt() / exact.std())
    assert errors[0] <= 2 * errors[1]


def test_a_training_step_with_pooled_keys_repeats_to_the_bit():
    attn = make(shift=1, kind="local_pooled").float()
    x = torch.randn(2, 9 * 13, 24)
    runs = [outputs_and_gradients(lambda x: attn(x, attn.grid(9, 13)), attn, x) for _ in range(2)]
    (out, gradients), (again, repeated) = runs
    assert torch.equal(out, again)
    assert all(map(torch.equal, gradients, repeated))


def test_processors_swap_and_weights_stay():
    attn = make(kind="local_global")
    x = torch.randn(1, 64, 24, dtype=torch.float64)
    before, names = attn(x, attn.grid(8, 8)), list(attn.state_dict())
    for processor, kind in ((LocalAttnProcessor(), "local"), (FullAttnProcessor(), "full")):
        attn.set_processor(processor)
        torch.testing.assert_close(attn(x, attn.grid(8, 8)), self_attention(attn, x, 8, 8, kind))
    attn.set_processor(LocalGlobalAttnProcessor())
    assert torch.equal(attn(x, attn.grid(8, 8)), before)
    assert list(attn.state_dict()) == names


def test_global_context_needs_its_weights():
    attn = make(kind="local")
    with pytest.raises(ValueError, match="use_global=True"):
        attn.set_processor(LocalGlobalAttnProcessor())
    assert isinstance(attn.processor, LocalAttnProcessor)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="attention_head_dim.*10.*multiple of 4"):
        LocalDiTAttention(2, 10, 4)
    LocalDiTAttention(2, 10, 4, do_rope=False)
    with pytest.raises(ValueError, match="'windowed' is not one of local"):
        LocalDiTAttention(2, 8, 4, layer_type="windowed")


def test_cross_attention_agrees_with_its_formula():
    torch.manual_seed(0)
    attn = CrossAttention(2, 12, 24)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    attn = attn.double()
    x, text = torch.randn(2, 9, 24).double(), torch.randn(2, 5, 24).double()
    bias = torch.tensor([[0.0, 0, -10000, 0, 0], [0, 0, 0, 0, -10000]]).double()[:, None]
    q, k, v = (
        (y @ layer.weight.T + layer.bias).unflatten(-1, (2, 12))
        for y, layer in ((x, attn.to_q), (text, attn.to_k), (text, attn.to_v))
    )
    q = normed(q, attn.norm_q.weight, attn.norm_q.eps)
    k = normed(k, attn.norm_k.weight, attn.norm_k.eps)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / 12**0.5 + bias[:, None]
    out = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).flatten(2)
    out = out @ attn.to_out[0].weight.T + attn.to_out[0].bias
    torch.testing.assert_close(attn(x, *attn.keys_and_values(text), bias), out, atol=1e-12, rtol=0)
