"""From a checkpoint to a model: settle its configuration, check every tensor, read it in."""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..errors import Field, FieldValueError
from ..models import LocalDiTTransformer2DModel
from ..models.attention import GlobalContext
from .layout import Layout, Route, name_is_of_processor, read_layout
from .reading import CheckpointFile, few
from .report import CheckpointReport

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Plan:
    """Everything settled before the first value is read."""

    file: CheckpointFile
    layout: Layout
    model: LocalDiTTransformer2DModel  # its parameters without values
    dtype: torch.dtype
    report: CheckpointReport


def load_transformer(
    path: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    global_context: str = "fold",
    seed: int | None = None,
    **overrides: Any,
) -> LocalDiTTransformer2DModel:
    """Load a checkpoint in one file: `.safetensors`, or `.pt` with nothing but tensors in it.

    Layers, widths, heads, window, patch, channels and global context are read off the tensors; the
    rest is taken from `overrides`, then from the configuration that `convert_to_single_file` leaves
    in a file, then from the defaults of the class, which are those of the released model.

    The released model lacks the weights of the global context with which it was computed: they were
    drawn anew each time. Their values are symmetric about zero, so the expected output of attention
    is half of its local output, and by default that half is folded into the rows of `to_qkv` that
    make the values. Nothing is folded where a file has relative position biases or a global
    context, nor in layers declared "full" by `layer_types`.

    Args:
        path: the file. Its kind is told by its content.
        torch_dtype: dtype of the model; None keeps the file's (the narrowest that holds all of
            them, where live tensors differ).
        global_context: what to do where a file of the released kind lacks it: "fold", or "draw" it
            at random as PyTorch initialises linear and convolutional layers, position biases zero.
        seed: for "draw"; the same seed gives the same model.
        **overrides: arguments of `LocalDiTTransformer2DModel`.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no checkpoint of a LocalDiT, if tensors are missing,
            unexpected, of the wrong shape or not finite, or if an argument contradicts them.
        TypeError: for an unknown argument.
    """
    require_float(torch_dtype)
    plan = make_plan(path, global_context, seed, overrides)
    dtype = torch_dtype or plan.dtype
    state = read_state(plan.file, plan.layout.routes, parameter_shapes(plan.model), dtype)
    _supply(plan, state, dtype, seed)
    plan.model.load_state_dict(state, assign=True)
    logger.info("%s", plan.report)
    return plan.model.eval()


def inspect_checkpoint(
    path: str | Path, *, global_context: str = "fold", seed: int | None = None, **overrides: Any
) -> CheckpointReport:
    """Check a checkpoint as `load_transformer` does and say what is in it, reading no weights.

    Args and errors are those of `load_transformer`.
    """
    return make_plan(path, global_context, seed, overrides).report


def make_plan(
    path: str | Path, global_context: str, seed: int | None, overrides: dict[str, Any]
) -> Plan:
    """Settle what becomes of a file, and refuse it unless every tensor has its place."""
    known = list(inspect.signature(LocalDiTTransformer2DModel.__init__).parameters)[1:]
    _require_sound_arguments(known, global_context, seed, overrides)
    drawn = global_context == "draw"

    file = CheckpointFile(path)
    layout = read_layout(file.infos, str(path))
    released = not file.config and not any(layout.layer_types)
    if drawn and not released:
        raise FieldValueError(
            "{path} describes its attention by 'attn1.processor.*' tensors or by its "
            "configuration, so there is no global context to draw. Leave {field} out.",
            path=path,
            field=Field("global_context", "`global_context`"),
        )
    stored = {name: value for name, value in file.config.items() if name in known}
    model = empty_model(_settle(layout, stored, overrides, drawn, str(path)))

    shapes = parameter_shapes(model)
    supplied = [name for name in shapes if released and name_is_of_processor(name)]
    layers = tuple(sorted({int(name.split(".")[1]) for name in supplied}))
    dtype = _check(file, layout, {n: shape for n, shape in shapes.items() if n not in supplied})
    live = {route.source for route in layout.routes}
    report = CheckpointReport(
        path=file.path,
        kind=file.kind,
        dtype=str(dtype).removeprefix("torch."),
        wrapper=file.wrapper,
        prefix=layout.prefix,
        config={name: model.config[name] for name in known},
        live_values=sum(file.infos[name].values for name in live),
        dead_values=sum(file.infos[name].values for name in layout.dead),
        dead_names=tuple(layout.dead),
        zeroed_layers=layers,
        folded_layers=() if drawn else layers,
        drawn_layers=layers if drawn else (),
    )
    return Plan(file, layout, model, dtype, report)


def _require_sound_arguments(
    known: list[str], global_context: str, seed: int | None, overrides: dict[str, Any]
) -> None:
    if global_context not in ("fold", "draw"):
        raise FieldValueError(
            "{field} is {value!r}; choose 'fold' or 'draw'.",
            field=Field("global_context", "`global_context`"),
            value=global_context,
        )
    if (global_context == "draw") != (seed is not None):
        raise FieldValueError(
            "{seed} goes with {global_context} 'draw': give both, or neither.",
            seed=Field("seed", "`seed`"),
            global_context=Field("global_context", "`global_context`"),
        )
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise TypeError(f"Unknown arguments {few(unknown)}; the model takes {', '.join(known)}.")


