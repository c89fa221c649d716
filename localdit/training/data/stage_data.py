"""The data of one stage: sorted into buckets, put in order, and described by `--dry-run`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localdit.core.vocabulary import unknown_message, unknown_pieces
from localdit.training.data.batches import Batch, VisitDataset, load_batches
from localdit.training.data.buckets import (
    CUT_TOO_MUCH,
    HELD_OUT,
    TOO_SMALL,
    Size,
    assign_buckets,
    crop_sizes,
    describe_crops,
    left_out,
)
from localdit.training.data.encoded import EncodedManifest
from localdit.training.data.finding import FORMATS, Found
from localdit.training.data.order import (
    Order,
    Position,
    Step,
    Visit,
    epoch_batches,
    hold_out,
)
from localdit.training.data.samples import EXAMPLES, Sample
from localdit.training.options import flag
from localdit.training.parser import PICTURE_OPTIONS
from localdit.training.stages import Stage

FREQUENT = 5  # resolutions that are listed
CAPTION_CHARACTERS = 100  # of a caption that is quoted


@dataclass
class StageData:
    """The data that a stage trains on."""

    found: Found
    sizes: list[Size]  # of the buckets, in pixels
    buckets: np.ndarray  # (N,) of each sample; negative for samples that are left out
    held_out: list[int]  # indices of the samples held out of training for validation
    # Indices of the samples that only other stages hold out: they are not trained on, either.
    held_out_elsewhere: list[int] = field(default_factory=list)

    @property
    def withheld(self) -> list[int]:
        """Indices of the samples that are not trained on because a stage holds them out."""
        return sorted(self.held_out + self.held_out_elsewhere)

    @property
    def visited(self) -> np.ndarray:
        """Buckets of the samples as they are trained on, (N,); negative for all others."""
        visited = self.buckets.copy()
        visited[self.withheld] = HELD_OUT
        return visited

    @property
    def digest(self) -> str:
        """Fingerprint of the data. A position is valid only for the data it was saved with."""
        digest = hashlib.sha256(repr((self.sizes, self.withheld)).encode())
        digest.update(self.buckets.tobytes())
        for sample in self.found.samples:
            digest.update(f"{sample.id}\n{len(sample.captions)}\n".encode())
        return digest.hexdigest()

    def order(self, stage: Stage, global_batch: int, seed: int) -> Order:
        """Return the order in which the samples are visited."""
        self.found.require_samples(stage.data_root)
        visited = self.visited
        if not (visited >= 0).any():
            raise ValueError(
                f"{stage.data_root} holds no picture to train on: of {len(visited):,} samples, "
                f"{left_out(self.buckets).replace(' ', ' are ', 1)} for {stage.image_size} "
                f"pixels and {len(self.withheld):,} are held out. Lower --image-size or "
                "--validation-samples, or raise --max-upscale or --max-crop."
            )
        return Order(visited, global_batch, [seed, stage.index])


def prepare_data(
    found: Found,
    stage: Stage,
    window_size: int,
    pixels_per_token: int,
    pictures: Mapping[str, Any],
    validation_samples: int,
) -> StageData:
    """Sort the samples into buckets, and hold some of them out.

    Encoded samples keep the buckets that they were encoded for.

    Args:
        window_size: side of the model's windows, in tokens.
        pixels_per_token: pixels per latent times the patch size.
        pictures: those of `PICTURE_OPTIONS` that are given; the others have their defaults.
    """
    shapes = [(sample.height, sample.width) for sample in found.samples]
    if found.encoded is not None:
        encoded_size = found.encoded.manifest.image_size
        if encoded_size != stage.image_size:
            raise ValueError(
                f"{stage.data_root} was encoded for {encoded_size} pixels, but --image-size is "
                f"{stage.image_size}. Make the two agree."
            )
        _require_same_pictures(stage.data_root, found.encoded.manifest, pictures)
        sizes = list(found.encoded.manifest.sizes)
        uneven = [size for size in sizes if any(side % pixels_per_token for side in size)]
        if uneven:
            raise ValueError(
                f"{stage.data_root} was encoded for sizes such as {uneven[0]}, but the model takes "
                f"multiples of {pixels_per_token} pixels. Encode the data again, with the "
                "--patch-size of the model."
            )
        index = {tuple(size): number for number, size in enumerate(sizes)}
        buckets = np.array([index[shape] for shape in shapes], dtype=np.int64)
    else:
        chosen = {**PICTURE_OPTIONS, **pictures}
        sizes = crop_sizes(
            chosen["crop"],
            stage.image_size,
            window_size,
            pixels_per_token,
            chosen["max_aspect_ratio"],
        )
        buckets = assign_buckets(shapes, sizes, chosen["max_upscale"], chosen["max_crop"])
    usable = np.flatnonzero(buckets >= 0)
    ids = [found.samples[index].id for index in usable]
    held_out = [int(usable[index]) for index in hold_out(ids, validation_samples if ids else 0)]
    return StageData(found, sizes, buckets, sorted(held_out))


def withhold(stages: Sequence[StageData]) -> None:
    """Keep the samples that any stage holds out from the training of all.

    Stages of different sizes can use different samples, so they hold out different ones. The same
    samples have the same ids in pictures and in encoded data. Ids begin at the root of a stage: of
    several roots, one may lie in another, so the places of the pictures count, too.
    """
    several = any(data.found is not stages[0].found for data in stages)

    def names(sample: Sample) -> set[object]:
        return {sample.id, sample.image.place()} if several else {sample.id}

    held_out = {
        name
        for data in stages
        for index in data.held_out
        for name in names(data.found.samples[index])
    }
    for data in stages:
        own = set(data.held_out)
        data.held_out_elsewhere = [
            index
            for index, sample in enumerate(data.found.samples)
            if held_out and data.buckets[index] >= 0 and index not in own
            if not held_out.isdisjoint(names(sample))
        ]


def _require_same_pictures(
    root: str, manifest: EncodedManifest, pictures: Mapping[str, Any]
) -> None:
    """Raise ValueError if options about pictures are not those that encoded data was made with."""
    for name, value in pictures.items():
        if name == "horizontal_flip" and value:
            raise ValueError(
                f"{flag(name)} is {value}, but {root} is encoded, and latents can't be mirrored: "
                "leave it out, or train on the pictures."
            )
        if name == "max_crop":
            raise ValueError(
                f"{flag(name)} is {value}, but {root} is encoded already: give the option to the "
                "command that encodes the pictures, and leave it out here."
            )
        encoded = getattr(manifest, name, value)
        if encoded != value:
            raise ValueError(
                f"{root} was encoded with {flag(name)} {encoded}, but {flag(name)} is {value}. "
                "Leave it out, or encode the pictures again."
            )


def stage_batches(
    dataset: VisitDataset,
    order: Order,
    position: Position,
    rank: int,
    num_processes: int,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Step, list[Batch]]]:
    """Yield the steps after a position, each with the batches of this process."""

    def visits() -> Iterator[list[Visit]]:
        for step in order.steps(position):
            yield from step.share(rank, num_processes, batch_size)

    batches = load_batches(dataset, visits(), num_workers, pin_memory)
    for step in order.steps(position):
        count = len(step.samples) // (num_processes * batch_size)
        yield step, [next(batches) for _ in range(count)]


def held_out_batches(
    dataset: VisitDataset,
    data: StageData,
    rank: int,
    num_processes: int,
    batch_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yield the held-out batches of this process; all processes have the same number of them."""
    rows = epoch_batches(
        data.buckets, np.array(data.held_out), num_processes * batch_size, seed=[0]
    )
    visits = []
    for row in rows:
        step = Step(row, int(data.buckets[row.max()]), 0, Position())
        visits += list(step.share(rank, num_processes, batch_size))
    return load_batches(dataset, visits, num_workers)


