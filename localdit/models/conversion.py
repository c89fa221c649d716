"""Checkpoint files of the transformer: load, inspect, and convert them, bit for bit.

`localdit.checkpoint` re-exports the public functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoint.layout import flat_name
from ..checkpoint.loading import (
    FLOATS,
    CheckpointReport,
    bare,
    plan_loading,
    read_folder,
    require_float,
    require_savable,
)
from ..checkpoint.reading import CONFIG_KEY, WEIGHTS, CheckpointFile, few, require_finite
from ..errors import FieldExistsError, FieldValueError, Setting
from ..files import require_folder_name, user_path, whole_file, whole_folder
from .configuration import public_arguments
from .transformer import LocalDiTTransformer2DModel

# The files of a transformer's folder.
_OF_TRANSFORMER = re.compile(
    r"config\.json|diffusion_pytorch_model.*\.(safetensors|bin)(\.index\.json)?", re.DOTALL
)


def load_transformer(
    path: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    global_context: str = "fold",
    seed: int | None = None,
    **overrides: Any,
) -> LocalDiTTransformer2DModel:
    """Load a checkpoint in one file: `.safetensors`, or `.pt` with nothing but tensors in it.

    Layers, widths, heads, window, patch, channels and global context follow from the tensors. The
    rest comes from `overrides`, then from the configuration that `convert_to_single_file` stores in
    a file, then from the defaults of the class, which are those of the released model.

    The released file lacks the weights of the global context that the model was computed with: they
    were drawn at random each time. Their values are symmetric about zero, so the expected output of
    attention is half of its local output. By default this half is folded into the rows of `to_qkv`
    that compute the values. Nothing is folded if a file has relative position biases or a global
    context, nor in layers that `layer_types` declares "full". Weights of "local" layers also load
    as "local_pooled", if `layer_types` says so.

    Args:
        path: the file. Its content decides its kind, not its suffix.
        torch_dtype: dtype of the model; None keeps the file's (the narrowest that holds all live
            tensors, if they differ).
        global_context: "fold" it if a file of the released kind lacks it, or "draw" it at random:
            linear and convolutional layers with PyTorch's initialisation, position biases zero.
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
    return plan_loading(
        LocalDiTTransformer2DModel,
        path,
        torch_dtype=torch_dtype,
        global_context=global_context,
        seed=seed,
        **overrides,
    ).load()


def inspect_checkpoint(
    path: str | Path, *, global_context: str = "fold", seed: int | None = None, **overrides: Any
) -> CheckpointReport:
    """Check a checkpoint like `load_transformer` and report its contents, without reading weights.

    Arguments and errors are those of `load_transformer`.
    """
    return plan_loading(
        LocalDiTTransformer2DModel, path, global_context=global_context, seed=seed, **overrides
    ).report


