"""Where a pipeline's parts come from, and a checkpoint: files here, or the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import config_field
from .errors import FieldNotFoundError, FieldOSError, Setting


@dataclass(frozen=True)
class Part:
    """A part that is not in the checkpoint, and where its files lie.

    On the hub it is expected in the first of the folders, in a local copy in any of them.
    """

    field: str
    folders: tuple[str, ...]
    config: str
    weights: tuple[str, ...] = ()  # one of them is needed


TEXT_ENCODER = Part(
    "text_encoder", ("", "text_encoder"), "config.json", ("model*.safetensors", "*model*.bin")
)
TOKENIZER = Part(
    "text_encoder",
    ("", "tokenizer"),
    "tokenizer_config.json",
    ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json"),
)
VAE = Part(
    "vae", ("vae", ""), "config.json", ("diffusion_pytorch_model*.safetensors", "*model*.bin")
)
SCHEDULER = Part("scheduler", ("scheduler", ""), "scheduler_config.json")


def _wanted(part: Part, folder: str) -> str:
    """The files of a part in words, as `vae/config.json and vae/*.safetensors`."""
    weights = [" or ".join(f"{folder}/{name}".lstrip("/") for name in part.weights)]
    return " and ".join([f"{folder}/{part.config}".lstrip("/"), *filter(None, weights)])


def locate(part: Part, source: str | Path, local_files_only: bool = False) -> dict[str, Any]:
    """Where a part is, as arguments of `from_pretrained`, having made sure that it is there.

    Of a repository on the hub its configuration is fetched for that, a few hundred bytes.

    Args:
        part: what is looked for.
        source: a folder here, or a repository of the hub.
        local_files_only: take files of the hub from the cache, and fetch nothing.

    Raises:
        FileNotFoundError: a local source lacks files, or is missing; a `FieldError`.
        OSError: a repository of the hub can't be reached; a `FieldError`.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        for folder in part.folders:
            files = local / folder
            weights = [file for pattern in part.weights for file in files.glob(pattern)]
            if (files / part.config).is_file() and (weights or not part.weights):
                return {"pretrained_model_name_or_path": str(local), "subfolder": folder}
        layouts = "; or ".join(_wanted(part, folder) for folder in part.folders)
        raise FieldNotFoundError(
            "{field}: {folder} lacks files; expected {layouts}",
            field=config_field(part.field),
            folder=local,
            layouts=layouts,
        )
    if not is_hub_name(source):
        raise FieldNotFoundError(
            "{field}: there is no folder {source}", field=config_field(part.field), source=source
        )
    folder = part.folders[0]
    with fetching(part, source):
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            str(source),
            part.config,
            subfolder=folder or None,
            local_files_only=local_files_only,
        )
    return {
        "pretrained_model_name_or_path": str(source),
        "subfolder": folder,
        "local_files_only": local_files_only,
    }


def is_hub_name(source: str | Path) -> bool:
    """Whether a source is a repository of the hub: named like one, and no folder here."""
    name = str(source)
    there = Path(source).expanduser().exists()
    return not there and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and name[0] not in ".~"


@contextmanager
def fetching(part: Part, source: str | Path) -> Iterator[None]:
    """Turn the many errors of the hub's clients into one that says what to do.

    Raises:
        OSError: the source can't be fetched; a `FieldError`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if Path(source).expanduser().is_dir():
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise FieldOSError(
            "{source} could not be fetched from the Hugging Face hub: {reason}. It needs {files}. "
            "Without a connection, copy these files to a local folder under the same names and "
            "{advice}",
            source=source,
            reason=f"{reason} ({type(error).__name__})",
            files=_wanted(part, part.folders[0]),
            advice=Setting(
                part.field,
                "/path/to/that/folder",
                f"set Config({part.field}='/path/to/that/folder')",
            ),
        ) from error
