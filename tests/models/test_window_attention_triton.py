"""The Triton kernel against PyTorch's operations in float64.

Without a GPU the kernel runs in Triton's interpreter, in a separate process: Triton decides when
it is imported whether to interpret, and by now it may have been.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import multiprocessing
import os
from unittest import mock

import pytest
import torch

from localdit.models import window_attention_triton as kernel
from localdit.models.backends import attend_within_windows
from localdit.models.layers import RMSNorm
from localdit.models.window_attention import window_attention
from localdit.models.windows import WindowGrid, window_layout

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

NAMES = ("out", "d_qkv", "d_query_weight", "d_key_weight", "d_bias")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
GRID = WindowGrid(8, 5, 4, 1, 2)


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function of this module in a process in which Triton interprets its kernels."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(round_to_bfloat16_as_gpus_do).result()
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def round_to_bfloat16_as_gpus_do():
    """The interpreter cuts off the bits that do not fit."""
    import triton.language as tl
    from triton.runtime import interpreter

    def convert(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(data, source, target, rounding)
        exact = torch.from_numpy(data.astype("float32").reshape(-1))
        return exact.bfloat16().view(torch.int16).numpy().view("uint16").reshape(data.shape)

    original, interpreter._convert_float = interpreter._convert_float, convert
    torch.set_num_threads(1)


def draw(
    grid, heads=2, head_dim=12, dtype=torch.float32, batch=1, norm=True, bias=True, do_rope=True
):
    """Arguments of `window_attention`, and a gradient of its result."""
    torch.manual_seed(0)
    tokens, channels = grid.height * grid.width, heads * head_dim
    qkv = torch.randn(batch, tokens, 3 * channels).to(dtype)
    norms = (RMSNorm(head_dim, 1e-10), RMSNorm(head_dim, 1e-10)) if norm else None
    for each in norms or ():
        torch.nn.init.normal_(each.weight)
    table = torch.randn((2 * grid.window_size - 1) ** 2, heads) if bias else None
    grad = torch.randn(batch, tokens, channels).to(dtype)
    return (qkv, grid, heads, norms, do_rope, table), grad


def run(function, arguments, grad, dtype=None, device=None):
    """Return the function's result and gradients, with all inputs cast to `dtype`."""
    qkv, grid, heads, norms, do_rope, bias = arguments

    def leaf(x):
        return None if x is None else x.detach().to(device, dtype).requires_grad_()

    qkv, bias = leaf(qkv), leaf(bias)
    if norms is not None:
        norms = tuple(copy.deepcopy(norm).to(device, dtype) for norm in norms)
    out = function(qkv, grid, heads, norms, do_rope, bias)
    weights = [norm.weight for norm in norms] if norms else [None, None]
    inputs = [qkv, *weights, bias]
    there = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(out, there, grad.to(out)))
    return [out.detach(), *(None if x is None else next(grads) for x in inputs)]


def run_kernel(arguments, grad, programs=kernel.PROGRAMS, device=None):
    """`run` of the kernel, where all memory that it does not write holds NaN."""
    empty = functools.partial(_filled_with_nan, torch.empty)
    with mock.patch.object(torch, "empty", empty), mock.patch.object(kernel, "PROGRAMS", programs):
        return run(kernel.window_attention, arguments, grad, device=device)


def _filled_with_nan(empty, *args, **kwargs):
    return empty(*args, **kwargs).fill_(torch.nan)


def check(results, arguments, grad):
    """The kernel's error is at most twice that of PyTorch's operations in the same dtype.

    Luck may round single numbers exactly. So a few of float32's roundings are allowed beside: to
    the largest error, and to gradients of parameters, which are few and sums of larger terms.
    """
    exact = run(window_attention, arguments, grad, torch.float64)
    pytorch = run(window_attention, arguments, grad)
    for name, ours, theirs, true in zip(NAMES, results, pytorch, exact, strict=True):
        assert (ours is None) == (true is None), name
        if true is None:
            continue
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape, name
        assert ours.isfinite().all(), name
        ours, theirs = ((x.cpu().double() - true).abs() for x in (ours, theirs))
        rounding = torch.finfo(torch.float32).eps * true.abs()
        luck = 8 * rounding.square().mean().sqrt()
        if name in ("out", "d_qkv"):
            assert ours.max() <= 2 * theirs.max() + 2 * rounding.max(), name
            luck = 0
        ours, theirs = (x.square().mean().sqrt() for x in (ours, theirs))
        assert ours <= 2 * theirs + luck, name


