"""The parameters and the sizes of a model, from the names and shapes in a checkpoint.

No values are read here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .reading import TensorInfo, few

PREFIXES = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.", "transformer.")

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")
_PROJECTION = re.compile(r"(transformer_blocks\.\d+\.attn[12])\.(to_\w+)\.(weight|bias)")
_LOCAL_BIAS = "attn1.local_rel_pos_bias"
_GLOBAL_CONTEXT = "attn1.global_context."

LAYER_TYPES = ("local", "local_pooled", "local_global", "full")
# What a layer can be whose tensors are those of a layer type in `Layout`. A released file lacks the
# relative position biases.
SAME_WEIGHTS: dict[str | None, tuple[str, ...]] = {
    "local": ("local", "local_pooled"),
    "local_global": ("local_global",),
    None: ("full", "local_pooled"),
}


class Route(NamedTuple):
    """Rows of a tensor in the file that become rows of a parameter.

    A part `(i, n)` is part i of n equal parts of the rows.
    """

    source: str
    target: str
    source_part: tuple[int, int] = (0, 1)
    target_part: tuple[int, int] = (0, 1)


class Fact(NamedTuple):
    """An argument of the model, and the tensors that it follows from."""

    value: Any
    evidence: str


@dataclass
class Layout:
    """The parameters that the tensors of a file become."""

    prefix: str  # prefix that was stripped from all names
    routes: list[Route] = field(default_factory=list)  # of the live tensors, in the file's order
    dead: list[str] = field(default_factory=list)  # tensors that the model does not use
    # Tensors without which the projections beside them cannot be used
    missing: list[str] = field(default_factory=list)
    facts: dict[str, Fact] = field(default_factory=dict)  # arguments of the model by name
    # "local_global" or "local" for each layer; None for a layer with neither a global context nor a
    # relative position bias. `SAME_WEIGHTS` has the layers that have the same tensors.
    layer_types: list[str | None] = field(default_factory=list)


def read_layout(infos: Mapping[str, TensorInfo], where: str) -> Layout:
    """Work out the layout of a file.

    Args:
        infos: shape and dtype of each tensor by the name it has in the file.
        where: the file, for messages.
    """
    prefix = common_prefix(infos)
    sources: dict[str, str] = {}  # our name -> name in the file
    for source in infos:
        name = our_name(source[len(prefix) :])
        if name in sources:
            raise ValueError(f"{where} holds {name!r} twice: as {sources[name]!r} and {source!r}.")
        sources[name] = source
    _refuse_foreign(sources, where)

    layout = Layout(prefix)
    _route(sources, layout)
    shapes = {name: infos[source].shape for name, source in sources.items()}
    num_layers = _count_layers(shapes, where)
    layout.facts = _facts(shapes, num_layers, where)
    for layer in range(num_layers):
        block = f"transformer_blocks.{layer}."
        kind = "local" if block + _LOCAL_BIAS in shapes else None
        if any(name.startswith(block + _GLOBAL_CONTEXT) for name in shapes):
            kind = "local_global"
        layout.layer_types.append(kind)
    return layout


def repeat_layer_types(pattern: str, num_layers: int) -> list[str]:
    """Return the type of each layer, from types that repeat: "local local full"."""
    return list(itertools.islice(itertools.cycle(pattern.split()), num_layers))


def our_name(name: str) -> str:
    """Return the model's name of a parameter that flat checkpoints name `attn1.processor.*`."""
    if name.endswith("attn1.processor.local_rel_pos_bias"):
        return name.replace("attn1.processor.", "attn1.")
    return name.replace("attn1.processor.", _GLOBAL_CONTEXT)


def flat_name(name: str) -> str:
    """Return the flat checkpoint's name of a parameter: the inverse of `our_name`."""
    name = name.replace(_GLOBAL_CONTEXT, "attn1.processor.")
    return name.replace(_LOCAL_BIAS, "attn1.processor.local_rel_pos_bias")


def common_prefix(names: Collection[str]) -> str:
    """Return the prefix that wrappers add to all names, e.g. "module._orig_mod."."""
    prefix = ""
    while True:
        for candidate in PREFIXES:
            if all(name.startswith(prefix + candidate) for name in names):
                prefix += candidate
                break
        else:
            return prefix


def _refuse_foreign(names: Collection[str], where: str) -> None:
    lora = [name for name in names if "lora_" in name or ".lora." in name]
    if lora:
        raise ValueError(
            f"{where} holds LoRA weights ({few(lora, 1)}); expected the weights of a whole model."
        )
    blocks = [name for name in names if _BLOCK.match(name) and ".attn1." in name]
    if not blocks:
        raise ValueError(
            f"{where} is not a LocalDiT checkpoint: expected tensors named "
            f"'transformer_blocks.0.attn1.*', found {few(names)}."
        )
    if not any(".attn1.norm_q." in name or ".attn1.norm_k." in name for name in blocks):
        raise ValueError(
            f"{where} is a PixArt checkpoint: expected norms of queries and keys as "
            "'transformer_blocks.0.attn1.norm_q.weight', found none, so it was trained with full "
            "attention. Load it with `diffusers.PixArtTransformer2DModel`."
        )


