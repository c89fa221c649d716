"""The plan of encoding: the samples and their sizes, cut into shards, and the disk space needed."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np

from localdit.core.text import TextSpace
from localdit.training.data.buckets import Size, assign_buckets, crop_sizes
from localdit.training.data.encoded import Manifest
from localdit.training.data.samples import Sample
from localdit.training.data.tars import BLOCK

CHUNK = 256  # samples whose latents and text are in memory at once
COUNTED_CAPTIONS = 10_000  # of more captions, the number of tokens is extrapolated
TENSOR_HEADER = 75  # bytes of a safetensors header per tensor, approximately
INDEX_ENTRY = 100  # bytes per sample in an index besides id and captions, approximately


@dataclass(frozen=True)
class Plan:
    """Samples in the order of encoding: bucket by bucket, so that each batch has one size.

    Attributes:
        samples: the samples to encode.
        buckets: (N,) the bucket of each.
        sizes: of all buckets, in pixels.
        samples_per_shard: samples per tar.
        too_small: number of samples left out because they would have been enlarged too much.
    """

    samples: list[Sample]
    buckets: np.ndarray
    sizes: list[Size]
    samples_per_shard: int
    too_small: int = 0

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
    """Sort samples into the buckets of the options.

    Raises:
        ValueError: if all are too small.
    """
    sizes = crop_sizes(
        args.crop, args.image_size, args.window_size, pixels_per_token, args.max_aspect_ratio
    )
    shapes = [(sample.height, sample.width) for sample in samples]
    buckets = assign_buckets(shapes, sizes, args.max_upscale)
    order = np.argsort(buckets, kind="stable")
    order = order[buckets[order] >= 0]
    if not len(order):
        square = Size(args.image_size, args.image_size)
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
        too_small=len(samples) - len(order),
    )


class DiskNeed(NamedTuple):
    """Bytes that each sample needs, (N,) each.

    Attributes:
        latents, text: of the values alone.
        total: of the values with their headers, in the tar and its index.
        tokens_per_caption: on average.
    """

    latents: np.ndarray
    text: np.ndarray
    total: np.ndarray
    tokens_per_caption: float


def disk_need(plan: Plan, text: TextSpace, manifest: Manifest) -> DiskNeed:
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
