"""`window_attention` as one Triton kernel, and its gradients as another.

Queries, keys and values are read once and the result is written once. Nothing else leaves the
chip, and only the inputs are kept for the backward pass. Gradients are summed without atomic
additions, in an order that depends on the shapes alone: equal inputs give equal bits.

Hidden state: importing this module registers the operators `localdit::window_attention` and
`localdit::window_attention_backward` with PyTorch. `_rotation` caches up to 32 small tables on
their devices; `localdit.models.clear_caches` clears them. Triton keeps its compiled kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .layers import RMSNorm, rope_angles
from .windows import WindowGrid, cached_tensors

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WINDOW_SIZE = 8  # a program holds the logits of a window, 64 x 64, in registers
MAX_HEAD_DIM = 128

# Programs of the backward pass; each sums the gradients of the parameters over its tiles. They are
# enough for every multiprocessor of a large GPU to hold as many as its registers allow, and few
# enough for their sums to be small beside the gradients of a map of 4096 tokens.
PROGRAMS = 512


def window_attention(
    qkv: torch.Tensor,
    grid: WindowGrid,
    num_heads: int,
    norms: tuple[RMSNorm, RMSNorm] | None,
    do_rope: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the same as `localdit.models.window_attention.window_attention`.

    In 16 bits, queries and keys are rounded before their product, which is summed in float32: to
    float16 if a norm bounds them, and to their own dtype otherwise.

    Raises:
        RuntimeError: if gradients of gradients are requested.
    """
    query_weight, key_weight, eps = None, None, 0.0
    if norms is not None:
        query_weight, key_weight, eps = norms[0].weight, norms[1].weight, norms[0].eps
        assert norms[1].eps == eps
    arguments = (qkv, query_weight, key_weight, bias, [*grid], num_heads, eps, do_rope)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _window_attention(*arguments)
    return _forward(*arguments)  # dispatching an operator takes longer than the kernel itself


