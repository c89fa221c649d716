"""LoRA adapters (Hu et al., 2022) of a pipeline's transformer: read and check their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
)

from ..checkpoint.reading import CheckpointFile, few
from ..models.transformer import LocalDiTTransformer2DModel

Tensors = dict[str, torch.Tensor]

NEEDS_PEFT = "LoRA needs peft 0.17 or higher: pip install 'localdit[lora]'"
PREFIX = "transformer."  # of the names of tensors in a file


def adapter_of(
    transformer: LocalDiTTransformer2DModel, adapter_name: str | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Return an adapter's tensors by name, and its settings.

    Args:
        transformer: the model with the adapter.
        adapter_name: name of the adapter, if the model has several.

    Raises:
        ValueError: if the adapter is missing, or there are several and none was named.
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


def bare(model: Any) -> Any:
    """Return the model that `torch.compile` has wrapped; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for JSON, with sets sorted: their order differs between processes."""
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()
    }


def local_file(
    source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **_: Any
) -> Path | None:
    """Return the file that a local file or folder stands for; None for a hub name.

    Raises:
        FileNotFoundError: if `source` looks like a path and is missing, or the folder lacks the
            file.
        ValueError: if the folder holds several files and none was named.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        if path.suffix or path.is_absolute() or len(path.parts) != 2:
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
                f"{folder} holds {few(file.name for file in found)}: say which with `weight_name`."
            )
    if not found:
        raise FileNotFoundError(f"{folder} holds no {weight_name or LORA_WEIGHT_NAME_SAFE}.")
    return found[0]


def read_adapter(file: Path) -> tuple[Tensors, dict[str, Any] | None]:
    """Return the tensors in a file, and the adapter's settings if the file has them.

    Raises:
        ValueError: if the file is damaged, or holds anything but tensors.
    """
    checkpoint = CheckpointFile(file)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors(checkpoint.infos)}
    text = checkpoint.metadata.get(LORA_ADAPTER_METADATA_KEY)
    try:
        return tensors, None if text is None else dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: its metadata {LORA_ADAPTER_METADATA_KEY!r} is no JSON object ({error})."
        ) from None


def require_adapter(tensors: Tensors, source: str) -> None:
    """Refuse tensors that are no LoRA of a transformer in Diffusers' layout, with ValueError."""
    if any(name.startswith(PREFIX) and "lora" in name for name in tensors):
        return
    if any(name.startswith("text_encoder") for name in tensors):
        return  # `require_no_text_encoder` refuses these
    hint = ""
    if any(name.startswith("transformer_blocks.") and "lora" in name for name in tensors):
        hint = " Load it with `pipe.transformer.load_lora_adapter(..., prefix=None)`."
    raise ValueError(
        f"{source} is no LoRA of a LocalDiT: it holds {few(tensors)}, but names such as "
        f"'{PREFIX}transformer_blocks.0.attn1.to_qkv.lora_A.weight' were expected.{hint}"
    )


def require_no_text_encoder(tensors: Tensors) -> None:
    """Refuse a LoRA with weights for a text encoder, with ValueError."""
    names = [name for name in tensors if name.startswith("text_encoder")]
    if names:
        raise ValueError(
            f"This LoRA is one of a text encoder as well ({few(names, 1)}), which LocalDiT does "
            f"not support. Pass a dict of the tensors whose names start with '{PREFIX}' to load "
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
            f"This LoRA is one of another model: the transformer has no {few(strangers)}."
        )
    for name, tensor in own.items():
        target, _, half = name.partition(".lora")
        width = _width(layers[target], half)
        given = tensor.shape[0 if half.startswith("_B") else 1] if tensor.ndim > 1 else width
        if width not in (None, given):
            raise ValueError(
                f"This LoRA is one of a model of another size: {name} is {tuple(tensor.shape)}, "
                f"but {target} is {width} wide."
            )


def _width(layer: torch.nn.Module, half: str) -> int | None:
    """Return a layer's input channels (for half A of an adapter) or output channels (half B)."""
    if half not in ("_A.weight", "_B.weight"):
        return None
    kinds = ("in_features", "in_channels") if half[1] == "A" else ("out_features", "out_channels")
    return next((getattr(layer, kind) for kind in kinds if hasattr(layer, kind)), None)