def unknown_captions(samples: Sequence[Sample], tokenizer: Any) -> str:
    """Describe what a tokenizer does not know in captions; "" if it knows all of it.

    Each word is tokenised once. Captions are tokenised only if they may have unknown pieces.

    Args:
        tokenizer: a Transformers tokenizer.
    """
    words = {word for sample in samples for text in sample.captions for word in text.split()}
    pieces = unknown_pieces(tokenizer, sorted(words))
    if not pieces:
        return ""
    any_piece = re.compile("|".join(map(re.escape, pieces)))
    captions = [text for sample in samples for text in sample.captions]
    concerned = [text for text in captions if any_piece.search(text.lower())]
    return (
        f"Captions with unknown pieces: {len(concerned):,} of {len(captions):,}. "
        + unknown_message(unknown_pieces(tokenizer, concerned) or pieces)
    )


def dry_run_report(data: StageData, global_batch: int, tokenizer: Any = None) -> str:
    """Describe the data, its buckets and its batches in several lines of text.

    Args:
        global_batch: samples in an optimizer step.
        tokenizer: the tokenizer of the captions; None if it is not on this machine.
    """
    found, used = data.found, int((data.visited >= 0).sum())
    broken, total = found.faults.total, len(found.samples) + found.faults.total
    sections = [
        f"Format: {found.format} ({FORMATS[found.format]})",
        found.unused(),
        f"Samples: {used:,} to train on, {left_out(data.buckets)}, "
        f"{len(data.withheld):,} held out, {broken:,} broken ({broken / max(total, 1):.1%} of "
        f"{total:,})",
    ]
    if found.samples:
        sections += [
            _resolutions(found),
            _buckets(data, global_batch),
            describe_crops(found.samples, data.sizes, data.buckets),
            _captions(found),
            "Captions with unknown pieces: not counted, as the tokenizer is not on this machine"
            if tokenizer is None
            else unknown_captions(found.samples, tokenizer),
        ]
    if broken:
        sections.append("Broken:\n" + _indented(str(found.faults)))
    if found.samples:
        sections.append("Examples:\n" + _indented(_examples(data)))
    return "\n".join(filter(None, sections))