def convert_to_diffusers(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    global_context: str = "fold",
    seed: int | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> CheckpointReport:
    """Convert a checkpoint file to the folder of a transformer.

    The folder is written under a temporary name and renamed when it is complete.

    Args:
        checkpoint, torch_dtype, global_context, seed, **overrides: as for `load_transformer`. Live
            values stay the same bit for bit, except those that folding halves and those that
            `torch_dtype` rounds.
        folder: folder for `config.json` and the weights; it must be absent or empty.
        overwrite: replace a folder that holds a LocalDiT transformer and nothing else.

    Returns:
        The contents of the checkpoint, and the way they were loaded.

    Raises:
        FileExistsError: if `folder` is taken.
        FileNotFoundError, TypeError, ValueError: as for `load_transformer`; the latter also if
            `folder` is named like a file.
        OSError: if the folder cannot be written.
    """
    folder = user_path(folder).absolute()
    refuse_taken_folder(folder, overwrite, checkpoint)
    plan = plan_loading(
        LocalDiTTransformer2DModel,
        checkpoint,
        torch_dtype=torch_dtype,
        global_context=global_context,
        seed=seed,
        **overrides,
    )
    with whole_folder(folder, lambda: refuse_taken_folder(folder, overwrite, checkpoint)) as new:
        plan.load().save_pretrained(new)
    return plan.report


def convert_to_single_file(
    source: LocalDiTTransformer2DModel | str | Path,
    path: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> CheckpointReport:
    """Write a transformer as one `.safetensors` file with the reference's names of tensors.

    The file also stores the model's configuration, for the arguments that do not follow from the
    tensors. It is written under a temporary name and renamed when it is complete.

    Args:
        source: a model, its folder, or the folder of a pipeline with a `transformer` in it.
        path: the file, named `*.safetensors`.
        torch_dtype: dtype of the floating-point values; None keeps their dtype.
        overwrite: replace an existing file.

    Returns:
        The contents of the file.

    Raises:
        FileExistsError: if `path` is taken.
        FileNotFoundError: if `source` has no transformer in it.
        ValueError: if `path` is not named `*.safetensors`, the folder's tensors do not match its
            configuration, a tensor has a dtype that such a file can't have, or the model has
            adapters, or weights that are elsewhere or were replaced.
        OSError: if the file cannot be written.
    """
    require_float(torch_dtype)
    path = user_path(path).absolute()
    refuse_taken_file(path, overwrite)
    source = bare(source)
    if isinstance(source, LocalDiTTransformer2DModel):
        require_savable(source)
        config, state = source.config, source.state_dict()
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        _require_storable("the model", dtypes, torch_dtype)
    else:
        config, state = _read_folder(user_path(source), torch_dtype)
    state = {
        flat_name(name): tensor.to("cpu", torch_dtype or tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(public_arguments(config), sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, overwrite) as file:
        save_file(state, file.name, metadata=metadata)
        return replace(inspect_checkpoint(file.name), path=path)


def refuse_taken_file(path: Path, overwrite: bool) -> None:
    """Refuse a name that is not for one file, or an existing file that must not be replaced."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not named '*.safetensors', the one format written here.")
    if _OF_TRANSFORMER.fullmatch(path.name) and (path.parent / "config.json").exists():
        raise FileExistsError(
            f"{path} would belong to the model in {path.parent}, whose weights have other names. "
            "Choose another name."
        )
    if path.is_dir() or (path.exists() and not overwrite):
        raise _taken("{path} already exists. Choose another name, or {advice}.", path)


def refuse_taken_folder(folder: Path, overwrite: bool, checkpoint: str | Path) -> None:
    """Refuse a folder that must not be replaced by that of a checkpoint."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; expected the name of a folder to make.")
    require_folder_name(folder)
    held = [path.name for path in folder.iterdir()] if folder.exists() else []
    if not held:
        return
    if not overwrite:
        raise _taken("{path} is not empty. Choose another name, or {advice}.", folder)
    if folder.resolve() in user_path(checkpoint).resolve().parents:
        raise FileExistsError(
            f"{folder} holds {checkpoint}, which is to be converted. Choose another name."
        )
    other = [name for name in held if not _OF_TRANSFORMER.fullmatch(name)]
    config = (folder / "config.json").read_bytes() if "config.json" in held else b""
    if other or LocalDiTTransformer2DModel.__name__.encode() not in config:
        raise FileExistsError(
            f"{folder} holds something else than a LocalDiT transformer, {few(other or held)}, "
            "which is not overwritten. Choose another name."
        )


def _taken(message: str, path: Path) -> FieldExistsError:
    advice = Setting("overwrite", True, "pass overwrite=True")
    return FieldExistsError(message, path=path, advice=advice)


def transformer_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a transformer, or of the one in a pipeline's folder, and its config."""
    if (folder / "model_index.json").exists():
        folder = folder / "transformer"
    config, _ = read_folder(LocalDiTTransformer2DModel, folder, whole=False)
    name = LocalDiTTransformer2DModel.__name__
    if "data_root" in config:  # the options of a run
        raise ValueError(
            f"{folder} is the folder of a training run. Name its result, {folder / 'final'}, or "
            "one of its checkpoints."
        )
    if config.get("_class_name") != name:
        raise ValueError(f"{folder} holds a {config.get('_class_name')!r}; expected {name!r}.")
    return folder, config


def open_transformer(
    folder: Path, torch_dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, CheckpointFile]]:
    """Return the configuration of a transformer, and the file of each tensor; no values are read.

    Args:
        folder: as for `transformer_folder`.
        torch_dtype: dtype that the weights are to be stored in; None keeps theirs.
    """
    folder, _ = transformer_folder(folder)
    config, files = read_folder(LocalDiTTransformer2DModel, folder)
    if not files:
        raise FileNotFoundError(f"{folder} lacks its weights {WEIGHTS[0]!r}.")
    dtypes = {name: file.infos[name].dtype for name, file in files.items()}
    _require_storable(folder, dtypes, torch_dtype)
    return config, files


def _read_folder(
    folder: Path, torch_dtype: torch.dtype | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return configuration and tensors of a Diffusers folder."""
    config, files = open_transformer(folder, torch_dtype)
    state: dict[str, torch.Tensor] = {}
    for file in dict.fromkeys(files.values()):
        for name, tensor in file.tensors(file.infos):
            require_finite(file.path, name, tensor)
            state[name] = tensor.clone()
    return config, state


def _require_storable(
    where: Path | str, dtypes: Mapping[str, torch.dtype], torch_dtype: torch.dtype | None
) -> None:
    """Refuse weights that could not be read back, unless a conversion to `torch_dtype` helps."""
    for name, dtype in dtypes.items():
        if dtype in FLOATS or (torch_dtype and dtype.is_floating_point):
            continue
        raise FieldValueError(
            "{where}: {name!r} is {dtype}; expected one of {known}"
            + (": {advice}." if dtype.is_floating_point else "."),
            where=where,
            name=name,
            dtype=dtype,
            known=", ".join(map(str, FLOATS)),
            advice=Setting("torch_dtype", "float16", "pass torch_dtype=torch.float16"),
        )
