"""Files of named tensors: recognised by their content, mapped into memory piece by piece."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..errors import Field, FieldValueError
from ..files import parse_json, read_json, user_path

# Keys under which training programs store a state dict. Averaged weights come first: if a file has
# both, they are the ones to sample with.
WRAPPERS = ("ema_state_dict", "ema", "state_dict", "model", "module")

# Single numbers that averaging stores beside the weights.
BOOKKEEPING = {"decay", "initted", "n_averaged", "num_updates", "optimization_step", "step"}

# Diffusers' names of a model's weights, in the order in which it looks for them.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
OF_TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")  # in Transformers
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)

CONFIG_KEY = "localdit_config"  # in the metadata of .safetensors files written here

_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
_MAPPED_BYTES = 64 * 2**20

_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"<", "a web page (HTML or XML), as a failed download leaves behind"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x80", "a bare pickle, which is never opened: save a state dict with torch >= 1.6"),
)


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


class CheckpointFile:
    """A `.safetensors` or `.pt` file of named tensors, recognised by its content.

    Nothing that a file contains is executed.

    Attributes:
        path: the file.
        kind: "safetensors" or "torch".
        wrapper: key under which a `.pt` file has its state dict; None if it is flat.
        infos: shape and dtype of each tensor, in the file's order.
        metadata: texts by name in the header of a `.safetensors` file.
        config: the model's configuration if the file has one; otherwise empty.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint, is damaged, or holds anything but plain tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.kind = _file_kind(self.path)
        self.wrapper: str | None = None
        self.metadata: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        mapped = self._map()
        self.infos = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in mapped.items()
        }

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors, each valid until the next one.

        Pages of a mapped file count as memory of the process once they are touched. So the file is
        mapped again every 64 MiB.
        """
        if self.kind == "torch":
            self._require_sums()
        mapped: dict[str, torch.Tensor] = {}
        touched = 0
        for name in names:
            if not mapped or touched > _MAPPED_BYTES:
                mapped.clear()
                mapped, touched = self._map(), 0
            tensor = mapped[name]
            touched += tensor.nbytes
            yield name, tensor

    def _require_sums(self) -> None:
        """Compare each record of a `.pt` file with its CRC-32, unless it was saved without.

        Measured on one core of a busy machine: 4 s per GiB.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                for record in archive.infolist():
                    with archive.open(record) as file:
                        while record.CRC and file.read(2**20):
                            pass
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, UnicodeDecodeError) as error:
            # The third is raised for a way of packing that zipfile does not know.
            raise ValueError(
                f"{self.path} is damaged: a record is not what was saved ({error}). Fetch it again."
            ) from error

    def _map(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, mapped into memory and not read yet."""
        mapped = self._map_safetensors() if self.kind == "safetensors" else self._map_torch()
        mapped = {
            name: tensor
            for name, tensor in mapped.items()
            if not (name in BOOKKEEPING and tensor.numel() == 1)
        }
        if not mapped:
            raise ValueError(f"{self.path} holds no tensors. Expected the weights of a LocalDiT.")
        return mapped

    def _map_safetensors(self) -> dict[str, torch.Tensor]:
        try:
            with safe_open(os.fspath(self.path), framework="pt") as file:
                self.metadata = file.metadata() or {}
                mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is a truncated or damaged .safetensors file of "
                f"{self.path.stat().st_size:,} bytes ({error}). Fetch it again."
            ) from error
        where = f"{self.path}: its metadata {CONFIG_KEY!r}"
        self.config = parse_json(self.metadata.get(CONFIG_KEY, "{}"), where)
        return mapped

    def _map_torch(self) -> dict[str, torch.Tensor]:
        try:
            contents = torch.load(
                os.fspath(self.path), map_location="cpu", weights_only=True, mmap=True
            )
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = f"refers to {found[1]!r}" if found else "is not a plain pickle of tensors"
            raise ValueError(
                f"{self.path} {what}. Only tensors in plain dicts are read from a .pt file; "
                "nothing in it was executed. Have it saved as .safetensors by somebody you trust."
            ) from error
        except Exception as error:  # a foreign archive may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.path} is a truncated or damaged .pt file, or an archive of another kind, "
                f"of {self.path.stat().st_size:,} bytes ({reason}). Fetch it again."
            ) from error
        state, self.wrapper = _unwrap(contents, self.path)
        return state


def folder_files(
    folder: Path, variant: str | None = None, names: Iterable[str] = WEIGHTS
) -> list[Path]:
    """Return the files with the weights of a model's Diffusers folder; none if it has no weights.

    Args:
        variant: part of the files' names, such as "fp16".
        names: names of all weights; the first that is there counts.

    Raises:
        FileNotFoundError: if a file is missing that the folder's index names.
        ValueError: if the index is damaged, or names files that are elsewhere.
    """

    def named(name: str) -> Path:
        stem, _, suffix = name.rpartition(".")
        return folder / (f"{stem}.{variant}.{suffix}" if variant else name)

    for name in names:
        if (index := named(f"{name}.index.json")).is_file():
            shards = read_json(index).get("weight_map")
            parts = [*shards.values()] if isinstance(shards, dict) else [None]
            if any(not isinstance(one, str) or Path(one).name != one for one in parts):
                raise ValueError(f"{index}: 'weight_map' must name files of this folder.")
            files = [folder / one for one in sorted({*map(str, parts)})]
            if absent := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{folder} lacks its weights {few(absent)}.")
            return files
        if named(name).is_file():
            return [named(name)]
    return []


def weights_library(name: str, variant: str | None = None) -> str | None:
    """Return whose name for weights a file has: "Diffusers", "Transformers", or None for no name.

    Args:
        name: the name: of all weights, of a part of them, or of the index of the parts.
        variant: part of the name, such as "fp16"; without it, the name has none.
    """
    plain = name.replace(f".{variant}", "", 1) if variant else name
    if (variant and plain == name) or not _WEIGHTS.fullmatch(plain):
        return None
    return "Diffusers" if plain.startswith("diffusion_") else "Transformers"


def open_files(paths: Iterable[Path]) -> dict[str, CheckpointFile]:
    """Return the file that holds each tensor, by the tensor's name."""
    return {name: file for file in map(CheckpointFile, paths) for name in file.infos}


def local_file(path: str | Path, local_files_only: bool = False) -> Path:
    """Return the file at `path`; a file of the hub, given by its address, is downloaded if needed.

    Args:
        path: a file, or an address like `https://huggingface.co/NAME/REPOSITORY/blob/main/FILE`.
        local_files_only: take it from the hub's cache, and download nothing.

    Raises:
        ValueError: if it is another address.
        OSError: if it cannot be downloaded, or is not in the cache.
    """
    if not re.match("https?://", str(path)):
        return user_path(path)
    address = re.fullmatch(
        r"https://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)(?:\?.*)?",
        str(path),
    )
    if address is None:
        raise ValueError(
            f"{path} is not a file on the Hugging Face hub, such as "
            "https://huggingface.co/NAME/REPOSITORY/blob/main/FILE. Download it, and give the file."
        )
    from huggingface_hub import hf_hub_download

    repository, revision, name = address.groups()
    return Path(
        hf_hub_download(repository, name, revision=revision, local_files_only=local_files_only)
    )


def load_finite(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.safetensors` file, all finite; see `require_finite`."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        require_finite(path, name, tensor)
    return tensors


def require_finite(
    where: Path | str, name: str, tensor: torch.Tensor, stored: torch.Tensor | None = None
) -> None:
    """Refuse a tensor with values that are not finite.

    Measured on one core: 0.3 s per GiB of float32, 0.6 s per GiB of bfloat16 and float16.

    Args:
        where, name: the file and the tensor, for the message.
        tensor: the values.
        stored: the tensor in the file if `tensor` holds its values in another dtype.

    Raises:
        ValueError: if a value is NaN or infinite; a `FieldError`.
    """
    if is_finite(tensor):
        return
    narrow = stored is not None and is_finite(stored)
    raise FieldValueError(
        "{where}: {name!r} has values that are not finite{as_dtype}. Expected finite ones: the "
        "file is damaged, or the training diverged"
        + (", or a wider {field} is needed." if narrow else "."),
        where=where,
        name=name,
        as_dtype=f" as {tensor.dtype}" if narrow else "",
        field=Field("torch_dtype", "`torch_dtype`"),
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; `require_finite` says what this costs."""
    if not tensor.numel() or tensor.is_meta:
        return True
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():  # PyTorch has no minimum of these
        tensor = tensor.float()
    return all(bound.isfinite() for bound in tensor.aminmax())  # makes no copy, spreads NaN


def few(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names, quoted, and the number of further ones."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit:,} more"


def _file_kind(path: Path) -> str:
    """Return "safetensors" or "torch", by the first bytes of the file."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; expected a .safetensors or .pt file. A Diffusers folder is "
            "loaded with `from_pretrained`."
        )
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}. Expected a .safetensors or .pt file.")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        if path.suffix == ".safetensors":  # `torch.load` goes by that suffix, not by the content
            raise ValueError(f"{path} is a .pt file by its content. Rename it to '*.pt'.")
        return "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    what = f"a file that starts with {head[:8]!r}" if head else "an empty file"
    for start, description in _FOREIGN:
        if head.lstrip().startswith(start):
            what = description
            break
    raise ValueError(f"{path} is {what}. Expected a .safetensors or .pt file of tensors.")


def _unwrap(contents: Any, path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return the state dict in the contents of a `.pt` file, and the key it was under."""
    wrapper = None
    if isinstance(contents, dict):
        for key in WRAPPERS:
            inner = contents.get(key)
            if isinstance(inner, dict) and inner:
                contents, wrapper = inner, key
                break
    if not isinstance(contents, dict):
        raise ValueError(
            f"{path} holds a {type(contents).__name__}; expected a dict from names to tensors."
        )
    if "shadow_params" in contents:
        raise ValueError(
            f"{path} holds the averaged weights as a list ('shadow_params', diffusers' EMAModel), "
            "without the names of the tensors. Expected a dict from names to tensors: copy them "
            "into the model with `EMAModel.copy_to` and save its state dict."
        )
    state = {}
    for name, value in contents.items():
        if name in BOOKKEEPING and not isinstance(value, torch.Tensor):
            continue
        _require_plain_tensor(name, value, path)
        state[name] = value
    return state, wrapper


def _require_plain_tensor(name: Any, value: Any, path: Path) -> None:
    """Refuse anything but an ordinary tensor with all of its values in the file."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{path}: {name!r} holds a {type(value).__name__}; expected a dict from names to "
            "tensors, and nothing else."
        )
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ValueError(
            f"{path}: {name!r} is a sparse, quantized or empty-backed tensor "
            f"({value.layout}, {value.dtype}, {value.device}); expected a plain dense one."
        )
    if value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: {name!r} claims {tuple(value.shape)}, {value.nbytes:,} bytes, but the file "
            f"holds {value.untyped_storage().nbytes():,} bytes for it. Save it contiguous."
        )