CASES = [
    *({"grid": WindowGrid(8, 8, 4, row, row), "heads": 1} for row in range(4)),
    {"grid": WindowGrid(8, 4, 4, 1, 2), "batch": 2},
    {"grid": WindowGrid(9, 6, 4, 3, 1), "programs": 2},  # padding, and sums over several tiles
    {"grid": WindowGrid(6, 5, 4, 0, 3), "heads": 1, "programs": 3, "batch": 2},
    {"grid": WindowGrid(3, 2, 4, 2, 0)},
    {"grid": WindowGrid(5, 7, 2, 1, 0), "programs": 2},
    {"grid": WindowGrid(6, 6, 2, 1, 1), "heads": 1},
    {"grid": WindowGrid(7, 5, 3, 1, 2), "heads": 1},
    {"grid": WindowGrid(8, 8, 8, 3, 5)},
    {"grid": WindowGrid(9, 7, 8, 0, 6), "heads": 1},
    {"grid": WindowGrid(5, 5, 4, 1, 0), "head_dim": 72, "heads": 1},
    {"grid": WindowGrid(4, 6, 4, 1, 3), "head_dim": 48, "heads": 3},
    {"grid": WindowGrid(4, 4, 4, 2, 1), "heads": 16},
    {"grid": GRID, "norm": False, "do_rope": False},
    {"grid": GRID, "norm": False},
    {"grid": GRID, "do_rope": False},
    {"grid": GRID, "bias": False},
    {"grid": GRID, "bias": False, "norm": False, "do_rope": False, "head_dim": 10},
]


def described(case):
    grid, *rest = case.values()
    return "-".join([".".join(map(str, grid)), *(f"{k}.{v}" for k, v in [*case.items()][1:])])


def split(case):
    """Return the arguments of `draw` and of `run_kernel` for a case."""
    case = dict(case)
    return case.pop("programs", kernel.PROGRAMS), case


@pytest.mark.parametrize("case", CASES, ids=described)
def test_float32(interpreted, case):
    programs, case = split(case)
    drawn = draw(**case)
    check(interpreted(run_kernel, *drawn, programs), *drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        {"grid": WindowGrid(6, 5, 4, 3, 1), "programs": 4},
        {"grid": WindowGrid(4, 8, 4, 1, 2), "head_dim": 72, "heads": 1},
        {"grid": WindowGrid(4, 8, 4, 1, 2), "norm": False, "do_rope": False},
        {"grid": WindowGrid(4, 8, 4, 1, 2), "norm": False, "bias": False},
        {"grid": WindowGrid(6, 5, 2, 1, 0)},
        {"grid": WindowGrid(8, 8, 8, 5, 2), "heads": 1},
    ],
    ids=described,
)
def test_16_bits(interpreted, case, dtype):
    programs, case = split(case)
    drawn = draw(**case, dtype=dtype)
    check(interpreted(run_kernel, *drawn, programs), *drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-7, 1e4])
def test_gradients_of_any_size(interpreted, dtype, size):
    (qkv, *rest), grad = draw(WindowGrid(4, 8, 4, 1, 2), dtype=dtype)
    if dtype is torch.float16:
        size **= 0.5  # what float16 holds
    drawn = (qkv, *rest), grad * size
    check(interpreted(run_kernel, *drawn), *drawn)


def all_places(grids):
    from tests.models.places import places

    slots = {grid: max(16, 1 << (grid.window_size**2 - 1).bit_length()) for grid in grids}
    return [places(grid, slots[grid], kernel._tiles(grid, slots[grid])) for grid in grids]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 8])
