"""LoRA adapters (Hu et al., 2022) of a pipeline's transformer: read and check their files."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
)

from ..checkpoint.reading import CheckpointFile, few, require_finite
from ..files import CHECKPOINTS, is_hub_name, parse_json, user_path
from ..models.transformer import LocalDiTTransformer2DModel

Tensors = dict[str, torch.Tensor]

NEEDS_PEFT = "LoRA needs peft 0.17 or higher: pip install 'localdit[lora]'"
KEYWORDS = (  # that Diffusers' `load_lora_weights` has among its **kwargs
    "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage", "proxies",
    "return_lora_metadata", "revision", "subfolder", "token", "use_safetensors", "weight_name",
)  # fmt: skip
PREFIX = "transformer."  # of the names of tensors in a file
HALVES = (".lora_A.", ".lora_B.")
TEXT_ENCODERS = ("text_encoder", "lora_te")  # prefixes of adapters that are not the transformer's
KOHYA = "lora_unet_"  # the prefix of kohya's sd-scripts, whose names have "_" instead of "."

# peft takes the keys of patterns for regular expressions. These ones are matched in linear time.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\\.)+")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e9


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_pattern(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(_PLAIN.fullmatch(name) for name in value)
        and all(map(_is_number, value.values()))
        and len(value) <= 10_000
    )


# The settings that an adapter in a file may have. Any other one has to be at peft's default.
_SOUND: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value > 0, "a rank of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number below 1"),
    "rank_pattern": (_is_pattern, "numbers by the names of layers, not regular expressions"),
    "alpha_pattern": (_is_pattern, "numbers by the names of layers, not regular expressions"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "inference_mode": (_is_flag, "true or false"),
    "init_lora_weights": (
        lambda value: _is_flag(value) or value in ("gaussian", "orthogonal"),
        "true, false, 'gaussian' or 'orthogonal': others change the model's own weights",
    ),
}
# Settings that are replaced: the tensors say which layers have an adapter.
_CHOICE_OF_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Settings that record the adapter's history. Nothing here depends on them.
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type")


def adapter_of(
    transformer: LocalDiTTransformer2DModel, adapter_name: str | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Return an adapter's tensors by name, and its settings.

    Args:
        adapter_name: name of the adapter, if the model has several.
    """
    names = list(getattr(transformer, "peft_config", {}))
    if adapter_name is None and len(names) == 1:
        (adapter_name,) = names
    if adapter_name is None or adapter_name not in names:
        asked = "none was named" if adapter_name is None else f"{adapter_name!r} was asked for"
        raise ValueError(f"The transformer's adapters are {few(names) or 'none'}; {asked}.")
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
    return tensors, transformer.peft_config[adapter_name].to_dict()


def has_active(model: torch.nn.Module) -> bool:
    """Return whether a model has an adapter that is active: neither disabled nor fused."""
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "base_layer")]
    return any(
        layer.scaling.keys() & layer.active_adapters
        for layer in layers
        if not (layer.disable_adapters or layer.merged)
    )


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for JSON, with sets sorted: their order differs between processes."""
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()
    }


def adapter_file(
    source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **_: Any
) -> Path | None:
    """Return the file that a local file or folder stands for; None for a hub name.

    Raises:
        FileNotFoundError: if `source` looks like a path and is missing, or the folder lacks the
            file.
        ValueError: if the folder holds several files and none was named, or `source` is a file and
            another one was named.
    """
    path = user_path(source)
    if path.is_file():
        if subfolder or weight_name not in (None, path.name):
            raise ValueError(
                f"{path} is a file, so `weight_name` and `subfolder` have no effect: leave them "
                "out, or give the folder."
            )
        return path
    if not path.is_dir():
        if path.suffix in CHECKPOINTS or not is_hub_name(source):
            raise FileNotFoundError(
                f"There is no {path}: expected a file or folder of LoRA weights, or a hub name."
            )
        return None
    folder = path / (subfolder or "")
    names = [weight_name] if weight_name else [LORA_WEIGHT_NAME_SAFE, LORA_WEIGHT_NAME]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found and weight_name is None:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds {few(file.name for file in found)}: choose one with `weight_name`."
            )
    if not found:
        raise FileNotFoundError(f"{folder} holds no {weight_name or LORA_WEIGHT_NAME_SAFE}.")
    return found[0]


def read_adapter(file: Path) -> tuple[Tensors, dict[str, Any] | None]:
    """Return the tensors in a file, and the adapter's settings if the file has them."""
    checkpoint = CheckpointFile(file)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors(checkpoint.infos)}
    text = checkpoint.metadata.get(LORA_ADAPTER_METADATA_KEY)
    where = f"{file}: its metadata {LORA_ADAPTER_METADATA_KEY!r}"
    return tensors, None if text is None else parse_json(text, where)


