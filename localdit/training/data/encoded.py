"""Encoded data: the latents and text states of pictures and captions, made ahead of training.

A folder holds `encoded.json`, which says of what and how it was made, `empty.safetensors` with the
text states of the empty caption, and the samples: tars `shard-00000.tar` and so on, as WebDataset
readers take them, each with an index beside it, so that samples are read in any order without ever
scanning a tar. `python -m localdit.training.encode` writes it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from localdit.training.data.faults import BrokenSample, Fault, Faults
from localdit.training.data.manifest import MANIFEST, Manifest, read_json, read_manifest
from localdit.training.data.samples import Sample

if TYPE_CHECKING:
    from localdit.training.data.finding import Found

EMPTY_CAPTION = "empty.safetensors"


@dataclass(frozen=True)
class EncodedSet:
    """What training knows of its encoded data beside the samples.

    Attributes:
        folder: where it is.
        manifest: of what and how it was made.
        empty_text: text states of the empty caption, (tokens, text width) bfloat16.
    """

    folder: Path
    manifest: Manifest
    empty_text: torch.Tensor


class Member(NamedTuple):
    """A file in a tar, with the checksum of its bytes."""

    path: str
    offset: int
    size: int
    crc32: int

    def read(self) -> bytes:
        """Its bytes, as they were written.

        Raises:
            BrokenSample: "damaged", if they are not.
            OSError: if the tar can't be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if zlib.crc32(data) != self.crc32:
            raise BrokenSample("damaged", f"bytes of {self.path} are not those that were written")
        return data


def tar_path(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{shard:05d}.tar"


def index_path(folder: Path, shard: int) -> Path:
    """Where the index of a shard is."""
    return folder / f"shard-{shard:05d}.json"


def read_empty_text(folder: Path) -> torch.Tensor:
    """Text states of the empty caption, (tokens, text width) bfloat16.

    Raises:
        ValueError: if they can't be read.
    """
    path = folder / EMPTY_CAPTION
    try:
        return load(path.read_bytes())["text"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path} can't be read ({error!r}): remove it, and run the command that encoded the "
            f"data again; {MANIFEST} names it."
        ) from None


def unwritten_shards(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that are still to be encoded: those without an index."""
    return [shard for shard in range(manifest.shards) if not index_path(folder, shard).is_file()]


def read_shard(
    folder: Path, shard: int, manifest: Manifest, digest: str
) -> tuple[list[Sample], list[Fault]]:
    """The samples of a shard, and those that turned out to be broken when it was encoded.

    Args:
        folder: of the set.
        shard: its number.
        manifest: of the set.
        digest: of the manifest.

    Raises:
        ValueError: if the index is damaged or of another set, or the tar is not as it was written.
    """
    tar, index = tar_path(folder, shard), index_path(folder, shard)
    again = f"Remove {index.name} and run again: {manifest.command}"
    try:
        values = read_json(index)
        stored, size = values["set"], values["bytes"]
        samples = [
            Sample(
                id=entry["id"],
                image=Member(str(tar), entry["offset"], entry["size"], entry["crc32"]),
                captions=tuple(entry["captions"]),
                height=entry["height"],
                width=entry["width"],
            )
            for entry in values["samples"]
        ]
        faults = [Fault(*fault) for fault in values["faults"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged ({error}). {again}") from None
    if stored != digest:
        raise ValueError(f"{index} is of another set than {folder / MANIFEST}. {again}")
    found = tar.stat().st_size if tar.is_file() else 0
    if found != size:
        raise ValueError(f"{tar} has {found:,} bytes, {size:,} were written. {again}")
    return samples, faults


def open_encoded(folder: str | Path) -> Found:
    """All samples of an encoded set; nothing of the tars is read.

    Raises:
        ValueError: if the folder holds no encoded set, an unfinished one, or a damaged one.
    """
    from localdit.training.data.finding import Found

    folder = Path(folder)
    manifest = read_manifest(folder)
    if missing := unwritten_shards(folder, manifest):
        raise ValueError(
            f"{folder} is not complete: {len(missing):,} of {manifest.shards:,} shards are still "
            f"to be encoded. Go on with: {manifest.command}"
        )
    digest = manifest.digest()
    samples, faults = [], Faults()
    for shard in range(manifest.shards):
        healthy, broken = read_shard(folder, shard, manifest, digest)
        samples += healthy
        for fault in broken:
            faults.add(fault)
    encoded = EncodedSet(folder, manifest, read_empty_text(folder))
    return Found(format="encoded", samples=samples, faults=faults, encoded=encoded)


def read_encoded(
    sample: Sample, caption: int | None = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The latents of an encoded sample, and the text states of one of its captions.

    Args:
        sample: one that `open_encoded` found.
        caption: which caption; None for none, as where it is dropped.

    Returns:
        Latents (C, h, w) float32, and states (tokens, text width) bfloat16 or None.

    Raises:
        BrokenSample: if they can't be read, or are not what was written.
    """
    try:
        tensors = load(sample.image.read())
        latents = tensors["latents"].float()
        text = None if caption is None else tensors[f"text_{caption}"]
    except OSError as error:
        raise BrokenSample("unreadable", str(error)) from error
    except (KeyError, SafetensorError) as error:
        raise BrokenSample("damaged", f"not an encoded sample ({error!r})") from error
    if latents.ndim != 3 or latents.shape[1] * sample.width != latents.shape[2] * sample.height:
        shape = tuple(latents.shape)
        raise BrokenSample(
            "damaged", f"latents of shape {shape} for {sample.height} x {sample.width} pixels"
        )
    return latents, text
