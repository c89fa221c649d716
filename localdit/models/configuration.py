"""The transformer's configuration: presets, checks of values, and the kind of each layer."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from inspect import Signature
from typing import Any

from ..checkpoint.layout import LAYER_TYPES, repeat_layer_types
from ..errors import Field, FieldValueError

PRESETS: dict[str, dict[str, Any]] = {
    # The released 0.52B model, without global context: the defaults of the class.
    "released": {},
    # The released blocks for compact latents, at 1024 x 1024 pixels. Like the released model, they
    # are conditioned on the picture's size, which their `sample_size` does not imply, and a picture
    # spans positions from 0 to 32.
    # AutoencoderDC: 32 channels, 32 pixels per latent. A token is 32 x 32 pixels.
    "released-f32": {
        "in_channels": 32,
        "out_channels": 32,
        "sample_size": 32,
        "patch_size": 1,
        "interpolation_scale": 1,
        "use_additional_conditions": True,
    },
    # 16 pixels per latent: a token is 16 x 16 pixels, as in the released model.
    "released-f16": {
        "in_channels": 32,
        "out_channels": 32,
        "sample_size": 64,
        "patch_size": 1,
        "interpolation_scale": 2,
        "use_additional_conditions": True,
    },
    # To try things on a laptop's processor: 128 x 128 pixels with 8 pixels per latent. The layer
    # types are those of the best hybrid in docs/study.md.
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "num_layers": 6,
        "sample_size": 16,
        "layer_types": "local local full",
        "caption_channels": 128,
    },
}
"""Shapes by name, as keyword arguments: `LocalDiTTransformer2DModel(**PRESETS["tiny"])`."""

# The largest sound value of each size. A configuration may be damaged, or written to do harm.
_LARGEST = {
    "num_attention_heads": 1024,
    "attention_head_dim": 1024,
    "in_channels": 65536,
    "out_channels": 65536,
    "num_layers": 1024,
    "cross_attention_dim": 65536,
    "sample_size": 65536,
    "patch_size": 256,
    "window_size": 1024,
    "caption_channels": 65536,
    "num_embeds_ada_norm": 2**31,
}
# The other numbers: the least value, and the largest.
_RANGES = {
    "dropout": (0, 1),
    "qk_norm_eps": (0, 1),
    "norm_eps": (0, 1),
    "interpolation_scale": (1e-6, 1e6),
}
_TYPES: dict[str, type] = {"do_rope": bool, "use_global": bool, "use_additional_conditions": bool}
_TYPES |= {"shift_schedule": str, "norm_type": str}
# The activations of Diffusers' feed-forward.
_ACTIVATIONS = (
    "gelu",
    "gelu-approximate",
    "geglu",
    "geglu-approximate",
    "swiglu",
    "linear-silu",
)


def require_sound_arguments(arguments: Mapping[str, Any], signature: Signature) -> None:
    """Refuse arguments of the transformer before they cost memory.

    Args:
        arguments: by name; names that are unknown here are not checked.
        signature: the annotations of the transformer's parameters, which say what may be None.
    """
    optional = signature.parameters
    for name, value in arguments.items():
        if value is None and name in optional and "None" in str(optional[name].annotation):
            continue
        if name in _LARGEST:
            least: float = 0 if name == "num_layers" else 1  # benchmarks use a model without blocks
            sound = type(value) is int and least <= value <= _LARGEST[name]
            expected = f"it has to be at least {least}, an integer of at most {_LARGEST[name]:,}"
        elif name in _RANGES:
            least, largest = _RANGES[name]
            sound = type(value) in (int, float) and least <= value <= largest
            expected = f"it has to be a number from {least} to {largest}"
        elif name in _TYPES:
            sound = type(value) is _TYPES[name]
            expected = f"it has to be a {_TYPES[name].__name__}"
        elif name == "activation_fn":
            sound = type(value) is str and value in _ACTIVATIONS
            expected = f"choose one of {', '.join(_ACTIVATIONS)}"
        elif name == "layer_types":
            names = (value.split() or None) if type(value) is str else value
            sound = isinstance(names, (list, tuple)) and all(one in LAYER_TYPES for one in names)
            expected = (
                "it has to be a list with the type of each layer, or a string of types that "
                f"repeat; the types are {', '.join(LAYER_TYPES)}"
            )
        else:
            continue
        if not sound:
            raise FieldValueError(
                "{field} is {value}; {expected}.",
                field=Field(name, f"`{name}`"),
                value=reprlib.repr(value),
                expected=expected,
            )


def public_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments in a configuration, without entries such as `_class_name`."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def resolve_layer_types(
    layer_types: str | list[str] | None, num_layers: int, use_global: bool
) -> list[str]:
    """Return the kind of attention of each layer."""
    if layer_types is None:
        return ["local_global" if use_global else "local"] * num_layers
    if isinstance(layer_types, str):
        layer_types = repeat_layer_types(layer_types, num_layers)
    if len(layer_types) != num_layers:
        raise ValueError(
            f"`layer_types` names {len(layer_types)} layers, but `num_layers` is {num_layers}. "
            "List every layer, or give a string of types that repeat."
        )
    if use_global != ("local_global" in layer_types):
        raise ValueError(
            f"`use_global` is {use_global}, but `layer_types` "
            f"{'has no' if use_global else 'has a'} 'local_global' layer. Make the two agree."
        )
    return list(layer_types)


def count_layer_types(layer_types: Iterable[str]) -> str:
    """Return the number of layers of each type, as "14 local, 4 full"."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(layer_types).items())