def test_every_shift_of_maps_of_many_sizes(interpreted, window):
    sizes = [(1, 1), (8, 8), (9, 5), (3, 10)]
    shifts = [(row, column) for row in range(window) for column in range(window)]
    shifts = shifts if window < 8 else shifts[::7]
    grids = [WindowGrid(*size, window, *shift) for size in sizes for shift in shifts]
    for grid, (tokens, regions) in zip(grids, interpreted(all_places, grids), strict=True):
        order, inverse, hidden = window_layout(grid, torch.device("cpu"))
        is_token = regions.flatten() >= 0
        assert torch.equal(
            tokens.flatten()[is_token].sort().values, torch.arange(len(inverse)).int()
        ), f"{grid}: each token sits in one slot"
        area, filled = window**2, tokens.shape[1] // window**2 * window**2
        tokens, regions = (x[:, :filled].reshape(-1, area) for x in (tokens, regions))
        tokens, regions = tokens[: grid.rows * grid.columns], regions[: grid.rows * grid.columns]
        is_token = regions >= 0
        assert torch.equal(tokens[is_token], order.view(-1, area)[is_token].int()), grid
        assert regions.unique().numel() >= len(regions), f"{grid}: windows are apart"
        differ = regions[:, :, None] != regions[:, None, :]
        expected = torch.zeros_like(differ) if hidden is None else hidden
        assert torch.equal(differ, expected), grid


def attend_without_gradients(arguments):
    with torch.no_grad():
        return kernel.window_attention(*arguments)


@pytest.mark.parametrize("layout", ["a part of the map", "odd rows", "channels apart"])
def test_rows_are_read_without_copies(interpreted, layout):
    (qkv, *rest), _ = draw(WindowGrid(4, 5, 4, 1, 2), batch=2, dtype=torch.bfloat16)
    apart = {
        "a part of the map": lambda: torch.cat([qkv, qkv, qkv], dim=1)[:, 20:40],
        "odd rows": lambda: torch.cat([qkv, qkv[..., :1]], dim=2)[..., :-1],
        "channels apart": lambda: qkv.mT.contiguous().mT,
    }[layout]()
    assert not apart.is_contiguous()
    expected = interpreted(attend_without_gradients, (qkv, *rest))
    assert torch.equal(interpreted(attend_without_gradients, (apart, *rest)), expected)