def check_source(source: str | Path) -> None:
    """Refuse a local file or folder without a LoRA of a transformer, by its header alone.

    Raises:
        FileNotFoundError, ValueError: as `load_lora_weights` does.
    """
    if (file := adapter_file(source)) is not None:
        names = CheckpointFile(file).infos
        require_adapter(names, str(source))
        require_no_text_encoder(names)


def from_kohya(
    tensors: Tensors, metadata: dict[str, Any] | None, transformer: LocalDiTTransformer2DModel
) -> tuple[Tensors, dict[str, Any] | None]:
    """Return tensors and settings with Diffusers' names if they have kohya's, else as they are."""
    if not any(name.startswith(KOHYA) for name in tensors):
        return tensors, metadata
    layers = {name.replace(".", "_"): name for name, _ in transformer.named_modules()}
    halves = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    converted: Tensors = {}
    alphas = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.removeprefix(KOHYA).partition(".")
        if not name.startswith(KOHYA) or kind not in (*halves, "alpha"):
            raise ValueError(
                f"This LoRA has {name!r} among kohya's names; expected names such as "
                f"'{KOHYA}transformer_blocks_0_attn1_to_qkv.lora_down.weight', '.lora_up.weight' "
                "and '.alpha', and nothing else."
            )
        layer = layers.get(layer, layer)
        if kind == "alpha" and tensor.numel() == 1:
            alphas[layer] = float(tensor)
        elif kind != "alpha":
            converted[f"{PREFIX}{layer}.{halves[kind]}"] = tensor
    ranks = _ranks(converted)
    alphas = {layer: alphas.get(layer, float(rank)) for layer, rank in ranks.items()}
    settings = {
        "r": max(ranks.values(), default=1),
        "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.items()},
        "alpha_pattern": {f"^{layer}": alpha for layer, alpha in alphas.items()},
    }
    return converted, {PREFIX + name: value for name, value in settings.items()}


def _ranks(tensors: Tensors) -> dict[str, int]:
    """Return the rank of each layer's adapter."""
    half = ".lora_A.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(half): len(tensor)
        for name, tensor in tensors.items()
        if name.startswith(PREFIX) and name.endswith(half) and tensor.ndim
    }


