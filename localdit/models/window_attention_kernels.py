"""Triton kernels of attention within windows, which `window_attention_triton.py` launches.

A program takes one head of one tile at a time: see `window_attention_tiles.py`, also for the
arguments. Heads lie next to one another in memory, and so do the programs that take them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_attention_tiles import (
    place,
    product,
    read,
    read_normed_and_turned,
    write,
    write_gradient,
)


# Compiled once for maps of all sizes and shifts.
@triton.jit(do_not_specialize=["height", "width", "row_shift", "column_shift", "tiles"])
def forward(
    qkv, words, out, query_weight, key_weight, rotation, bias,
    height, width, row_shift, column_shift, tiles, batch_stride, row_stride, eps,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, HALF: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Window attention of one head of one tile of one map.

    `words` is the memory of `qkv` in words of two channels, and strides are counted in words.
    """
    WIDTH: tl.constexpr = HEADS * PAIRS  # of the queries of a token, in words
    program = tl.program_id(0)
    head, tile, item = program % HEADS, program // HEADS % tiles, program // HEADS // tiles
    token, region, within = place(tile, height, width, row_shift, column_shift, WINDOW, SLOTS)
    is_token = region >= 0

    start = item.to(tl.int64) * batch_stride + token.to(tl.int64) * row_stride + head * PAIRS
    query_even, query_odd = read_normed_and_turned(
        words + start, is_token, within, query_weight, eps, rotation,
        WINDOW, PAIRS, BLOCK, HALF, FACTOR,
    )  # fmt: skip
    key_even, key_odd = read_normed_and_turned(
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
    """`softmax(q k^T / sqrt(d) + bias)` of a tile, `(SLOTS, SLOTS)`, float32."""
    logits = product(query_even, tl.trans(key_even), PRECISION, INTERPRETED)
    logits += product(query_odd, tl.trans(key_odd), PRECISION, INTERPRETED)
    logits *= (2 * PAIRS) ** -0.5
    if bias is not None:
        # Row (dy + w - 1) (2 w - 1) + dx + w - 1 of the table (Swin Transformer, section 3.2): a
        # difference of what query and key have of their own.
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
    """Gradients of one head of every `chunks`-th of the `items` tiles of all maps of the batch.

    What the tiles give to the norms' weights and to the bias is summed up here, in a fixed order,
    and written once for each program: `d_weight` is `(programs, 2, d)`, `d_logits` is
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
        query_even, query_odd = read_normed_and_turned(
            rows, is_token, within, query_weight, eps, rotation, WINDOW, PAIRS, BLOCK, HALF, FACTOR
        )
        key_even, key_odd = read_normed_and_turned(
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
    """`x` in units of its greatest magnitude along an axis, and these units.

    Gradients may lie far outside of the range of float16; in these units they lie within.
    """
    unit = tl.maximum(tl.max(tl.abs(x), axis=AXIS), 1e-30)
    return (x / tl.expand_dims(unit, AXIS)).to(FACTOR), unit


@triton.jit
def sum_bias_gradient(
    d_logits, d_bias, chunks, HEADS: tl.constexpr, WINDOW: tl.constexpr, SLOTS: tl.constexpr,
    OFFSETS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The entries for one row offset of the bias table's gradient, of one head.

    Each entry is the sum over the pairs of slots at its offset. `OFFSETS` is the power of two that
    the column offsets are padded to; `AT_ONCE` of the `chunks` are read at once.
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    SPAN: tl.constexpr = 2 * WINDOW - 1
    dy, head = tl.program_id(0) // HEADS - (WINDOW - 1), tl.program_id(0) % HEADS
    dx = tl.arange(0, OFFSETS)[:, None] - (WINDOW - 1)
    query = tl.arange(0, SLOTS)[None, :]
    y, x = query % AREA // WINDOW - dy, query % AREA % WINDOW - dx  # of the key
    there = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW) & (query < SLOTS // AREA * AREA)
    pair = query * SLOTS + query - dy * WINDOW - dx
    total = tl.zeros((AT_ONCE, OFFSETS, SLOTS), tl.float32)
    for start in range(0, chunks, AT_ONCE):
        chunk = start + tl.arange(0, AT_ONCE)[:, None, None]
        at = (chunk * HEADS + head) * (SLOTS * SLOTS) + pair[None, :, :]
        total += tl.load(d_logits + at, mask=(chunk < chunks) & there[None, :, :], other=0)
    column = tl.arange(0, OFFSETS)
    at = ((dy + WINDOW - 1) * SPAN + column) * HEADS + head
    tl.store(d_bias + at, tl.sum(tl.sum(total, axis=0), axis=1), mask=column < SPAN)