def test_equal_inputs_give_equal_bits(interpreted):
    drawn = draw(WindowGrid(6, 5, 4, 3, 1), dtype=torch.bfloat16)
    first, second = (interpreted(run_kernel, *drawn, programs=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    out = interpreted(attend_without_gradients, drawn[0])
    assert torch.equal(out, first[0])


def test_weights_in_16_bits(interpreted):
    (qkv, grid, heads, norms, do_rope, bias), grad = draw(GRID, dtype=torch.bfloat16)
    norms = tuple(norm.bfloat16() for norm in norms)
    drawn = (qkv, grid, heads, norms, do_rope, bias.bfloat16()), grad
    check(interpreted(run_kernel, *drawn), *drawn)


def differentiate_twice():
    (qkv, *rest), _ = draw(WindowGrid(4, 4, 4))
    qkv.requires_grad_()
    out = kernel.window_attention(qkv, *rest)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    grad.sum().backward()


def test_gradients_of_gradients_are_refused(interpreted):
    with pytest.raises(RuntimeError, match="no gradients of gradients.*'torch'"):
        interpreted(differentiate_twice)


def check_operators():
    (qkv, grid, heads, norms, do_rope, bias), grad = draw(WindowGrid(4, 4, 4))
    weights = [norm.weight.detach() for norm in norms]
    leaves = [x.requires_grad_() for x in (qkv, *weights, bias)]
    settings = ([*grid], heads, norms[0].eps, do_rope)
    torch.library.opcheck(kernel._window_attention, (*leaves, *settings))
    torch.library.opcheck(kernel._window_attention, (leaves[0], None, None, None, *settings))
    leaves = [x.detach() for x in leaves]
    tests = ("test_schema", "test_faketensor")
    for parameters in (leaves[1:], [None] * 3):
        arguments = (grad, leaves[0], *parameters, *settings)
        torch.library.opcheck(kernel._window_attention_backward, arguments, test_utils=tests)


@pytest.mark.slow
def test_operators_follow_the_rules_of_compilers(interpreted):
    interpreted(check_operators)


def run_model(backend, use_global, num_layers=2, compiled=False):
    from localdit.models import LocalDiTTransformer2DModel

    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=num_layers, sample_size=8,
        cross_attention_dim=24, caption_channels=16, use_global=use_global,
    )  # fmt: skip
    model.set_window_attention_backend(backend)
    latents = torch.randn(1, 4, 8, 12)
    call = torch.compile(model, fullgraph=True) if compiled else model
    out = call(latents, torch.randn(1, 5, 16), torch.tensor([3]), return_dict=False)[0]
    out.square().mean().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("use_global", [False, True])
def test_the_model_computes_the_same_with_either_backend(interpreted, use_global):
    (ours, our_grads), (theirs, their_grads) = (
        interpreted(run_model, backend, use_global) for backend in ("triton", "torch")
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grads, their_grads)


@pytest.mark.slow
def test_compiles_as_one_graph(interpreted):
    (ours, our_grads), (theirs, their_grads) = (
        interpreted(run_model, "triton", True, 1, compiled) for compiled in (True, False)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grads, their_grads)


def compile_for(capability, pass_name, dtype, head_dim, window):
    """Return what Triton's compiler makes of a kernel, for a GPU that may be absent."""
    import triton
    from triton.backends.compiler import GPUTarget

    from localdit.models import window_attention_kernels

    function = getattr(window_attention_kernels, pass_name)
    qkv = torch.empty(1, window**2, 6 * head_dim, dtype=dtype, device="meta")
    constants = kernel._constants(qkv, True, window, 2, True, pass_name == "backward")
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    types = {"words": "i64" if dtype is torch.float32 else "i32"}
    types |= {"d_words": types["words"]} | dict.fromkeys(("qkv", "out", "grad", "d_qkv"), half)
    integers = ("height", "width", "row_shift", "column_shift", "tiles", "items", "chunks")
    integers += ("batch_stride", "row_stride")
    signature = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(integers, "i32")
    signature |= {name: f"*{of}" for name, of in types.items()} | {"eps": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in function.arg_names}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    values = {(i,): constants[name] for i, name in enumerate(signature) if name in constants}
    source = triton.compiler.ASTSource(function, signature, values)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "window"),
    [
        (80, torch.bfloat16, 72, 4),
        (90, torch.bfloat16, 72, 4),
        (90, torch.float16, 72, 4),
        (90, torch.float32, 72, 4),
        (90, torch.bfloat16, 12, 2),
        (90, torch.bfloat16, 72, 8),
        (100, torch.bfloat16, 72, 4),
    ],
)
def test_compiles_for_a_gpu(pass_name, capability, dtype, head_dim, window):
    from localdit.models.backends import _triton_version

    if _triton_version() < (3, 3) or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles with Triton 3.3 or newer, outside of the interpreter")
    compiled = compile_for(capability, pass_name, dtype, head_dim, window)
    assert compiled.metadata.shared <= 99 * 1024, "more shared memory than many GPUs have"
    assert "cubin" in compiled.asm


def test_without_a_gpu_or_the_interpreter_the_choice_says_why():
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernel can be used here")
    with pytest.raises(ValueError, match="CUDA devices, not on cpu.*'torch'"):
        attend_within_windows("triton", *draw(GRID)[0])


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=described)
def test_on_a_gpu(case, dtype):
    programs, case = split(case)
    drawn = draw(**case, dtype=dtype)
    check(run_kernel(*drawn, programs, device="cuda"), *drawn)


@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_picture_on_a_gpu(dtype):
    drawn = draw(WindowGrid(64, 65, 4, 1, 3), heads=16, head_dim=72, dtype=dtype, batch=2)
    results = run_kernel(*drawn, device="cuda")
    check(results, *drawn)
    again = run_kernel(*drawn, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@NEEDS_CUDA
def test_compiles_as_one_graph_on_a_gpu():
    from localdit.models import LocalDiTTransformer2DModel

    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(num_layers=2, caption_channels=16).cuda()
    latents = torch.randn(1, 4, 32, 48, device="cuda")
    text, timestep = torch.randn(1, 5, 16, device="cuda"), torch.tensor([3], device="cuda")
    sizes = {
        "resolution": torch.tensor([[256.0, 384.0]], device="cuda"),
        "aspect_ratio": torch.tensor([[1.5]], device="cuda"),
    }
    with torch.no_grad():
        eager, compiled = (
            call(latents, text, timestep, added_cond_kwargs=sizes, return_dict=False)[0]
            for call in (model, torch.compile(model, fullgraph=True))
        )
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
