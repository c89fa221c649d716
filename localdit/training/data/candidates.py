"""From what a listing names to samples: each caption is read, each picture looked at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from localdit.machine import hidden
from localdit.training.data.captions import read_captions
from localdit.training.data.faults import BrokenSample, Fault, Faults
from localdit.training.data.parallel import map_reads
from localdit.training.data.pictures import inspect_picture
from localdit.training.data.samples import Readable, Sample

CHUNK = 64
MANY = 5000  # candidates from which on a progress bar is shown


class Candidate(NamedTuple):
    """What may become a sample.

    Attributes:
        id: of the sample.
        image: where the picture is.
        captions: what `read_captions` takes.
    """

    id: str
    image: Readable
    captions: object


def examine(
    listing: Sequence[Candidate | Fault], progress: bool = True
) -> tuple[list[Sample], Faults]:
    """The samples among what was listed, in its order, and the broken ones."""
    chunks = [listing[start : start + CHUNK] for start in range(0, len(listing), CHUNK)]
    samples: list[Sample] = []
    faults = Faults()
    bar = tqdm(
        total=len(listing),
        desc="Looking at the data",
        unit=" samples",
        disable=hidden(not progress or len(listing) < MANY),
    )
    # Pillow warns of much that is odd but harmless, and of bombs, which are refused anyway.
    with warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore")
        for results in map_reads(_examine_all, chunks):
            for result in results:
                if isinstance(result, Sample):
                    samples.append(result)
                else:
                    faults.add(result)
            bar.update(len(results))
    return samples, faults


def _examine_all(listing: Sequence[Candidate | Fault]) -> list[Sample | Fault]:
    return [entry if isinstance(entry, Fault) else _examine(entry) for entry in listing]


def _examine(candidate: Candidate) -> Sample | Fault:
    try:
        height, width = inspect_picture(candidate.image)
        captions = _captions(candidate)
    except BrokenSample as broken:
        return Fault(broken.kind, candidate.id, broken.detail)
    return Sample(candidate.id, candidate.image, captions, height, width)


def _captions(candidate: Candidate) -> tuple[str, ...]:
    try:
        return read_captions(candidate.captions)
    except OSError as error:
        raise BrokenSample("unreadable", f"its caption: {error}") from error
