"""The report on the data that `train.py --dry-run` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from localdit.training.data.buckets import Size
from localdit.training.data.finding import FORMATS, Found
from localdit.training.data.samples import EXAMPLES

FREQUENT = 5  # resolutions that are listed
CAPTION_CHARACTERS = 100  # of a caption that is quoted


def dry_run_report(
    found: Found, sizes: Sequence[Size], buckets: np.ndarray, global_batch: int
) -> str:
    """Describe the data, its buckets and its batches in several lines of text.

    Args:
        found: the data.
        sizes: of the buckets.
        buckets: the index of each sample's bucket, -1 for samples that are too small.
        global_batch: samples per optimizer step, of all processes together.
    """
    too_small = int((buckets < 0).sum())
    broken, total = found.faults.total, len(found.samples) + found.faults.total
    sections = [
        f"Format: {found.format} ({FORMATS[found.format]})",
        f"Samples: {len(found.samples) - too_small:,} to train on, {too_small:,} too small, "
        f"{broken:,} broken ({broken / max(total, 1):.1%} of {total:,})",
    ]
    if found.samples:
        sections += [
            _resolutions(found),
            _buckets(sizes, buckets, global_batch),
            _captions(found),
        ]
    if broken:
        sections.append("Broken:\n" + _indented(str(found.faults)))
    if found.samples:
        sections.append("Examples:\n" + _indented(_examples(found, sizes, buckets)))
    return "\n".join(sections)


def _resolutions(found: Found) -> str:
    counts = Counter(Size(sample.height, sample.width) for sample in found.samples)
    pixels = sorted(counts, key=lambda size: (size.height * size.width, size))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]
    listed = ", ".join(f"{size} ({count:,})" for size, count in frequent)
    return (
        f"Resolutions: {len(counts):,}, from {pixels[0]} to {pixels[-1]} (height x width)\n"
        f"  most frequent: {listed}"
    )


def _buckets(sizes: Sequence[Size], buckets: np.ndarray, global_batch: int) -> str:
    rows = [("size", "samples", "batches", "in the last batch")]
    places = 0
    for index, size in enumerate(sizes):
        count = int((buckets == index).sum())
        if count:
            batches = -(-count // global_batch)
            places += batches * global_batch
            last = count - (batches - 1) * global_batch
            rows.append((str(size), f"{count:,}", f"{batches:,}", f"{last:,} of {global_batch:,}"))
    if len(rows) == 1:
        return "Buckets: none in use"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    empty = 1 - int((buckets >= 0).sum()) / places
    title = (
        f"Buckets: {len(rows) - 1:,} of {len(sizes):,} in use; {empty:.1%} of the places in the "
        "batches of an epoch stay empty"
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


def _examples(found: Found, sizes: Sequence[Size], buckets: np.ndarray) -> str:
    """Describe samples from all over the data, with their first captions."""
    count = min(EXAMPLES, len(found.samples))
    lines = []
    for index in np.linspace(0, len(found.samples) - 1, count).astype(int):
        sample = found.samples[index]
        bucket = f"bucket {sizes[buckets[index]]}" if buckets[index] >= 0 else "too small"
        caption = " ".join(sample.captions[0].split())
        if len(caption) > CAPTION_CHARACTERS:
            caption = caption[:CAPTION_CHARACTERS].rstrip() + "..."
        others = f" (and {len(sample.captions) - 1:,} more)" if len(sample.captions) > 1 else ""
        lines.append(f"{sample.id}: {Size(sample.height, sample.width)}, {bucket}")
        lines.append(f'  "{caption}"{others}')
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