def checked_settings(
    metadata: Mapping[str, Any] | None,
    tensors: Tensors,
    transformer: LocalDiTTransformer2DModel,
) -> dict[str, Any] | None:
    """Return the settings of an adapter, checked against its tensors.

    The tensors say which layers have an adapter and of which rank. Nothing in the settings is taken
    for a regular expression that could take long to match, and no weights are made without tensors.

    Args:
        metadata: settings as in a file, or None.

    Returns:
        The settings with the names in a file; None if they follow from the tensors alone.
    """
    ranks = _ranks(tensors)
    given = {
        name.removeprefix(PREFIX): value
        for name, value in (metadata or {}).items()
        if name.startswith(PREFIX)
    }
    if not given or not ranks:
        return None
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    if unknown := [name for name in given if name not in defaults]:
        raise ValueError(
            f"This LoRA has the unknown settings {few(unknown)} in its metadata: "
            "it may need a newer version of peft."
        )
    settings = {n: v for n, v in given.items() if n not in (*_CHOICE_OF_LAYERS, *_ORIGIN)}
    for name, value in settings.items():
        sound, expected = _SOUND.get(
            name, (lambda value, name=name: value == defaults[name], f"{defaults[name]!r}")
        )
        if not sound(value):
            _refuse(name, value, expected)
    settings = {"r": defaults["r"], **settings}
    pattern = settings.get("rank_pattern", {})
    for layer, rank in ranks.items():
        key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", layer)), None)
        name, claimed = ("rank_pattern", pattern[key]) if key else ("r", settings["r"])
        if claimed != rank:
            _refuse(name, claimed, f"{rank}, the rank of the tensors of {layer!r}")
    for name, half in {"use_dora": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias"}.items():
        if settings.get(name, False) != (present := any(half in tensor for tensor in tensors)):
            _refuse(name, not present, f"{present}, by its tensors")
    choice = [given.get(name) for name in _CHOICE_OF_LAYERS]
    targets = choice[0] if isinstance(choice[0], list) and len(choice[0]) <= 1000 else []
    chosen = {
        name
        for name, _ in transformer.named_modules()
        if any(name == one or name.endswith(f".{one}") for one in targets)
    }
    same = chosen == set(ranks) and not any(choice[1:])
    settings["target_modules"] = targets if same else list(ranks)
    return {PREFIX + name: value for name, value in settings.items()}


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(
        f"This LoRA has the setting {name!r} = {reprlib.repr(value)} in its metadata; expected "
        f"{expected}."
    )


def require_adapter(tensors: Collection[str], source: str) -> None:
    """Refuse tensors, by name, that are no LoRA of a transformer in Diffusers' layout."""
    if any(name.startswith((PREFIX, KOHYA)) and "lora" in name for name in tensors):
        own = [name for name in tensors if name.startswith(PREFIX)]
        a, b = ({name.partition(half)[0] for name in own if half in name} for half in HALVES)
        if odd := a ^ b:
            raise ValueError(f"{source} lacks one half of the adapter of {few(sorted(odd))}.")
        return
    if any(name.startswith(TEXT_ENCODERS) for name in tensors):
        return  # `require_no_text_encoder` refuses these
    hint = ""
    if any(name.startswith("transformer_blocks.") and "lora" in name for name in tensors):
        hint = " Load it with `pipe.transformer.load_lora_adapter(..., prefix=None)`."
    raise ValueError(
        f"{source} is not a LoRA for LocalDiT: it holds {few(tensors)}, but names such as "
        f"'{PREFIX}transformer_blocks.0.attn1.to_qkv.lora_A.weight' were expected.{hint}"
    )


def require_no_text_encoder(tensors: Collection[str]) -> None:
    """Refuse a LoRA with weights, by name, for a text encoder, with ValueError."""
    names = [name for name in tensors if name.startswith(TEXT_ENCODERS)]
    if names:
        raise ValueError(
            f"This LoRA also adapts a text encoder ({few(names, 1)}), which LocalDiT does not "
            f"support. Pass a dict of the tensors whose names start with '{PREFIX}' to load "
            "the rest."
        )


def require_fit(tensors: Tensors, transformer: LocalDiTTransformer2DModel) -> None:
    """Refuse adapters of layers that are missing or have another width, with ValueError."""
    layers = {
        name: getattr(module, "base_layer", module) for name, module in transformer.named_modules()
    }
    own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    strangers = dict.fromkeys(
        target for name in own if (target := name.partition(".lora")[0]) not in layers
    )
    if strangers:
        raise ValueError(
            f"This LoRA was made for another model: the transformer has no {few(strangers)}."
        )
    ranks = _ranks(tensors)
    for name, tensor in own.items():
        require_finite("This LoRA", name, tensor)
        target, _, half = name.partition(".lora")
        if (width := _width(layers[target], half)) is None:
            continue
        given, rank = tensor.shape[:2] if tensor.ndim > 1 else (None, None)
        if half.startswith("_A"):
            given, rank = rank, given
        if given != width:
            raise ValueError(
                f"This LoRA was made for a model of another size: {name} is {tuple(tensor.shape)}, "
                f"but {target} is {width} wide."
            )
        if not rank or rank != ranks.get(target, rank):
            raise ValueError(f"This LoRA has two halves of different rank for {target}.")


def _width(layer: torch.nn.Module, half: str) -> int | None:
    """Return a layer's input channels (for half A of an adapter) or output channels (half B)."""
    if half not in ("_A.weight", "_B.weight"):
        return None
    kinds = ("in_features", "in_channels") if half[1] == "A" else ("out_features", "out_channels")
    return next((getattr(layer, kind) for kind in kinds if hasattr(layer, kind)), None)
