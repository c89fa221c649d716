"""Triton kernels of attention within windows, launched by `window_attention_triton.py`.

A program computes one head of one tile at a time. A tile is the `SLOTS` places of a window, or of
several windows one after the other if a window is smaller than the 16 rows of a matrix product.
Padding, roll and partition of the map are arithmetic on addresses: rows are read and written in
place. Heads lie next to one another in memory, and so do the programs that compute them.

Channels 2 p and 2 p + 1 of queries and keys, which RoPE rotates together, are read as one word of
twice the width and separated in registers. So reads are contiguous and no channel changes its lane;
the product of queries and keys is that of their even channels plus that of their odd ones.

Arguments in capitals are compiled in: `HEADS`, heads; `PAIRS`, pairs of channels of a head, and
`BLOCK`, the power of two that they are padded to; `WINDOW`, side of a window; `HALF`, dtype of a
channel; `FACTOR`, dtype in which queries and keys are multiplied. Pointers to absent tensors are
None.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Compiled once for maps of all sizes and shifts.
@triton.jit(do_not_specialize=["height", "width", "row_shift", "column_shift", "tiles"])
def forward(
    qkv, words, out, query_weight, key_weight, rotation, bias,
    height, width, row_shift, column_shift, tiles, batch_stride, row_stride, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, HALF: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute window attention of one head of one tile of one map.

    `words` is the memory of `qkv` in words of two channels, and strides are counted in words.
    """
    WIDTH: tl.constexpr = HEADS * PAIRS  # of the queries of a token, in words
    program = tl.program_id(0)
    head, tile, item = program % HEADS, program // HEADS % tiles, program // HEADS // tiles
    token, region, within = place(tile, height, width, row_shift, column_shift, WINDOW, SLOTS)
    is_token = region >= 0

    start = item.to(tl.int64) * batch_stride + token.to(tl.int64) * row_stride + head * PAIRS
    query_even, query_odd = read_normed_and_rotated(
        words + start, is_token, within, query_weight, eps, rotation,
        WINDOW, PAIRS, BLOCK, HALF, FACTOR,
    )  # fmt: skip
    key_even, key_odd = read_normed_and_rotated(
        words + start + WIDTH, is_token, within, key_weight, eps, rotation,
        WINDOW, PAIRS, BLOCK, HALF, FACTOR,
    )  # fmt: skip
    value = read(qkv + 2 * (start + 2 * WIDTH), is_token, PAIRS, BLOCK)
    weights = probabilities(
        query_even, query_odd, key_even, key_odd, bias, region, within, head,
        HEADS, WINDOW, PAIRS, PRECISION, INTERPRETED,
    ).to(HALF)  # fmt: skip

    start = ((item.to(tl.int64) * height * width + token) * HEADS + head) * (2 * PAIRS)
    attended = product(weights, value, PRECISION, INTERPRETED)
    write(out + start, attended, is_token, PAIRS, BLOCK)