def _forward(
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grid: list[int],
    num_heads: int,
    eps: float,
    do_rope: bool,
) -> torch.Tensor:
    from .window_attention_kernels import forward

    batch, tokens, channels = qkv.shape
    height, width, window_size, *shifts = grid
    rotation = _rotation(window_size, channels // (3 * num_heads), qkv.device) if do_rope else None
    constants = _constants(qkv, query_weight is not None, window_size, num_heads, do_rope, False)
    tiles = _tiles(WindowGrid(*grid), constants["SLOTS"])

    qkv, words = _with_words(qkv)
    out = torch.empty(batch, tokens, channels // 3, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        forward[(batch * tiles * num_heads,)](
            qkv, words, out, *_contiguous(query_weight, key_weight, rotation, bias),
            height, width, *shifts, tiles, *words.stride()[:2], eps, **constants,
        )  # fmt: skip
    return out


def _backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    grid: list[int],
    num_heads: int,
    eps: float,
    do_rope: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of `qkv`, of the two norms' weights `(2, head_dim)`, and of the bias.

    Gradients of parameters are float32, and empty if there is no such parameter.
    """
    from .window_attention_kernels import backward

    batch, head_dim = qkv.shape[0], qkv.shape[2] // (3 * num_heads)
    height, width, window_size, *shifts = grid
    rotation = _rotation(window_size, head_dim, qkv.device) if do_rope else None
    constants = _constants(qkv, query_weight is not None, window_size, num_heads, do_rope, True)
    slots = constants["SLOTS"]
    tiles = _tiles(WindowGrid(*grid), slots)
    chunks = max(1, min(batch * tiles, PROGRAMS // num_heads))

    qkv, words = _with_words(qkv)
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    buffer = functools.partial(torch.empty, dtype=torch.float32, device=qkv.device)
    d_weight = buffer(0 if query_weight is None else (chunks * num_heads, 2, head_dim))
    d_logits = buffer(0 if bias is None else (chunks, num_heads, slots, slots))
    with torch.cuda.device_of(qkv):
        backward[(chunks * num_heads,)](
            grad.contiguous(), qkv, words, d_qkv, _as_words(d_qkv),
            *_contiguous(query_weight, key_weight, rotation, bias), d_weight, d_logits,
            height, width, *shifts, tiles, batch * tiles, chunks, *words.stride()[:2], eps,
            **constants,
        )  # fmt: skip
        d_bias = d_logits if bias is None else _bias_gradient(d_logits, window_size)
    return d_qkv, d_weight if query_weight is None else d_weight.sum(0), d_bias


def _bias_gradient(d_logits: torch.Tensor, window_size: int) -> torch.Tensor:
    """Sum the logits' gradients `(chunks, heads, slots, slots)` to that of the bias table."""
    import triton

    from .window_attention_kernels import sum_bias_gradient

    chunks, num_heads, slots, _ = d_logits.shape
    span = 2 * window_size - 1
    d_bias = torch.empty(span**2, num_heads, dtype=torch.float32, device=d_logits.device)
    sum_bias_gradient[(span * num_heads,)](
        d_logits, d_bias, chunks, HEADS=num_heads, WINDOW=window_size, SLOTS=slots,
        OFFSETS=triton.next_power_of_2(span), AT_ONCE=8,
    )  # fmt: skip
    return d_bias


def _with_words(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tensor, copied only if its rows are scattered, and the same memory as words."""
    even = all(size % 2 == 0 for size in (*qkv.stride()[:2], qkv.storage_offset()))
    if qkv.stride(2) != 1 or not even:
        qkv = qkv.contiguous()
    return qkv, _as_words(qkv)


def _as_words(x: torch.Tensor) -> torch.Tensor:
    """View two neighbouring channels as one word."""
    return x.view(torch.int64 if x.element_size() == 4 else torch.int32)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@cached_tensors(32)
def _rotation(window_size: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Return cosine and sine of RoPE's angles in a window, `(2, window_size**2, head_dim / 2)`."""
    angles = rope_angles(window_size, window_size, head_dim, torch.device("cpu"), torch.float64)
    return torch.stack([angles.cos(), angles.sin()]).float().to(device)


def _constants(
    qkv: torch.Tensor,
    normed: bool,
    window_size: int,
    num_heads: int,
    do_rope: bool,
    backward: bool,
) -> dict[str, Any]:
    """Return the arguments that the kernels are compiled for, and their launch settings."""
    import triton
    import triton.language as tl

    pairs = qkv.shape[2] // (6 * num_heads)
    half = str(qkv.dtype).removeprefix("torch.")
    slots = max(16, triton.next_power_of_2(window_size**2))
    return {
        "HEADS": num_heads,
        "PAIRS": pairs,
        "BLOCK": max(16, triton.next_power_of_2(pairs)),  # the least inner size of a product
        "WINDOW": window_size,
        "SLOTS": slots,
        "HALF": getattr(tl, half),
        "FACTOR": getattr(tl, _factor(half, normed, do_rope, backward)),
        "INTERPRETED": qkv.device.type == "cpu",
        # In IEEE's float32 a window of 8 x 8 would not fit in registers; three products in TF32 are
        # nearly as exact.
        "PRECISION": "ieee" if half == "float32" and slots < 64 else "tf32x3",
        **_launch(slots, half, backward),
    }


def _factor(half: str, normed: bool, do_rope: bool, backward: bool) -> str:
    """Return the dtype in which queries and keys are multiplied.

    It is the smallest that adds no larger error than the steps before and after: float16 represents
    normed queries and keys eight times as exactly as bfloat16, and queries and keys without norms
    keep their dtype. Gradients in float16 need float32 in both cases.
    """
    if half == "float32" or (half == "float16" and backward):
        return "float32"
    if normed:
        return "float16"
    return "float32" if do_rope else half


def _launch(slots: int, half: str, backward: bool) -> dict[str, int]:
    """Return the launch settings of a kernel.

    It takes as few warps as hold a tile in registers: fewer warps need fewer instructions and wait
    less for one another. The numbers were chosen by the registers and instructions of the code that
    is compiled for compute capability 9.0 and heads of 72 channels. There is one stage: loading
    ahead goes through shared memory, and large windows would need more of it than GPUs have.
    """
    at_16_slots = {"bfloat16": (2, 2), "float16": (2, 4), "float32": (4, 8)}[half][backward]
    return {"num_warps": min(8, at_16_slots * slots // 16), "num_stages": 1}


def _tiles(grid: WindowGrid, slots: int) -> int:
    """Return the number of tiles of `slots` places that the windows of a map fill."""
    return -(-grid.rows * grid.columns // (slots // grid.window_size**2))


# Operators: `torch.compile` does not look inside them.
_ARGUMENTS = (
    "Tensor qkv, Tensor? query_weight, Tensor? key_weight, Tensor? bias, SymInt[] grid, "
    "SymInt num_heads, float eps, bool do_rope"
)
_window_attention = torch.library.custom_op(
    "localdit::window_attention", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_window_attention_backward = torch.library.custom_op(
    "localdit::window_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


@_window_attention.register_fake
def _forward_shapes(qkv: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty(batch, tokens, channels // 3)


@_window_attention_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = 0 if query_weight is None else (2, *query_weight.shape)
    table = 0 if bias is None else bias.shape
    empty = functools.partial(qkv.new_empty, dtype=torch.float32)
    return qkv.new_empty(qkv.shape), empty(weights), empty(table)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    qkv, query_weight, key_weight, bias = ctx.saved_tensors
    d_qkv, d_weight, d_bias = _window_attention_backward(
        grad, qkv, query_weight, key_weight, bias, *ctx.settings
    )
    d_query_weight = d_key_weight = None
    if query_weight is not None:
        d_query_weight, d_key_weight = d_weight.to(query_weight.dtype)
    d_bias = None if bias is None else d_bias.to(bias.dtype)
    return d_qkv, d_query_weight, d_key_weight, d_bias, None, None, None, None


def _refuse(ctx: Any, *grads: torch.Tensor) -> None:
    raise RuntimeError(
        "The Triton kernel of window attention has no gradients of gradients. Compute them with "
        "`set_window_attention_backend('torch')`."
    )


_window_attention.register_autograd(_gradients, setup_context=_keep)
_window_attention_backward.register_autograd(_refuse)
