import torch

from localdit.models.rope import apply_rope, rope_angles
from tests.models.oracle import turned


def rotate(x, height, width):
    angles = rope_angles(height, width, x.shape[-1], x.device, x.dtype)
    return apply_rope(x, angles[:, None])  # (B, tokens, heads, d)


def test_turns_pairs_by_absolute_positions():
    x = torch.randn(2, 5 * 3, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, 5, 3), turned(x, 5, 3), atol=1e-14, rtol=0)


def test_the_first_token_stays_and_columns_turn_the_first_half():
    x = torch.randn(1, 4, 1, 8, dtype=torch.float64)
    out = rotate(x, 2, 2)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[:, 1, :, 4:], x[:, 1, :, 4:])  # row 0, column 1
    assert torch.equal(out[:, 2, :, :4], x[:, 2, :, :4])  # row 1, column 0
    assert not torch.equal(out[:, 1, :, :4], x[:, 1, :, :4])


def test_portrait_and_landscape_of_as_many_tokens_differ():
    x = torch.randn(1, 64 * 48, 1, 8)
    assert not torch.equal(rotate(x, 64, 48), rotate(x, 48, 64))


def test_logits_depend_on_differences_of_positions():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    grid_q = rotate(q.expand(1, 36, 1, 16), 6, 6)[0, :, 0].view(6, 6, 16)
    grid_k = rotate(k.expand(1, 36, 1, 16), 6, 6)[0, :, 0].view(6, 6, 16)
    near = grid_q[1, 2] @ grid_k[3, 1]
    moved = grid_q[3, 4] @ grid_k[5, 3]
    torch.testing.assert_close(near, moved, atol=1e-13, rtol=0)
