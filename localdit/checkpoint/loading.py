"""Loading a checkpoint: find the model's configuration, check every tensor, read the values.

This module knows no model class: the class is an argument. It has to take its configuration as
keyword arguments, as `LocalDiTTransformer2DModel` does, and name its parameters like it.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import init_empty_weights
from torch import nn

from ..errors import Field, FieldValueError
from .layout import Layout, Route, flat_name, read_layout
from .reading import CheckpointFile, few

logger = logging.getLogger(__name__)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOAT_NAMES = ", ".join(map(str, FLOATS))

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class CheckpointReport:
    """The contents of a checkpoint, and the way they are loaded.

    Attributes:
        path: the file.
        kind: "safetensors" or "torch".
        dtype: dtype of its live tensors, e.g. "float32"; the widest if they differ.
        wrapper: key under which a `.pt` file has its state dict, or None.
        prefix: prefix that was stripped from all names, e.g. "module.".
        config: configuration of the model.
        live_values: number of values that the model uses.
        dead_values: number of values that it does not use: stale copies of projections.
        dead_names: names of the tensors with these values, as in the file.
        zeroed_layers: layers without a relative position bias in the file; it is set to zero.
        folded_layers: layers whose untrained global context is folded to its expectation.
        drawn_layers: layers whose untrained global context is drawn from a seed.
    """

    path: Path
    kind: str
    dtype: str
    wrapper: str | None
    prefix: str
    config: dict[str, Any]
    live_values: int
    dead_values: int
    dead_names: tuple[str, ...]
    zeroed_layers: tuple[int, ...]
    folded_layers: tuple[int, ...]
    drawn_layers: tuple[int, ...]

    def __str__(self) -> str:
        """Describe the checkpoint in one line."""
        heads = self.config["num_attention_heads"], self.config["attention_head_dim"]
        origin = f", under {self.wrapper!r}" if self.wrapper else ""
        origin += f", names without {self.prefix!r}" if self.prefix else ""
        parts = [
            f"{self.path} ({self.kind}, {self.dtype}{origin}): "
            f"{self.config['num_layers']} layers of {heads[0]} x {heads[1]} channels, "
            f"windows of {self.config['window_size']}, {self.live_values:,} live values",
        ]
        if self.dead_names:
            parts.append(
                f"{self.dead_values:,} dead values dropped "
                f"({len(self.dead_names):,} tensors, as {self.dead_names[0]})"
            )
        if self.folded_layers:
            parts.append(
                "untrained global context folded to its expectation, half of the local output, in "
                f"{len(self.folded_layers)} layers"
            )
        if self.drawn_layers:
            parts.append(f"global context drawn at random in {len(self.drawn_layers)} layers")
        if self.zeroed_layers:
            parts.append(f"relative position bias zero in {len(self.zeroed_layers)} layers")
        if self.config["use_global"] and not self.drawn_layers:
            parts.append("global context trained")
        return "; ".join(parts) + "."


@dataclass
class Plan(Generic[Model]):
    """A checkpoint that fits a model, before its values are read.

    Attributes:
        file, routes: the file, and the parameters that its tensors become.
        model: the model, with its parameters on the meta device.
        dtype: dtype of the model to load.
        seed: seed of a global context that is drawn.
        report: the contents of the checkpoint.
    """

    file: CheckpointFile
    routes: list[Route]
    model: Model
    dtype: torch.dtype
    seed: int | None
    report: CheckpointReport

    def load(self) -> Model:
        """Read the values into the model and return it, in evaluation mode."""
        state = self._read_state()
        self._add_missing(state)
        self.model.load_state_dict(state, assign=True)
        logger.info("%s", self.report)
        return self.model.eval()

    def _read_state(self) -> dict[str, torch.Tensor]:
        """Read the routed tensors into new ones, which do not refer to the file."""
        by_source: dict[str, list[Route]] = {}
        for route in self.routes:
            by_source.setdefault(route.source, []).append(route)
        shapes = parameter_shapes(self.model)
        # Allocated first and all at once: between tensors that are freed, they would leave holes.
        targets = dict.fromkeys(route.target for route in self.routes)
        state = {target: torch.empty(shapes[target], dtype=self.dtype) for target in targets}
        for name, tensor in self.file.tensors(by_source):
            for route in by_source[name]:
                rows = _part(state[route.target], route.target_part)
                rows.copy_(_part(tensor, route.source_part))
                if not _is_finite(rows):
                    narrow = _is_finite(tensor)
                    raise FieldValueError(
                        "{path}: {name!r} has values that are not finite{as_dtype}. Expected "
                        "finite ones: the file is damaged, or the training diverged"
                        + (", or a wider {field} is needed." if narrow else "."),
                        path=self.file.path,
                        name=name,
                        as_dtype=f" as {self.dtype}" if narrow else "",
                        field=Field("torch_dtype", "`torch_dtype`"),
                    )
        return state

    def _add_missing(self, state: dict[str, torch.Tensor]) -> None:
        """Add the weights that a released file lacks: position biases, and the global context."""
        for layer in self.report.zeroed_layers:
            name = f"transformer_blocks.{layer}.attn1.local_rel_pos_bias"
            state[name] = torch.zeros(self.model.get_parameter(name).shape, dtype=self.dtype)
        for layer in self.report.folded_layers:
            for kind in ("weight", "bias"):
                _part(state[f"transformer_blocks.{layer}.attn1.to_qkv.{kind}"], (2, 3)).mul_(0.5)
        if self.seed is None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            for layer in self.report.drawn_layers:
                name = f"transformer_blocks.{layer}.attn1.global_context"
                context: Any = self.model.get_submodule(name).to_empty(device="cpu")
                context.reset_parameters()
                for key, tensor in context.state_dict().items():
                    state[f"{name}.{key}"] = tensor.to(self.dtype)


def plan_loading(
    model_class: type[Model],
    path: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    global_context: str = "fold",
    seed: int | None = None,
    **overrides: Any,
) -> Plan[Model]:
    """Prepare to load a checkpoint into a new model, and refuse it unless every tensor fits.

    Arguments and errors are those of `localdit.checkpoint.load_transformer`.
    """
    require_float(torch_dtype)
    known = list(inspect.signature(model_class.__init__).parameters)[1:]
    _require_sound_arguments(known, global_context, seed, overrides)
    drawn = global_context == "draw"

    file = CheckpointFile(path)
    layout = read_layout(file.infos, str(path))
    released = not file.config and not any(layout.layer_types)
    if drawn and not released:
        raise FieldValueError(
            "{path} has 'attn1.processor.*' tensors or a configuration, which settle its "
            "attention, so there is no global context to draw. Leave {field} out.",
            path=path,
            field=Field("global_context", "`global_context`"),
        )
    stored = {name: value for name, value in file.config.items() if name in known}
    config = _resolve_config(layout, stored, overrides, drawn, str(path))
    model: Any = empty_model(model_class, config)

    shapes = parameter_shapes(model)
    absent = [name for name in shapes if released and flat_name(name) != name]
    layers = tuple(sorted({int(name.split(".")[1]) for name in absent}))
    dtype = _check(file, layout, {n: shape for n, shape in shapes.items() if n not in absent})
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
    return Plan(file, layout.routes, model, torch_dtype or dtype, seed, report)


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


def _resolve_config(
    layout: Layout, stored: dict[str, Any], overrides: dict[str, Any], drawn: bool, where: str
) -> dict[str, Any]:
    """Return the arguments of the model: from the tensors, then the caller, then the file."""
    facts = layout.facts
    # None leaves an argument to the model, except this one: there it means no projection.
    given = {n: v for n, v in overrides.items() if v is not None or n == "caption_channels"}
    for name, value in given.items():
        if name in facts and value != facts[name].value:
            raise ValueError(
                f"`{name}` is {value!r}, but {facts[name].evidence} in {where} implies "
                f"{facts[name].value!r}. Leave it out."
            )
    config = {**stored, **given, **{name: facts[name].value for name in facts}}

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
    pieces = {re.sub(r"\.to_[qkv]\.", ".to_qkv.", name) for name in layout.missing}
    missing = [name for name in expected if name not in targets and name not in pieces]
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
                f"{file.path}: {route.source!r} is {dtype}; expected one of {_FLOAT_NAMES}."
            )
    dtypes = (file.infos[route.source].dtype for route in layout.routes)
    return functools.reduce(torch.promote_types, dtypes)


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bound.isfinite() for bound in tensor.aminmax())  # makes no copy, spreads NaN


def _part(tensor: torch.Tensor, part: tuple[int, int]) -> torch.Tensor:
    index, count = part
    return tensor if count == 1 else tensor.chunk(count)[index]


def empty_model(model_class: type[Model], config: dict[str, Any]) -> Model:
    """Return a model with its parameters on the meta device, and its buffers computed."""
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return model_class(**config)


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of each parameter by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def require_float(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights are not stored in."""
    if dtype is not None and dtype not in FLOATS:
        raise FieldValueError(
            "{field} is {dtype}; choose one of {known}.",
            field=Field("torch_dtype", "`torch_dtype`"),
            dtype=dtype,
            known=_FLOAT_NAMES,
        )