@triton.jit
def probabilities(
    query_even, query_odd, key_even, key_odd, bias, region, within, head, HEADS: tl.constexpr,
    WINDOW: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return `softmax(q k^T / sqrt(d) + bias)` of a tile, `(SLOTS, SLOTS)`, float32."""
    logits = product(query_even, tl.trans(key_even), PRECISION, INTERPRETED)
    logits += product(query_odd, tl.trans(key_odd), PRECISION, INTERPRETED)
    logits *= (2 * PAIRS) ** -0.5
    if bias is not None:
        # Row (dy + w - 1) (2 w - 1) + dx + w - 1 of the table (Swin Transformer, section 3.2), as
        # a difference of a term of the query and the same term of the key.
        row = within // WINDOW * (2 * WINDOW - 1) + within % WINDOW
        row = row[:, None] - row[None, :] + (WINDOW - 1) * 2 * WINDOW
        logits += tl.load(bias + row * HEADS + head).to(tl.float32)
    logits = tl.where(region[:, None] == region[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit(
    do_not_specialize=[
        "height", "width", "row_shift", "column_shift", "tiles", "items", "chunks"
    ]
)  # fmt: skip
def backward(
    grad, qkv, words, d_qkv, d_words, query_weight, key_weight, rotation, bias, d_weight, d_logits,
    height, width, row_shift, column_shift, tiles, items, chunks, batch_stride, row_stride, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, HALF: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Compute gradients of one head of every `chunks`-th of the `items` tiles of the batch.

    Gradients of the norms' weights and of the bias are summed over the tiles in a fixed order, and
    written once per program: `d_weight` is `(programs, 2, d)`, `d_logits` is
    `(programs, SLOTS, SLOTS)`.
    """
    WIDTH: tl.constexpr = HEADS * PAIRS
    program = tl.program_id(0)
    head, chunk = program % HEADS, program // HEADS
    logits_sum = tl.zeros((SLOTS, SLOTS), tl.float32)
    query_sum_even = tl.zeros((BLOCK,), tl.float32)
    query_sum_odd = tl.zeros((BLOCK,), tl.float32)
    key_sum_even = tl.zeros((BLOCK,), tl.float32)
    key_sum_odd = tl.zeros((BLOCK,), tl.float32)

    for index in range(chunk, items, chunks):
        tile, item = index % tiles, (index // tiles).to(tl.int64)
        token, region, within = place(tile, height, width, row_shift, column_shift, WINDOW, SLOTS)
        is_token = region >= 0
        start = item * batch_stride + token.to(tl.int64) * row_stride + head * PAIRS
        rows = words + start
        query_even, query_odd = read_normed_and_rotated(
            rows, is_token, within, query_weight, eps, rotation, WINDOW, PAIRS, BLOCK, HALF, FACTOR
        )
        key_even, key_odd = read_normed_and_rotated(
            rows + WIDTH, is_token, within, key_weight, eps, rotation,
            WINDOW, PAIRS, BLOCK, HALF, FACTOR,
        )  # fmt: skip
        value = read(qkv + 2 * (start + 2 * WIDTH), is_token, PAIRS, BLOCK)
        place_on_maps = item * height * width + token
        start = (place_on_maps * HEADS + head) * (2 * PAIRS)
        d_out = read(grad + start, is_token, PAIRS, BLOCK)
        weights = probabilities(
            query_even, query_odd, key_even, key_odd, bias, region, within, head,
            HEADS, WINDOW, PAIRS, PRECISION, INTERPRETED,
        )  # fmt: skip

        start = place_on_maps * (3 * WIDTH) + head * PAIRS
        d_value = product(tl.trans(weights.to(HALF)), d_out, PRECISION, INTERPRETED)
        write(d_qkv + 2 * (start + 2 * WIDTH), d_value, is_token, PAIRS, BLOCK)

        d_weights = product(d_out, tl.trans(value), PRECISION, INTERPRETED)
        d_own = weights * (d_weights - tl.sum(weights * d_weights, axis=1)[:, None])
        if bias is not None:
            logits_sum += d_own

        by_query, unit = shrunk(d_own, 1, FACTOR)
        unit = unit[:, None] * (2 * PAIRS) ** -0.5
        even, odd = write_gradient(
            d_words + start,
            product(by_query, key_even, PRECISION, INTERPRETED) * unit,
            product(by_query, key_odd, PRECISION, INTERPRETED) * unit,
            rows, is_token, within, query_weight, eps, rotation, WINDOW, PAIRS, BLOCK, HALF,
        )  # fmt: skip
        query_sum_even += even
        query_sum_odd += odd

        by_key, unit = shrunk(d_own, 0, FACTOR)
        by_key, unit = tl.trans(by_key), unit[:, None] * (2 * PAIRS) ** -0.5
        even, odd = write_gradient(
            d_words + start + WIDTH,
            product(by_key, query_even, PRECISION, INTERPRETED) * unit,
            product(by_key, query_odd, PRECISION, INTERPRETED) * unit,
            rows + WIDTH, is_token, within, key_weight, eps, rotation, WINDOW, PAIRS, BLOCK, HALF,
        )  # fmt: skip
        key_sum_even += even
        key_sum_odd += odd

    if bias is not None:
        slot = tl.arange(0, SLOTS)
        at = (program * SLOTS + slot[:, None]) * SLOTS + slot[None, :]
        tl.store(d_logits + at, logits_sum)
    if query_weight is not None:
        pair = tl.arange(0, BLOCK)
        at = d_weight + program * (4 * PAIRS) + 2 * pair
        tl.store(at, query_sum_even, mask=pair < PAIRS)
        tl.store(at + 1, query_sum_odd, mask=pair < PAIRS)
        tl.store(at + 2 * PAIRS, key_sum_even, mask=pair < PAIRS)
        tl.store(at + 2 * PAIRS + 1, key_sum_odd, mask=pair < PAIRS)


@triton.jit
def shrunk(x, AXIS: tl.constexpr, FACTOR: tl.constexpr):
    """Return `x` in units of its largest magnitude along an axis, and these units.

    Gradients may be far outside the range of float16; in these units they are inside.
    """
    unit = tl.maximum(tl.max(tl.abs(x), axis=AXIS), 1e-30)
    return (x / tl.expand_dims(unit, AXIS)).to(FACTOR), unit


@triton.jit
def sum_bias_gradient(
    d_logits, d_bias, chunks, HEADS: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
    OFFSETS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Compute the bias table's gradient at one row offset, for one head.

    Each entry is the sum over the pairs of slots at its offset. `OFFSETS` is the power of two that
    the column offsets are padded to; `AT_ONCE` of the `chunks` are read at once.
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    SPAN: tl.constexpr = 2 * WINDOW - 1
    dy, head = tl.program_id(0) // HEADS - (WINDOW - 1), tl.program_id(0) % HEADS
    dx = tl.arange(0, OFFSETS)[:, None] - (WINDOW - 1)
    query = tl.arange(0, SLOTS)[None, :]
    y, x = query % AREA // WINDOW - dy, query % AREA % WINDOW - dx  # of the key
    inside = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW) & (query < SLOTS // AREA * AREA)
    pair = query * SLOTS + query - dy * WINDOW - dx
    total = tl.zeros((AT_ONCE, OFFSETS, SLOTS), tl.float32)
    for start in range(0, chunks, AT_ONCE):
        chunk = start + tl.arange(0, AT_ONCE)[:, None, None]
        at = (chunk * HEADS + head) * (SLOTS * SLOTS) + pair[None, :, :]
        total += tl.load(d_logits + at, mask=(chunk < chunks) & inside[None, :, :], other=0)
    column = tl.arange(0, OFFSETS)
    at = ((dy + WINDOW - 1) * SPAN + column) * HEADS + head
    tl.store(d_bias + at, tl.sum(tl.sum(total, axis=0), axis=1), mask=column < SPAN)


# Tiles of a map, read and written


@triton.jit
def place(tile, height, width, row_shift, column_shift, WINDOW: tl.constexpr, SLOTS: tl.constexpr):
    """Return the tokens in the slots of a tile, their regions, and their places in the window.

    Slots see each other if their regions are equal: in one window, and on the same side of the
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
    """Read even and odd channels of rows of words, `(SLOTS, BLOCK)`, float32; padded by zeros."""
    pair = tl.arange(0, BLOCK)
    inside = is_token[:, None] & (pair < PAIRS)[None, :]
    word = tl.load(rows[:, None] + pair[None, :], mask=inside, other=0)
    BITS: tl.constexpr = 32 if HALF == tl.float32 else 16
    INTEGER: tl.constexpr = tl.int32 if HALF == tl.float32 else tl.int16
    even = word.to(INTEGER).to(HALF, bitcast=True)
    odd = (word >> BITS).to(INTEGER).to(HALF, bitcast=True)
    return even.to(tl.float32), odd.to(tl.float32)


@triton.jit
def write_pairs(
    rows, even, odd, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """Write even and odd channels: the inverse of `read_pairs`."""
    pair = tl.arange(0, BLOCK)
    inside = is_token[:, None] & (pair < PAIRS)[None, :]
    BITS: tl.constexpr = 32 if HALF == tl.float32 else 16
    INTEGER: tl.constexpr = tl.uint32 if HALF == tl.float32 else tl.uint16
    WORD: tl.constexpr = tl.uint64 if HALF == tl.float32 else tl.uint32
    low = even.to(HALF).to(INTEGER, bitcast=True).to(WORD)
    high = odd.to(HALF).to(INTEGER, bitcast=True).to(WORD)
    word = (low | (high << BITS)).to(rows.dtype.element_ty, bitcast=True)
    tl.store(rows[:, None] + pair[None, :], word, mask=inside)


@triton.jit
def read(rows, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Read channels in their own order, `(SLOTS, 2 * BLOCK)`; padded by zeros."""
    channel = tl.arange(0, 2 * BLOCK)
    inside = is_token[:, None] & (channel < 2 * PAIRS)[None, :]
    return tl.load(rows[:, None] + channel[None, :], mask=inside, other=0)


@triton.jit
def write(rows, values, is_token, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Write channels in their own order: the inverse of `read`."""
    channel = tl.arange(0, 2 * BLOCK)
    inside = is_token[:, None] & (channel < 2 * PAIRS)[None, :]
    tl.store(rows[:, None] + channel[None, :], values.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def read_weight(weight, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Read even and odd channels of a norm's weight, `(1, BLOCK)` each, float32."""
    pair = tl.arange(0, BLOCK)
    even = tl.load(weight + 2 * pair, mask=pair < PAIRS, other=0).to(tl.float32)
    odd = tl.load(weight + 2 * pair + 1, mask=pair < PAIRS, other=0).to(tl.float32)
    return even[None, :], odd[None, :]


@triton.jit
def read_rotation(rotation, within, WINDOW: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Read cosine and sine, `(SLOTS, BLOCK)` each, of the angle of each pair at each place."""
    pair = tl.arange(0, BLOCK)
    at = within[:, None] * PAIRS + pair[None, :]
    inside = (pair < PAIRS)[None, :]
    cos = tl.load(rotation + at, mask=inside, other=0)
    sin = tl.load(rotation + WINDOW * WINDOW * PAIRS + at, mask=inside, other=0)
    return cos, sin


@triton.jit
def inverse_root_mean_square(even, odd, eps, PAIRS: tl.constexpr):
    """Return `1 / sqrt(mean(x**2) + eps)` of each row, `(SLOTS, 1)`."""
    mean_square = tl.sum(even * even + odd * odd, axis=1) / (2 * PAIRS)
    return tl.rsqrt(mean_square + eps)[:, None]


@triton.jit
def read_normed_and_rotated(
    rows, is_token, within, weight, eps, rotation, WINDOW: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Read even and odd channels of queries or keys, and apply RMSNorm and RoPE in float32."""
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
    """Propagate gradients back through `read_normed_and_rotated`, and write them.

    The rows are read again: they still are in a cache, and registers are scarce.

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
    """Return `a b`, summed in float32; `PRECISION` is the way to multiply float32 factors."""
    if INTERPRETED:  # Triton's interpreter takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
