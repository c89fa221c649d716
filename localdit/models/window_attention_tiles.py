"""What the Triton kernels of attention within windows share: tiles of a map, read and written.

A tile is the `SLOTS` places of a window, or of several windows one after the other where a window
is smaller than the 16 rows that a matrix product takes. Padding, roll and partition of the map are
arithmetic on addresses: rows are read and written where they lie.

Channels 2 p and 2 p + 1 of queries and keys, which RoPE turns together, are read as one word of
twice the width and parted in registers. So reads are contiguous and no channel changes its lane;
the product of queries and keys is that of their even channels plus that of their odd ones.

Arguments in capitals are compiled in: `HEADS`, heads; `PAIRS`, pairs of channels of a head, and
`BLOCK`, the power of two that they are padded to; `WINDOW`, side of a window; `HALF`, dtype of a
channel; `FACTOR`, dtype in which queries and keys are multiplied. Pointers to what there is none of
are None.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(tile, height, width, row_shift, column_shift, WINDOW: tl.constexpr, SLOTS: tl.constexpr):
    """Tokens in the slots of a tile, their regions, and their places within the window.

    Slots see each other where their regions are equal: in one window, and on the same side of the
    seams of the roll. Slots without a token have region -1: they see one another, so that no row of
    a softmax is empty.
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    FILLED: tl.constexpr = SLOTS // AREA * AREA
    slot = tl.arange(0, SLOTS)
    within = slot % AREA
    window = tile * (SLOTS // AREA) + slot // AREA
    rows, columns = tl.cdiv(height, WINDOW), tl.cdiv(width, WINDOW)
    y = window // columns * WINDOW + within // WINDOW + row_shift
    x = window % columns * WINDOW + within % WINDOW + column_shift
    row_wraps, column_wraps = y >= rows * WINDOW, x >= columns * WINDOW
    y = tl.where(row_wraps, y - rows * WINDOW, y)
    x = tl.where(column_wraps, x - columns * WINDOW, x)
    is_token = (slot < FILLED) & (window < rows * columns) & (y < height) & (x < width)
    region = window * 4 + row_wraps.to(tl.int32) * 2 + column_wraps.to(tl.int32)
    return y * width + x, tl.where(is_token, region, -1), within


@triton.jit
def read_pairs(rows, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr):
    """Even and odd channels of rows of words, `(SLOTS, BLOCK)` each, float32; padded by zeros."""
    pair = tl.arange(0, BLOCK)
    there = is_token[:, None] & (pair < PAIRS)[None, :]
    word = tl.load(rows[:, None] + pair[None, :], mask=there, other=0)
    BITS: tl.constexpr = 32 if HALF == tl.float32 else 16
    INTEGER: tl.constexpr = tl.int32 if HALF == tl.float32 else tl.int16
    even = word.to(INTEGER).to(HALF, bitcast=True)
    odd = (word >> BITS).to(INTEGER).to(HALF, bitcast=True)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def write_pairs(
    rows, even, odd, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """Write what `read_pairs` reads."""
    pair = tl.arange(0, BLOCK)
    there = is_token[:, None] & (pair < PAIRS)[None, :]
    BITS: tl.constexpr = 32 if HALF == tl.float32 else 16
    INTEGER: tl.constexpr = tl.uint32 if HALF == tl.float32 else tl.uint16
    WORD: tl.constexpr = tl.uint64 if HALF == tl.float32 else tl.uint32
    low = even.to(HALF).to(INTEGER, bitcast=True).to(WORD)
    high = odd.to(HALF).to(INTEGER, bitcast=True).to(WORD)
    word = (low | (high << BITS)).to(rows.dtype.element_ty, bitcast=True)
    tl.store(rows[:, None] + pair[None, :], word, mask=there)


@triton.jit
def read(rows, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels in their own order, `(SLOTS, 2 * BLOCK)`; padded by zeros."""
    channel = tl.arange(0, 2 * BLOCK)
    there = is_token[:, None] & (channel < 2 * PAIRS)[None, :]
    return tl.load(rows[:, None] + channel[None, :], mask=there, other=0)


@triton.jit
def write(rows, values, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Write what `read` reads."""
    channel = tl.arange(0, 2 * BLOCK)
    there = is_token[:, None] & (channel < 2 * PAIRS)[None, :]
    tl.store(rows[:, None] + channel[None, :], values.to(rows.dtype.element_ty), mask=there)


@triton.jit
def read_weight(weight, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Even and odd channels of a norm's weight, `(1, BLOCK)` each, float32."""
    pair = tl.arange(0, BLOCK)
    even = tl.load(weight + 2 * pair, mask=pair < PAIRS, other=0).to(tl.float32)
    odd = tl.load(weight + 2 * pair + 1, mask=pair < PAIRS, other=0).to(tl.float32)
    return even[None, :], odd[None, :]


@triton.jit
def read_rotation(rotation, within, WINDOW: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine, `(SLOTS, BLOCK)` each, of the angle of each pair at each place."""
    pair = tl.arange(0, BLOCK)
    at = within[:, None] * PAIRS + pair[None, :]
    there = (pair < PAIRS)[None, :]
    cos = tl.load(rotation + at, mask=there, other=0)
    sin = tl.load(rotation + WINDOW * WINDOW * PAIRS + at, mask=there, other=0)
    return cos, sin


@triton.jit
def inverse_root_mean_square(even, odd, eps, PAIRS: tl.constexpr):
    """`1 / sqrt(mean(x**2) + eps)` of each row, `(SLOTS, 1)`."""
    mean_square = tl.sum(even * even + odd * odd, axis=1) / (2 * PAIRS)
    return tl.rsqrt(mean_square + eps)[:, None]


@triton.jit
def read_normed_and_turned(
    rows, is_token, within, weight, eps, rotation, WINDOW: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Even and odd channels of queries or keys after RMSNorm and RoPE, computed in float32."""
    even, odd = read_pairs(rows, is_token, PAIRS, BLOCK, HALF)
    if weight is not None:
        scale = inverse_root_mean_square(even, odd, eps, PAIRS)
        weight_even, weight_odd = read_weight(weight, PAIRS, BLOCK)
        even, odd = even * scale * weight_even, odd * scale * weight_odd
    if rotation is not None:
        cos, sin = read_rotation(rotation, within, WINDOW, PAIRS, BLOCK)
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    return even.to(FACTOR), odd.to(FACTOR)


@triton.jit
def write_gradient(
    d_rows, d_even, d_odd, rows, is_token, within, weight, eps, rotation, WINDOW: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Take gradients back through what `read_normed_and_turned` did, and write them.

    The rows are read once more: they are in a cache still, and registers are scarce.

    Returns:
        Gradients of even and odd channels of the norm's weight, `(BLOCK,)` each, summed over the
        tile.
    """
    d_weight_even = tl.zeros((BLOCK,), tl.float32)
    d_weight_odd = tl.zeros((BLOCK,), tl.float32)
    if rotation is not None:
        cos, sin = read_rotation(rotation, within, WINDOW, PAIRS, BLOCK)
        d_even, d_odd = d_even * cos + d_odd * sin, d_odd * cos - d_even * sin
    if weight is not None:
        even, odd = read_pairs(rows, is_token, PAIRS, BLOCK, HALF)
        scale = inverse_root_mean_square(even, odd, eps, PAIRS)
        even, odd = even * scale, odd * scale
        d_weight_even = tl.sum(d_even * even, axis=0)
        d_weight_odd = tl.sum(d_odd * odd, axis=0)
        weight_even, weight_odd = read_weight(weight, PAIRS, BLOCK)
        d_even, d_odd = d_even * weight_even, d_odd * weight_odd
        along = tl.sum(d_even * even + d_odd * odd, axis=1)[:, None] / (2 * PAIRS)
        d_even, d_odd = scale * (d_even - even * along), scale * (d_odd - odd * along)
    write_pairs(d_rows, d_even, d_odd, is_token, PAIRS, BLOCK, HALF)
    return d_weight_even, d_weight_odd


@triton.jit
def product(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """`a b`, summed up in float32; `PRECISION` is how float32 factors are multiplied."""
    if INTERPRETED:  # Triton's interpreter takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