def _resolutions(found: Found) -> str:
    counts = Counter(Size(sample.height, sample.width) for sample in found.samples)
    pixels = sorted(counts, key=lambda size: (size.height * size.width, size))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]
    listed = ", ".join(f"{size} ({count:,})" for size, count in frequent)
    return (
        f"Resolutions: {len(counts):,}, from {pixels[0]} to {pixels[-1]} (height x width)\n"
        f"  most frequent: {listed}"
    )


def _buckets(data: StageData, global_batch: int) -> str:
    rows = [("size", "samples", "batches", "in the last batch")]
    visited, places = data.visited, 0
    for index, size in enumerate(data.sizes):
        if count := int((visited == index).sum()):
            batches = -(-count // global_batch)
            places += batches * global_batch
            last = count - (batches - 1) * global_batch
            rows.append((str(size), f"{count:,}", f"{batches:,}", f"{last:,} of {global_batch:,}"))
    if len(rows) == 1:
        return "Buckets: none in use"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    empty = 1 - int((visited >= 0).sum()) / places
    title = (
        f"Buckets: {len(rows) - 1:,} of {len(data.sizes):,} in use; {empty:.1%} of the places in "
        "the batches of an epoch stay empty"
    )
    return title + "\n" + _indented("\n".join(lines))


def _captions(found: Found) -> str:
    numbers = [len(sample.captions) for sample in found.samples]
    lengths = [len(caption) for sample in found.samples for caption in sample.captions]
    missing = found.faults.counts["no caption"]
    return (
        f"Captions: {sum(numbers):,}, {_range(numbers)} per picture; {_range(lengths)} "
        f"characters long (median {np.median(lengths):,.0f}); pictures without: {missing:,}"
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _examples(data: StageData) -> str:
    """Describe samples from all over the data, with their first captions."""
    samples, visited, lines = data.found.samples, data.visited, []
    reasons = {TOO_SMALL: "too small", CUT_TOO_MUCH: "cut too much", HELD_OUT: "held out"}
    for index in np.linspace(0, len(samples) - 1, min(EXAMPLES, len(samples))).astype(int):
        sample, bucket = samples[index], visited[index]
        place = reasons.get(bucket) or f"bucket {data.sizes[bucket]}"
        caption = " ".join(sample.captions[0].split())
        if len(caption) > CAPTION_CHARACTERS:
            caption = caption[:CAPTION_CHARACTERS].rstrip() + "..."
        others = f" (and {len(sample.captions) - 1:,} more)" if len(sample.captions) > 1 else ""
        lines.append(f"{sample.id}: {Size(sample.height, sample.width)}, {place}")
        lines.append(f'  "{caption}"{others}')
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