def _route(sources: Mapping[str, str], layout: Layout) -> None:
    """Find the parameter that each tensor becomes, or declare the tensor dead.

    If self-attention has a fused projection and separate ones, the fused one is live; in
    cross-attention the separate ones are.
    """
    for name, source in sources.items():
        match = _PROJECTION.fullmatch(name)
        attn, projection, kind = match.groups() if match else ("", "", "")

        def present(projections: str, attn: str = attn) -> bool:
            return any(
                f"{attn}.{one}.{kind}" in sources
                for one in projections.split()
                for kind in ("weight", "bias")
            )

        if attn.endswith("attn1") and projection in (separate := ["to_q", "to_k", "to_v"]):
            if present("to_qkv"):
                layout.dead.append(source)
                continue
            part = separate.index(projection), 3
            layout.routes.append(Route(source, f"{attn}.to_qkv.{kind}", target_part=part))
            needed = [f"{attn}.{one}.{each}" for one in separate for each in ("weight", "bias")]
            layout.missing += [
                one for one in needed if one not in sources and one not in layout.missing
            ]
        elif attn.endswith("attn2") and projection == "to_kv":
            if present("to_k to_v"):
                layout.dead.append(source)
                continue
            layout.routes.append(Route(source, f"{attn}.to_k.{kind}", source_part=(0, 2)))
            layout.routes.append(Route(source, f"{attn}.to_v.{kind}", source_part=(1, 2)))
        else:
            layout.routes.append(Route(source, name))


def _count_layers(names: Collection[str], where: str) -> int:
    layers = {int(match[1]) for name in names if (match := _BLOCK.match(name))}
    if max(layers) + 1 != len(layers):
        absent = next(layer for layer in range(len(layers)) if layer not in layers)
        raise ValueError(
            f"{where} holds blocks up to 'transformer_blocks.{max(layers)}', but none of "
            f"'transformer_blocks.{absent}.*'."
        )
    return len(layers)


def _facts(shapes: Mapping[str, tuple[int, ...]], num_layers: int, where: str) -> dict[str, Fact]:
    """Return the arguments of the model that follow from the shapes of its tensors."""

    def shape(*names: str, ndim: int) -> tuple[int, ...]:
        name = next((name for name in names if name in shapes), None)
        if name is None:
            raise ValueError(f"{where} lacks {names[0]!r}, which gives the size of the model.")
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise ValueError(
                f"{where}: {name!r} has shape {shapes[name]}; expected {ndim} axes, none empty."
            )
        return shapes[name]

    facts: dict[str, Fact] = {}

    def add(evidence: str, **values: Any) -> None:
        facts.update({name: Fact(value, f"{evidence!r}") for name, value in values.items()})

    patches = "pos_embed.proj.weight"
    dim, in_channels, patch_size, _ = shape(patches, ndim=4)
    add(patches, in_channels=in_channels, patch_size=patch_size)

    norm = "transformer_blocks.0.attn1.norm_q.weight"
    (head_dim,) = shape(norm, ndim=1)
    if dim % head_dim:
        raise ValueError(
            f"{where}: {patches!r} has {dim} channels, which do not divide into heads of the "
            f"{head_dim} channels of {norm!r}."
        )
    add(norm, attention_head_dim=head_dim, num_attention_heads=dim // head_dim)

    rows = shape("proj_out.weight", ndim=2)[0]
    if rows % patch_size**2:
        raise ValueError(
            f"{where}: 'proj_out.weight' has {rows} rows; expected a multiple of the "
            f"{patch_size} x {patch_size} of a patch."
        )
    add("proj_out.weight", out_channels=rows // patch_size**2)

    captions = "caption_projection.linear_1.weight"
    if captions in shapes:
        channels = shape(captions, ndim=2)[1]
        add(captions, caption_channels=channels, cross_attention_dim=dim)
    else:
        text = [f"transformer_blocks.0.attn2.{name}.weight" for name in ("to_k", "to_kv")]
        text_dim = shape(*text, ndim=2)[1]
        add("caption_projection.*", caption_channels=None)
        add(text[0], cross_attention_dim=text_dim)

    sized = "adaln_single.emb.resolution_embedder."
    add(f"{sized}*", use_additional_conditions=any(name.startswith(sized) for name in shapes))
    add("transformer_blocks.*", num_layers=num_layers)

    table = next((name for name in shapes if name.endswith(_LOCAL_BIAS)), None)
    if table is not None:
        rows = shape(table, ndim=2)[0]
        window_size = (math.isqrt(rows) + 1) // 2
        if (2 * window_size - 1) ** 2 != rows:
            raise ValueError(
                f"{where}: {table!r} has {rows} rows; expected (2 w - 1)^2 for a window of w."
            )
        add(table, window_size=window_size)
    return facts
