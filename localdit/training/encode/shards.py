"""Encoding shards: pictures and captions in, a tar and its index out, whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from localdit.core.latents import LatentSpace
from localdit.training.checkpointing import flush_entry
from localdit.training.data.encoded import index_path, tar_path
from localdit.training.data.faults import BrokenSample, Fault
from localdit.training.data.manifest import FORMAT
from localdit.training.data.pictures import read_picture
from localdit.training.encode.plan import BLOCK, Plan
from localdit.training.encoding import CaptionEncoder, encode_captions

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class PictureBatch(NamedTuple):
    """Pictures of one size, and those of the batch that turned out to be broken.

    Attributes:
        indices: of the pictures that are there.
        pixels: (B, 3, H, W) uint8; None if none is.
        faults: the others.
    """

    indices: list[int]
    pixels: torch.Tensor | None
    faults: list[Fault]


class PlannedPictures(Dataset[tuple[int, torch.Tensor | Fault]]):
    """The pictures of a plan, at their sizes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor | Fault]:
        sample = self.plan.samples[index]
        try:
            return index, read_picture(sample.image, self.plan.size(index))
        except BrokenSample as broken:
            return index, Fault(broken.kind, sample.id, broken.detail)


def read_pictures(plan: Plan, shards: Sequence[int], batch_size: int,
                  num_workers: int) -> Iterator[PictureBatch]:  # fmt: skip
    """The pictures of some shards, in order: as many batches as `Plan.batches` makes."""
    loader = DataLoader(
        PlannedPictures(plan),
        batch_sampler=[
            batch
            for shard in shards
            for chunk in plan.chunks(shard)
            for batch in plan.batches(chunk, batch_size)
        ],
        collate_fn=_collate,
        num_workers=num_workers,
    )
    return iter(loader)


def _collate(items: list[tuple[int, torch.Tensor | Fault]]) -> PictureBatch:
    pictures = [(index, item) for index, item in items if isinstance(item, torch.Tensor)]
    return PictureBatch(
        [index for index, _ in pictures],
        torch.stack([pixels for _, pixels in pictures]) if pictures else None,
        [item for _, item in items if isinstance(item, Fault)],
    )


@dataclass
class ShardEncoder:
    """Writes shards.

    Attributes:
        folder: where to.
        plan: what is to be encoded.
        digest: of the set's manifest.
        vae, captions: the encoders.
        bf16: whether pictures are encoded in bfloat16.
        batch_size: pictures at a time.
        progress: called with the number of samples done, again and again.
    """

    folder: Path
    plan: Plan
    digest: str
    vae: AutoencoderKL
    captions: CaptionEncoder
    batch_size: int
    bf16: bool = False
    progress: Callable[[int], Any] = field(default=lambda samples: None)

    def write(self, shard: int, pictures: Iterator[PictureBatch]) -> list[Fault]:
        """Write the tar of a shard, then its index, which says that the tar is complete.

        Args:
            shard: its number.
            pictures: where the next batches are those of the shard.

        Returns:
            The samples that turned out to be broken.

        Raises:
            OSError: if they can't be written; then nothing is left of what was not complete.
        """
        entries, faults = [], []
        with whole_file(tar_path(self.folder, shard)) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for chunk in self.plan.chunks(shard):
                    latents, broken = self._encode_pictures(chunk, pictures)
                    entries += self._write_chunk(tar, latents)
                    faults += broken
            size = file.tell()
        index = {"format": FORMAT, "set": self.digest, "bytes": size, "samples": entries,
                 "faults": faults}  # fmt: skip
        with whole_file(index_path(self.folder, shard)) as file:
            file.write(json.dumps(index).encode())
        return faults

    def _encode_pictures(
        self, chunk: range, pictures: Iterator[PictureBatch]
    ) -> tuple[dict[int, torch.Tensor], list[Fault]]:
        """The latents (C, h, w) float16 of a chunk's healthy pictures by index, and the others."""
        latents: dict[int, torch.Tensor] = {}
        faults: list[Fault] = []
        for planned in self.plan.batches(chunk, self.batch_size):
            indices, pixels, broken = next(pictures)
            faults += broken
            if pixels is not None:
                encoded = LatentSpace(self.vae).encode_pixels(pixels, self.bf16)
                encoded = encoded.to("cpu", torch.float16)
                latents |= dict(zip(indices, encoded, strict=True))
            self.progress(len(planned))
        for index in [index for index, values in latents.items() if not values.isfinite().all()]:
            del latents[index]
            detail = "its latents are not finite: is the VAE made for --mixed-precision bf16?"
            faults.append(Fault("damaged", self.plan.samples[index].id, detail))
        return latents, faults

    def _write_chunk(self, tar: tarfile.TarFile, latents: dict[int, torch.Tensor]) -> list[dict]:
        """Encode the captions that belong to latents, write both; the entries of the index."""
        samples = {index: self.plan.samples[index] for index in latents}
        text = encode_captions(
            self.captions, [caption for sample in samples.values() for caption in sample.captions]
        )
        entries = []
        for index, sample in samples.items():
            tensors = {"latents": latents[index].clone(memory_format=torch.contiguous_format)}
            for number, caption in enumerate(sample.captions):
                # A caption that comes twice would be one tensor under two names.
                tensors[f"text_{number}"] = text[caption].clone()
            size = self.plan.size(index)
            described = {"id": sample.id, "captions": sample.captions, **size._asdict()}
            original = {"original_height": sample.height, "original_width": sample.width}
            key = f"{index:09d}"  # no dots: WebDataset takes what follows the first for the type
            data = save(tensors)
            place = {"offset": add_member(tar, f"{key}.safetensors", data), "size": len(data)}
            add_member(tar, f"{key}.json", json.dumps(described | original).encode())
            entries.append({**described, **place, "crc32": zlib.crc32(data)})
        return entries


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file to a tar, with neither date nor owner, so that the same data give the same tar.

    Returns:
        Where its bytes begin.
    """
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - math.ceil(len(data) / BLOCK) * BLOCK


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` once all of it is on the disk, or not at all.

    Raises:
        OSError: if it can't be written; then nothing is left of it.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        flush_entry(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