def _settle(
    layout: Layout, stored: dict[str, Any], overrides: dict[str, Any], drawn: bool, where: str
) -> dict[str, Any]:
    """The arguments of the model: what the tensors tell, then the caller, then the file."""
    told = layout.told
    # None leaves it to the model, except here, where it means that there is no projection.
    given = {n: v for n, v in overrides.items() if v is not None or n == "caption_channels"}
    for name, value in given.items():
        if name in told and value != told[name].value:
            raise ValueError(
                f"`{name}` is {value!r}, but {told[name].evidence} in {where} tells "
                f"{told[name].value!r}. Leave it out."
            )
    config = {**stored, **given, **{name: told[name].value for name in told}}

    claimed = given.get("layer_types") or stored.get("layer_types") or []
    default = "local_global" if drawn else "local"
    layer_types = [
        kind or ("full" if claimed[layer : layer + 1] == ["full"] else default)
        for layer, kind in enumerate(layout.layer_types)
    ]
    use_global = "local_global" in layer_types
    for name, value in (("layer_types", layer_types), ("use_global", use_global)):
        if name in given and given[name] != value:
            raise ValueError(
                f"`{name}` is {given[name]!r}, but the tensors 'transformer_blocks.*.attn1.*' in "
                f"{where} make it {value!r}."
            )
    uniform = set(layer_types) in ({"local"}, {"local_global"})
    return {**config, "use_global": use_global, "layer_types": None if uniform else layer_types}


def _check(file: CheckpointFile, layout: Layout, expected: dict[str, torch.Size]) -> torch.dtype:
    """Refuse tensors that are missing, unexpected, or of the wrong shape or dtype.

    Returns:
        The narrowest dtype that holds all live tensors.
    """
    targets = {route.target for route in layout.routes}
    missing = [n for n in expected if n not in targets and not _pieces(n, layout)]
    missing += layout.missing
    unexpected = [route.source for route in layout.routes if route.target not in expected]
    if missing or unexpected:
        found = [f"lacks {few(missing)}"] if missing else []
        found += [f"has unexpected {few(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{file.path} {' and '.join(found)}: of {len(expected):,} parameters, "
            f"{len(missing):,} are missing, and {len(unexpected):,} tensors are unexpected."
        )
    for route in layout.routes:
        shape, dtype = file.infos[route.source]
        rows, *rest = expected[route.target]
        wanted = (rows * route.source_part[1] // route.target_part[1], *rest)
        if shape != wanted:
            raise ValueError(f"{file.path}: {route.source!r} has shape {shape}; expected {wanted}.")
        if dtype not in FLOATS:
            raise ValueError(
                f"{file.path}: {route.source!r} is {dtype}; expected one of {_listed(FLOATS)}."
            )
    dtypes = (file.infos[route.source].dtype for route in layout.routes)
    return functools.reduce(torch.promote_types, dtypes)


def _pieces(name: str, layout: Layout) -> bool:
    """Whether the parameter's absence is already told by that of a separate projection."""
    attn, _, kind = name.rpartition(".to_qkv.")
    return bool(attn) and f"{attn}.to_q.{kind}" in layout.missing


def read_state(
    file: CheckpointFile,
    routes: list[Route],
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Read the routed tensors into fresh ones; nothing keeps hold of the file."""
    by_source: dict[str, list[Route]] = {}
    for route in routes:
        by_source.setdefault(route.source, []).append(route)
    # All at once and first: interleaved with what is freed again, they would leave holes.
    targets = dict.fromkeys(route.target for route in routes)
    state = {target: torch.empty(shapes[target], dtype=dtype) for target in targets}
    for name, tensor in file.tensors(by_source):
        for route in by_source[name]:
            rows = _part(state[route.target], route.target_part)
            rows.copy_(_part(tensor, route.source_part))
            if not _is_finite(rows):
                narrow = _is_finite(tensor)
                raise FieldValueError(
                    "{path}: {name!r} has values that are not finite{as_dtype}. Expected "
                    "finite ones: the file is damaged, or the training diverged"
                    + (", or a wider {field} is needed." if narrow else "."),
                    path=file.path,
                    name=name,
                    as_dtype=f" as {dtype}" if narrow else "",
                    field=Field("torch_dtype", "`torch_dtype`"),
                )
    return state


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bound.isfinite() for bound in tensor.aminmax())  # makes no copy, spreads NaN


def _part(tensor: torch.Tensor, part: tuple[int, int]) -> torch.Tensor:
    index, count = part
    return tensor if count == 1 else tensor.chunk(count)[index]


def _supply(
    plan: Plan, state: dict[str, torch.Tensor], dtype: torch.dtype, seed: int | None
) -> None:
    """Supply what the released kind lacks: position biases, and the global context's part."""
    config = plan.model.config
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    for layer in plan.report.zeroed_layers:
        name = f"transformer_blocks.{layer}.attn1.local_rel_pos_bias"
        state[name] = torch.zeros(parameter_shapes(plan.model)[name], dtype=dtype)
    for layer in plan.report.folded_layers:
        for kind in ("weight", "bias"):
            _part(state[f"transformer_blocks.{layer}.attn1.to_qkv.{kind}"], (2, 3)).mul_(0.5)
    if seed is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer in plan.report.drawn_layers:
            drawn = GlobalContext(heads, head_dim, config["window_size"])
            for name, tensor in drawn.state_dict().items():
                state[f"transformer_blocks.{layer}.attn1.global_context.{name}"] = tensor.to(dtype)


def empty_model(config: dict[str, Any]) -> LocalDiTTransformer2DModel:
    """The model with its parameters on the meta device, and its buffers computed."""
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return LocalDiTTransformer2DModel(**config)


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shape of each parameter by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def require_float(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights are not kept in."""
    if dtype is not None and dtype not in FLOATS:
        raise FieldValueError(
            "{field} is {dtype}; choose one of {known}.",
            field=Field("torch_dtype", "`torch_dtype`"),
            dtype=dtype,
            known=_listed(FLOATS),
        )


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))
