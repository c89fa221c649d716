"""LoRA adapters (Hu et al., 2022) of a pipeline's transformer: loaded, saved, weighed, fused.

Most of it is Diffusers' own. What is added here refuses, with a message that says why, what can't
be a LoRA of this transformer, and saves an adapter with all that its file has to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.loaders.lora_base import (
    LORA_ADAPTER_METADATA_KEY,
    LORA_WEIGHT_NAME,
    LORA_WEIGHT_NAME_SAFE,
)
from diffusers.utils import USE_PEFT_BACKEND
from safetensors import safe_open

from ..checkpoint.reading import CheckpointFile, few
from ..models.transformer import LocalDiTTransformer2DModel

Tensors = dict[str, torch.Tensor]

NEEDS_PEFT = "LoRA needs peft 0.17 or higher: pip install 'localdit[lora]'"
PREFIX = "transformer."  # of the names of tensors in a file


class LocalDiTLoraLoaderMixin(SanaLoraLoaderMixin):
    """LoRA for a pipeline with a `transformer`; adapters of text encoders are not supported.

    Diffusers' loader for Sana is the one that knows a transformer and nothing else.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Tensors,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter into the transformer and make it active.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder with one, a hub name, or tensors
                by name. Beside `.safetensors`, a `.bin` or `.pt` of plain tensors is read; nothing
                in it is executed.
            adapter_name: what the adapter is called from now on; by default `default_0` and so on.
            hotswap: whether to put the weights in the place of those of `adapter_name`.
            **kwargs: as Diffusers takes them: `weight_name`, `subfolder`, `revision`, `token` ...

        Raises:
            ImportError: if peft is missing.
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or holds no LoRA, or it is one of another model.
        """
        if not USE_PEFT_BACKEND:
            raise ImportError(NEEDS_PEFT)
        super().load_lora_weights(
            pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs
        )

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | Path | Tensors, **kwargs: Any
    ) -> Tensors | tuple[Tensors, dict[str, Any] | None]:
        """The tensors of an adapter by name, and with `return_lora_metadata` its settings as well.

        Raises:
            FileNotFoundError, ValueError: as `load_lora_weights` does.
        """
        source = pretrained_model_name_or_path_or_dict
        with_metadata = kwargs.pop("return_lora_metadata", False)
        metadata = None
        if isinstance(source, dict):
            tensors = super().lora_state_dict(source, **kwargs)
        elif (file := _local_file(source, **kwargs)) is not None:
            tensors, metadata = _read(file)
        else:
            kwargs.setdefault("use_safetensors", True)
            tensors, metadata = super().lora_state_dict(
                str(source), return_lora_metadata=True, **kwargs
            )
        if not isinstance(source, dict):  # of a dict, Diffusers warns that it is of no use
            _require_adapter(tensors, str(source))
        _require_no_text_encoder(tensors)
        return (tensors, metadata) if with_metadata else tensors

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Tensors,
        transformer: LocalDiTTransformer2DModel,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make sure that an adapter fits the transformer, then put it in.

        Raises:
            ValueError: if it does not.
        """
        _require_fit(state_dict, _bare(transformer))
        super().load_lora_into_transformer(state_dict, transformer, *args, **kwargs)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Tensors | LocalDiTTransformer2DModel | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        *,
        adapter_name: str | None = None,
    ) -> None:
        """Write an adapter to `pytorch_lora_weights.safetensors`, as `load_lora_weights` reads it.

        Args:
            save_directory: folder to write to; made where there is none.
            transformer_lora_layers: the transformer whose adapter is to be saved, with its rank,
                alpha and targets. Or tensors by name, as Diffusers' training scripts pass them:
                then `transformer_lora_adapter_metadata` has to say those; without it, alpha is
                taken to be the rank when the file is loaded.
            is_main_process, weight_name, save_function: as in Diffusers.
            safe_serialization, transformer_lora_adapter_metadata: likewise.
            adapter_name: which of the transformer's adapters; not needed where there is one.

        Raises:
            ValueError: if there is no such adapter, or `save_directory` is a file.
        """
        layers, metadata = _bare(transformer_lora_layers), transformer_lora_adapter_metadata
        if isinstance(layers, LocalDiTTransformer2DModel):
            layers, metadata = adapter_of(layers, adapter_name)
        if Path(save_directory).is_file():
            raise ValueError(f"{save_directory} is a file; expected a folder to write to.")
        super().save_lora_weights(
            save_directory,
            layers,
            is_main_process,
            weight_name,
            save_function,
            safe_serialization,
            _as_json(metadata) if metadata else None,
        )


def adapter_of(
    transformer: LocalDiTTransformer2DModel, adapter_name: str | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """An adapter's tensors by name, and its settings.

    Args:
        transformer: the model that has it.
        adapter_name: which; not needed where there is one.

    Raises:
        ValueError: if the model has no such adapter, or several and none was named.
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


def _bare(model: Any) -> Any:
    """The model inside one that `torch.compile` made; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them, the same in every process: sets have no order."""
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()
    }


def _local_file(
    source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **_: Any
) -> Path | None:
    """The file that is meant, if `source` is one or a folder here; None if it is a hub name.

    Raises:
        FileNotFoundError: if it looks like a path, or a folder holds no such file.
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


def _read(file: Path) -> tuple[Tensors, dict[str, Any] | None]:
    """The tensors in a file and, where it has them, an adapter's settings.

    Raises:
        ValueError: if it is damaged, or holds anything but tensors.
    """
    checkpoint = CheckpointFile(file)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors(checkpoint.infos)}
    if checkpoint.kind != "safetensors":
        return tensors, None
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    try:
        return tensors, None if text is None else dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: its metadata {LORA_ADAPTER_METADATA_KEY!r} is no JSON object ({error})."
        ) from None


def _require_adapter(tensors: Tensors, source: str) -> None:
    """Raise ValueError for what is no LoRA of a transformer in Diffusers' layout."""
    if any(name.startswith(PREFIX) and "lora" in name for name in tensors):
        return
    if any(name.startswith("text_encoder") for name in tensors):
        return  # has a message of its own
    hint = ""
    if any(name.startswith("transformer_blocks.") and "lora" in name for name in tensors):
        hint = " Load it with `pipe.transformer.load_lora_adapter(..., prefix=None)`."
    raise ValueError(
        f"{source} is no LoRA of a LocalDiT: it holds {few(tensors)}, but names such as "
        f"'{PREFIX}transformer_blocks.0.attn1.to_qkv.lora_A.weight' were expected.{hint}"
    )


def _require_no_text_encoder(tensors: Tensors) -> None:
    names = [name for name in tensors if name.startswith("text_encoder")]
    if names:
        raise ValueError(
            f"This LoRA is one of a text encoder as well ({few(names, 1)}), which LocalDiT does "
            f"not support. Pass a dict of the tensors whose names start with '{PREFIX}' to load "
            "the rest."
        )


def _require_fit(tensors: Tensors, transformer: LocalDiTTransformer2DModel) -> None:
    """Raise ValueError unless each adapted layer is there, and of the adapter's width."""
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
    """Channels that a layer takes (for an adapter's half A) or gives (B); None if unknown."""
    if half not in ("_A.weight", "_B.weight"):
        return None
    kinds = ("in_features", "in_channels") if half[1] == "A" else ("out_features", "out_channels")
    return next((getattr(layer, kind) for kind in kinds if hasattr(layer, kind)), None)
