"""Loading a checkpoint: find the model's configuration, check every tensor, read the values.

This module knows no model class: the class is an argument. It has to take its configuration as
keyword arguments, as `LocalDiTTransformer2DModel` does, and name its parameters like it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import logging
import re
import reprlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin
from torch import nn

from ..errors import Field, FieldValueError
from ..files import lora_note, read_json
from .layout import (
    LAYER_TYPES,
    SAME_WEIGHTS,
    Layout,
    Route,
    flat_name,
    read_layout,
    repeat_layer_types,
)
from .reading import CheckpointFile, few, folder_files, is_finite, open_files, require_finite

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
    """A checkpoint that fits a model, before its values are read."""

    file: CheckpointFile
    routes: list[Route]  # the parameters that its tensors become
    model: Model  # with its parameters on the meta device
    dtype: torch.dtype  # of the model to load
    seed: int | None  # of a global context that is drawn
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
                rows = part_of(state[route.target], route.target_part)
                rows.copy_(part_of(tensor, route.source_part))
                require_finite(self.file.path, name, rows, stored=tensor)
        return state

    def _add_missing(self, state: dict[str, torch.Tensor]) -> None:
        """Add the weights that a released file lacks: position biases, and the global context."""
        for layer in self.report.zeroed_layers:
            name = f"transformer_blocks.{layer}.attn1.local_rel_pos_bias"
            state[name] = torch.zeros(self.model.get_parameter(name).shape, dtype=self.dtype)
        for layer in self.report.folded_layers:
            for kind in ("weight", "bias"):
                part_of(state[f"transformer_blocks.{layer}.attn1.to_qkv.{kind}"], (2, 3)).mul_(0.5)
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
            "{path} has 'attn1.processor.*' tensors or a configuration, which determine its "
            "attention, so there is no global context to draw. Leave {field} out.",
            path=path,
            field=Field("global_context", "`global_context`"),
        )
    stored = {name: value for name, value in file.config.items() if name in known}
    config = _resolve_config(layout, stored, overrides, drawn, str(path))
    try:
        model: Any = empty_model(model_class, **config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

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
    require_known("The model", overrides, known)


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
    num_layers = len(layout.layer_types)
    if isinstance(claimed, str):
        claimed = repeat_layer_types(claimed, num_layers)
    if not isinstance(claimed, (list, tuple)) or not all(one in LAYER_TYPES for one in claimed):
        raise ValueError(
            f"{where}: `layer_types` is {reprlib.repr(claimed)}; expected a list or a string of "
            f"{', '.join(LAYER_TYPES)}."
        )
    default = "local_global" if drawn else "local"
    layer_types = [
        claim if claim in SAME_WEIGHTS[kind] else kind or default
        for kind, claim in itertools.zip_longest(layout.layer_types, claimed[:num_layers])
    ]
    if "layer_types" in given:
        given["layer_types"] = list(claimed)
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


def read_folder(
    model_class: type[nn.Module],
    folder: Path,
    *,
    variant: str | None = None,
    whole: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, CheckpointFile]]:
    """Return the configuration of a Diffusers folder, and the file of each of its tensors.

    The sizes in the configuration are compared with the header of the weights before a model of
    these sizes is built. No values are read.

    Args:
        variant: part of the files' names, such as "fp16".
        whole: also refuse the folder unless its tensors are those of the model.
        **options: arguments of the model, which replace those in the configuration, and others.

    Raises:
        FileNotFoundError: if the configuration or a part of the weights is missing.
        ValueError: if the weights and the configuration don't match, or one of them is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no 'config.json': not the folder of a transformer.{lora_note(folder)}"
        )
    config = read_json(path)
    files = open_files(folder_files(folder, variant))
    if not files or config.get("quantization_config"):  # quantized weights have other names
        return config, files
    infos = {name: file.infos[name] for name, file in files.items()}
    known = [*inspect.signature(model_class.__init__).parameters][1:]
    arguments = {name: value for name, value in {**config, **options}.items() if name in known}
    layout = read_layout(infos, str(folder))
    for name, fact in layout.facts.items():
        if arguments.get(name) not in (None, fact.value):
            raise FieldValueError(
                "{path}: {field} is {value}, but {evidence} in the weights beside it implies "
                "{fact!r}.",
                path=path,
                field=Field(name, f"`{name}`"),
                value=reprlib.repr(arguments[name]),
                evidence=fact.evidence,
                fact=fact.value,
            )
    files = {name: file for name, file in files.items() if name not in layout.dead}
    if whole:
        try:
            expected = parameter_shapes(empty_model(model_class, **arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        wrong = [n for n in {**expected, **files} if n not in files or n not in expected]
        wrong += [n for n in files if n not in wrong and infos[n].shape != expected[n]]
        if wrong:
            raise ValueError(
                f"{folder}: {few(wrong)} missing, unexpected, or of another shape than its "
                "'config.json' asks for."
            )
    return config, files


def bare(model: Any) -> Any:
    """Return the model that `torch.compile` has wrapped; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def require_savable(model: nn.Module) -> None:
    """Refuse a model whose saved folder would load as another one; warn if it would not load."""
    name = type(model).__name__
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"The {name} has adapters, and its folder would not load with them. Save them with "
            "`save_lora_weights`, and remove them with `unload_lora_weights()`; after "
            "`fuse_lora()`, their effect stays in the weights that are saved."
        )
    if getattr(model, "hf_quantizer", None) or getattr(model, "hf_device_map", None):
        return  # the library that quantized or spread the model saves it as such, or refuses
    state = model.state_dict()
    groups = [getattr(hook, "group", None) for module in model.modules() for hook in _hooks(module)]
    away = [n for n, t in state.items() if not isinstance(t, torch.Tensor) or t.is_meta]
    if away or any(getattr(group, "offload_to_disk_path", None) for group in groups):
        raise ValueError(
            f"Some weights of the {name} are not in memory: it is offloaded or quantized. Save it "
            "before that, or after `remove_all_hooks()`, or load it again."
        )
    if isinstance(model, ConfigMixin):
        fresh = empty_model(type(model).from_config, model.config).state_dict()
        lost = [n for n, t in fresh.items() if n not in state or t.shape != state[n].shape]
        if lost:
            raise ValueError(
                f"The {name} lacks {few(lost)}: its layers were replaced, and its folder would "
                "not load as this model. Save it before you replace them."
            )
    not_finite = [n for n, tensor in model.named_parameters() if not is_finite(tensor)]
    if not_finite:
        logger.warning(
            "The %s has values that are not finite in %s: it can be saved, but not loaded again.",
            name, few(not_finite),
        )  # fmt: skip


def _hooks(module: nn.Module) -> Collection[Any]:
    """Return the hooks that Diffusers has put on a module."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    return registry.hooks.values() if registry else ()


def part_of(tensor: torch.Tensor, part: tuple[int, int]) -> torch.Tensor:
    """Return a view of the part `(i, n)` of a tensor: part i of n equal parts of its rows."""
    index, count = part
    return tensor if count == 1 else tensor.chunk(count)[index]


def empty_model(make: Callable[..., Model], *args: Any, **options: Any) -> Model:
    """Return the model that `make` makes of the arguments, without weights.

    Its parameters are on the meta device, and its buffers are computed. No random numbers are used
    up.
    """
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return make(*args, **options)


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of each parameter by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def require_known(user: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse the name of an argument that `user` does not take, with TypeError."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"the closest is {close[0]!r}" if close else "check its spelling"
            raise TypeError(f"{user} takes no argument {name!r}; {hint}.")


def require_float(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights are not stored in."""
    if dtype is not None and dtype not in FLOATS:
        raise FieldValueError(
            "{field} is {dtype}; choose one of {known}.",
            field=Field("torch_dtype", "`torch_dtype`"),
            dtype=dtype,
            known=_FLOAT_NAMES,
        )
