"""Encode shards: from pictures and captions to a tar and its index, whole or not at all."""

from __future__ import annotations

import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from localdit.core.parts import Encoders
from localdit.files import whole_file
from localdit.training.data.encoded import FORMAT, index_path, tar_path
from localdit.training.data.pictures import read_picture
from localdit.training.data.samples import BrokenSample, Fault
from localdit.training.data.tars import BLOCK
from localdit.training.encode.shard_plan import Plan

if TYPE_CHECKING:
    pass


class PictureBatch(NamedTuple):
    """Pictures of one size, and those of the batch that turned out to be broken.

    Attributes:
        indices: of the healthy pictures.
        pixels: (B, 3, H, W) uint8; None if all are broken.
        faults: the broken pictures.
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
    """Yield the pictures of shards, in order, in the batches of `Plan.batches`."""
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
        folder: of the set.
        plan: the samples.
        digest: of the manifest.
        encoders: of pictures and captions.
        max_caption_length: text tokens that a caption is cut at.
        batch_size: pictures per batch.
        bf16: whether pictures are encoded in bfloat16.
        progress: called after each batch with its number of samples.
    """

    folder: Path
    plan: Plan
    digest: str
    encoders: Encoders
    max_caption_length: int
    batch_size: int
    bf16: bool = False
    progress: Callable[[int], Any] = field(default=lambda samples: None)

    def write(self, shard: int, pictures: Iterator[PictureBatch]) -> list[Fault]:
        """Write the tar of a shard, then its index, which marks the tar as complete.

        Args:
            shard: its number.
            pictures: an iterator whose next batches are those of the shard.

        Returns:
            The samples that turned out to be broken.

        Raises:
            OSError: if they can't be written; then no incomplete file is left.
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
        """Return the latents (C, h, w) float16 of healthy pictures by index, and the faults."""
        latents: dict[int, torch.Tensor] = {}
        faults: list[Fault] = []
        for planned in self.plan.batches(chunk, self.batch_size):
            indices, pixels, broken = next(pictures)
            faults += broken
            if pixels is not None:
                encoded = self.encoders.latents.encode_pixels(pixels, self.bf16)
                encoded = encoded.to("cpu", torch.float16)
                latents |= dict(zip(indices, encoded, strict=True))
            self.progress(len(planned))
        for index in [index for index, values in latents.items() if not values.isfinite().all()]:
            del latents[index]
            detail = "its latents are not finite: does the VAE support --mixed-precision bf16?"
            faults.append(Fault("damaged", self.plan.samples[index].id, detail))
        return latents, faults

    def _write_chunk(self, tar: tarfile.TarFile, latents: dict[int, torch.Tensor]) -> list[dict]:
        """Encode the captions that belong to latents, write both, and return the index entries."""
        samples = {index: self.plan.samples[index] for index in latents}
        text = self.encoders.text.encode_unpadded(
            [caption for sample in samples.values() for caption in sample.captions],
            self.max_caption_length,
        )
        entries = []
        for index, sample in samples.items():
            tensors = {"latents": latents[index].clone(memory_format=torch.contiguous_format)}
            for number, caption in enumerate(sample.captions):
                # Safetensors refuses one tensor under two names, as repeated captions would be.
                tensors[f"text_{number}"] = text[caption].clone()
            size = self.plan.size(index)
            described = {"id": sample.id, "captions": sample.captions, **size._asdict()}
            original = {"original_height": sample.height, "original_width": sample.width}
            key = f"{index:09d}"  # no dots: for WebDataset the suffix begins at the first
            data = save(tensors)
            place = {"offset": add_member(tar, f"{key}.safetensors", data), "size": len(data)}
            add_member(tar, f"{key}.json", json.dumps(described | original).encode())
            entries.append({**described, **place, "crc32": zlib.crc32(data)})
        return entries


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file without date or owner to a tar, so that equal data make equal tars.

    Returns:
        The position of its first byte.
    """
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - math.ceil(len(data) / BLOCK) * BLOCK
