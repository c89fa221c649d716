"""Shards of encoded data: the plan of their samples, the disk space they need, and writing them."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from localdit.core.encoders import Encoders
from localdit.core.text import TextSpace
from localdit.files import whole_file, write_whole
from localdit.training.data.buckets import (
    CUT_TOO_MUCH,
    Size,
    assign_buckets,
    crop_sizes,
    left_out,
)
from localdit.training.data.encoded import (
    FORMAT,
    EncodedManifest,
    index_digest,
    index_path,
    tar_path,
)
from localdit.training.data.pictures import read_picture
from localdit.training.data.samples import BrokenSample, Fault, Sample
from localdit.training.data.tars import BLOCK

CHUNK = 256  # samples whose latents and text are in memory at once
COUNTED_CAPTIONS = 10_000  # of more captions, the number of tokens is extrapolated
TENSOR_HEADER = 75  # bytes of a safetensors header per tensor, approximately
INDEX_ENTRY = 100  # bytes per sample in an index besides id and captions, approximately


@dataclass(frozen=True)
class Plan:
    """Samples in the order of encoding: bucket by bucket, so that each batch has one size."""

    samples: list[Sample]
    buckets: np.ndarray  # (N,) of each sample
    sizes: list[Size]  # of all buckets, in pixels
    samples_per_shard: int
    too_small: int = 0  # samples left out because they would have been enlarged too much
    cut_too_much: int = 0  # samples left out because too much would have been cut away

    @property
    def num_shards(self) -> int:
        """Number of tars."""
        return -(-len(self.samples) // self.samples_per_shard)

    def size(self, index: int) -> Size:
        """Return the size to which a sample is scaled."""
        return self.sizes[self.buckets[index]]

    def shard(self, number: int) -> range:
        """Return the indices of a shard's samples."""
        start = number * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self.samples)))

    def chunks(self, shard: int) -> Iterator[range]:
        """Yield the parts of a shard that are encoded and written at once."""
        indices = self.shard(shard)
        return (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK))

    def batches(self, chunk: range, batch_size: int) -> list[list[int]]:
        """Return the batches of a chunk, each within one bucket."""
        runs = [list(run) for _, run in groupby(chunk, key=lambda index: self.buckets[index])]
        return [
            run[start : start + batch_size]
            for run in runs
            for start in range(0, len(run), batch_size)
        ]

    def digest(self) -> str:
        """Return the SHA-256 of the samples: their ids, captions and sizes."""
        digest = hashlib.sha256()
        for index, sample in enumerate(self.samples):
            entry = [sample.id, sample.captions, sample.height, sample.width, self.size(index)]
            digest.update(json.dumps(entry).encode() + b"\n")
        return digest.hexdigest()


def make_plan(samples: Sequence[Sample], args: argparse.Namespace, pixels_per_token: int) -> Plan:
    """Sort samples into the buckets of the options."""
    sizes = crop_sizes(
        args.crop, args.image_size, args.window_size, pixels_per_token, args.max_aspect_ratio
    )
    shapes = [(sample.height, sample.width) for sample in samples]
    buckets = assign_buckets(shapes, sizes, args.max_upscale, args.max_crop)
    order = np.argsort(buckets, kind="stable")
    order = order[buckets[order] >= 0]
    cut_too_much = int((buckets == CUT_TOO_MUCH).sum())
    if not len(order):
        square = Size(args.image_size, args.image_size)
        if cut_too_much:
            raise ValueError(
                f"Of {len(samples):,} pictures, {left_out(buckets)}: choose a larger --max-crop."
            )
        raise ValueError(
            f"All {len(samples):,} pictures are too small: for {square} pixels, each would have to "
            f"be enlarged by more than {args.max_upscale:g}. Choose a smaller --image-size, or a "
            "larger --max-upscale."
        )
    return Plan(
        samples=[samples[index] for index in order],
        buckets=buckets[order],
        sizes=sizes,
        samples_per_shard=args.samples_per_shard,
        too_small=len(samples) - len(order) - cut_too_much,
        cut_too_much=cut_too_much,
    )


class DiskNeed(NamedTuple):
    """Bytes that each sample needs, (N,) each."""

    latents: np.ndarray  # the values alone
    text: np.ndarray  # the values alone
    total: np.ndarray  # the values with their headers, in the tar and its index
    tokens_per_caption: float  # mean


