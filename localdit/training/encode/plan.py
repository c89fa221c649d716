"""What is to be encoded: which samples at which size, cut into shards, and the disk they take."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np

from localdit.training.data.buckets import Size, assign_buckets, bucket_sizes
from localdit.training.data.samples import Sample
from localdit.training.encoding import CaptionEncoder

CHUNK = 256  # samples whose latents and text are held in memory
COUNTED_CAPTIONS = 10_000  # of more captions, the tokens are extrapolated
BLOCK = 512  # bytes; a member of a tar is a header of one block, and whole blocks
TENSOR_HEADER = 75  # bytes of a safetensors header that describe one tensor, nearly
INDEX_ENTRY = 100  # bytes of a sample in its shard's index beside id and captions, nearly


@dataclass(frozen=True)
class Plan:
    """Samples in the order of encoding: bucket by bucket, so that batches have one size.

    Attributes:
        samples: those to encode.
        buckets: (N,) the bucket of each.
        sizes: of all buckets, in pixels.
        samples_per_shard: how many go into a tar.
        too_small: how many were left out because they would have been enlarged too much.
    """

    samples: list[Sample]
    buckets: np.ndarray
    sizes: list[Size]
    samples_per_shard: int
    too_small: int = 0

    @property
    def num_shards(self) -> int:
        """How many tars there will be."""
        return -(-len(self.samples) // self.samples_per_shard)

    def size(self, index: int) -> Size:
        """The size that a sample is brought to."""
        return self.sizes[self.buckets[index]]

    def shard(self, number: int) -> range:
        """The indices of a shard's samples."""
        start = number * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self.samples)))

    def chunks(self, shard: int) -> Iterator[range]:
        """The parts of a shard that are encoded and written at a time."""
        indices = self.shard(shard)
        return (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK))

    def batches(self, chunk: range, batch_size: int) -> list[list[int]]:
        """The batches of a chunk, each within one bucket."""
        runs = [list(run) for _, run in groupby(chunk, key=lambda index: self.buckets[index])]
        return [
            run[start : start + batch_size]
            for run in runs
            for start in range(0, len(run), batch_size)
        ]

    def digest(self) -> str:
        """SHA-256 of the samples: their ids, captions and sizes."""
        digest = hashlib.sha256()
        for index, sample in enumerate(self.samples):
            entry = [sample.id, sample.captions, sample.height, sample.width, self.size(index)]
            digest.update(json.dumps(entry).encode() + b"\n")
        return digest.hexdigest()


def make_plan(samples: Sequence[Sample], args: argparse.Namespace) -> Plan:
    """Sort samples into the buckets that the options say.

    Raises:
        ValueError: if all are too small.
    """
    square = Size(args.image_size, args.image_size)
    sizes = (
        [square]
        if args.crop == "center"
        else bucket_sizes(args.image_size, args.window_size, args.max_aspect_ratio)
    )
    shapes = [(sample.height, sample.width) for sample in samples]
    buckets = assign_buckets(shapes, sizes, args.max_upscale)
    order = np.argsort(buckets, kind="stable")
    order = order[buckets[order] >= 0]
    if not len(order):
        raise ValueError(
            f"All {len(samples):,} pictures are too small: none comes to about {square} pixels "
            f"without being enlarged by more than {args.max_upscale:g}. Choose a smaller "
            "--image-size, or a larger --max-upscale."
        )
    return Plan(
        samples=[samples[index] for index in order],
        buckets=buckets[order],
        sizes=sizes,
        samples_per_shard=args.samples_per_shard,
        too_small=len(samples) - len(order),
    )


class DiskNeed(NamedTuple):
    """Bytes that each sample will take, (N,) each.

    Attributes:
        latents, text: of the values alone.
        total: with all that is around them, in the tar and its index.
        tokens_per_caption: on average.
    """

    latents: np.ndarray
    text: np.ndarray
    total: np.ndarray
    tokens_per_caption: float


def disk_need(
    plan: Plan, captions: CaptionEncoder, latent_channels: int, vae_scale: int, text_width: int
) -> DiskNeed:
    """What encoding will take on the disk, but for broken samples.

    The text of more than `COUNTED_CAPTIONS` captions is extrapolated from as many of them.
    """
    areas = np.array([size.height * size.width for size in plan.sizes])
    latents = areas[plan.buckets] // vae_scale**2 * latent_channels * 2

    captions_of = np.array([len(sample.captions) for sample in plan.samples])
    texts = list(chain.from_iterable(sample.captions for sample in plan.samples))
    counted = np.linspace(0, len(texts) - 1, min(len(texts), COUNTED_CAPTIONS)).astype(int)
    lengths = np.array(captions.count_tokens([texts[index] for index in counted]), dtype=float)
    tokens = np.full(len(texts), lengths.mean())
    tokens[counted] = lengths
    starts = np.cumsum(captions_of) - captions_of
    text = np.add.reduceat(tokens, starts) * text_width * 2

    names = np.array([len(json.dumps([s.id, s.captions])) for s in plan.samples])
    header = TENSOR_HEADER * (captions_of + 1) + 8
    total = _in_tar(latents + text + header) + _in_tar(names + 110) + names + INDEX_ENTRY
    return DiskNeed(latents, text, total, float(lengths.mean()))


def _in_tar(size: np.ndarray) -> np.ndarray:
    """Bytes that members of these sizes take."""
    return BLOCK + np.ceil(size / BLOCK) * BLOCK