def disk_need(plan: Plan, text: TextSpace, manifest: EncodedManifest) -> DiskNeed:
    """Estimate the disk space that encoding needs, if no sample turns out to be broken.

    The text of more than `COUNTED_CAPTIONS` captions is extrapolated from that many of them.
    """
    areas = np.array([size.height * size.width for size in plan.sizes])
    latents = areas[plan.buckets] // manifest.vae_scale**2 * manifest.latent_channels * 2

    captions_of = np.array([len(sample.captions) for sample in plan.samples])
    texts = list(chain.from_iterable(sample.captions for sample in plan.samples))
    counted = np.linspace(0, len(texts) - 1, min(len(texts), COUNTED_CAPTIONS)).astype(int)
    lengths = np.array(
        text.count_tokens([texts[index] for index in counted], manifest.max_caption_length),
        dtype=float,
    )
    tokens = np.full(len(texts), lengths.mean())
    tokens[counted] = lengths
    starts = np.cumsum(captions_of) - captions_of
    states = np.add.reduceat(tokens, starts) * manifest.text_width * 2

    names = np.array([len(json.dumps([s.id, s.captions])) for s in plan.samples])
    header = TENSOR_HEADER * (captions_of + 1) + 8
    total = _in_tar(latents + states + header) + _in_tar(names + 110) + names + INDEX_ENTRY
    return DiskNeed(latents, states, total, float(lengths.mean()))


def _in_tar(size: np.ndarray) -> np.ndarray:
    """Return the bytes that members of these sizes take in a tar: a header and whole blocks."""
    return BLOCK + np.ceil(size / BLOCK) * BLOCK


class PictureBatch(NamedTuple):
    """The healthy pictures of a batch, which have one size, and the broken ones."""

    indices: list[int]  # of the healthy pictures
    pixels: torch.Tensor | None  # (B, 3, H, W) uint8; None if all are broken
    faults: list[Fault]  # the broken pictures


class PlannedPictures(Dataset[tuple[int, torch.Tensor | Fault]]):
    """The pictures of a plan, scaled to their sizes."""

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
    """Writes shards."""

    folder: Path  # of the set
    manifest: EncodedManifest
    plan: Plan
    encoders: Encoders
    batch_size: int
    progress: Callable[[int], Any]  # called after each batch with its number of samples

    def write(self, shard: int, pictures: Iterator[PictureBatch]) -> list[Fault]:
        """Write the tar of a shard, then its index, which marks the tar as complete.

        Args:
            pictures: iterator that yields the batches of the shard next.

        Returns:
            The samples that turned out to be broken.
        """
        entries, faults = [], []
        with whole_file(tar_path(self.folder, shard)) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for chunk in self.plan.chunks(shard):
                    latents, broken = self._encode_pictures(chunk, pictures)
                    entries += self._write_chunk(tar, latents)
                    faults += broken
            size = file.tell()
        index = {"format": FORMAT, "set": self.manifest.digest(), "bytes": size, "samples": entries,
                 "faults": faults}  # fmt: skip
        index["sha256"] = index_digest(index)
        write_whole(index_path(self.folder, shard), json.dumps(index))
        return faults

    def _encode_pictures(
        self, chunk: range, pictures: Iterator[PictureBatch]
    ) -> tuple[dict[int, torch.Tensor], list[Fault]]:
        """Return the latents (C, h, w) float16 of healthy pictures by index, and the faults."""
        latents: dict[int, torch.Tensor] = {}
        faults: list[Fault] = []
        bf16 = self.manifest.mixed_precision == "bf16"
        for planned in self.plan.batches(chunk, self.batch_size):
            indices, pixels, broken = next(pictures)
            faults += broken
            if pixels is not None:
                encoded = self.encoders.latents.encode_pixels(pixels, bf16)
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
            self.manifest.max_caption_length,
        )
        entries = []
        for index, sample in samples.items():
            tensors = {"latents": latents[index].clone(memory_format=torch.contiguous_format)}
            for number, caption in enumerate(sample.captions):
                # Safetensors refuses one tensor under two names, such as for repeated captions.
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
