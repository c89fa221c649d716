"""Samples: their bytes, their captions, and the counts of broken ones."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

from localdit.core.text import MAX_PROMPT_CHARACTERS, NO_CHARACTER
from localdit.files import decode_text

KINDS = {
    "missing": "the picture does not exist",
    "unreadable": "the file can't be opened",
    "empty": "zero bytes",
    "wrong type": "not a supported kind of picture",
    "truncated": "the picture's file ends too early",
    "damaged": "the picture can't be decoded",
    "too large": "the picture has too many pixels",
    "animated": "more than one frame",
    "no caption": "the caption is missing or empty",
    "bad caption": "the caption is not text, or far too long",
    "bad entry": "a line or row can't be parsed",
    "half sample": "the tar ends within the sample, or holds only a part of it",
    "duplicate": "another sample has the same name",
}
EXAMPLES = 5  # kept of each kind
DETAIL = 200  # characters of a detail in reports
# In order of preference, among the files beside a picture and the keys of a JSON object.
CAPTION_SUFFIXES = ("txt", "caption", "json")
CAPTION_KEYS = ("text", "caption", "captions", "prompt")
MAX_FILE_BYTES = 1_000_000

THREADS = 16
PATIENCE = 2.0  # seconds of waiting per second of work above which threads pay
NOTABLE = 0.1  # seconds; less waiting than this says nothing

Entry = TypeVar("Entry")
Result = TypeVar("Result")


class Readable(Protocol):
    """Something stored: a file, a member of a tar, a cell of a table."""

    def read(self) -> bytes:
        """Return all of its bytes.

        Raises:
            OSError: if they can't be read.
        """

    def place(self) -> tuple[str, int]:
        """Return where it lies: a real path, and a position there."""


class Blob(NamedTuple):
    """Bytes of a file: all of it, or `size` bytes from `offset`."""

    path: str
    offset: int = 0
    size: int | None = None
    crc32: int | None = None  # checksum of the bytes, if it is known

    def read(self) -> bytes:
        """Return the bytes; fewer than `size` if the file ends before.

        Raises:
            BrokenSample: "damaged", if they have another checksum.
            OSError: if they can't be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read() if self.size is None else file.read(self.size)
        if self.crc32 is not None and zlib.crc32(data) != self.crc32:
            raise BrokenSample(
                "damaged", f"the bytes in {self.path} are not those that were written"
            )
        return data

    def place(self) -> tuple[str, int]:
        """Return the real path of the file, and the offset."""
        return _real_path(self.path), self.offset


@lru_cache(maxsize=1)  # the samples of a tar follow each other
def _real_path(path: str) -> str:
    return os.path.realpath(path)


class Candidate(NamedTuple):
    """An entry of a listing that may become a sample."""

    id: str
    image: Readable
    captions: object  # anything that `read_captions` takes


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture that exists, with at least one caption."""

    id: str  # name in reports: the path within the data, the same on every machine
    image: Readable
    captions: tuple[str, ...]  # each visit draws one of them
    height: int  # upright, in pixels
    width: int


class Fault(NamedTuple):
    """A sample that can't be used for training, and the reason."""

    kind: str
    id: str
    detail: str = ""


class BrokenSample(Exception):
    """Raised when a sample turns out to be broken."""

    def __init__(self, kind: str, detail: str = "") -> None:
        assert kind in KINDS, kind
        super().__init__(detail or KINDS[kind])
        self.kind, self.detail = kind, detail


class Faults:
    """Counts of broken samples by kind, with a few examples of each.

    Attributes:
        counts: number of broken samples of each kind.
        examples: the first `EXAMPLES` of each kind.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Fault]] = {}
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Count one more."""
        self.counts[fault.kind] += 1
        examples = self.examples.setdefault(fault.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(fault)

    @property
    def total(self) -> int:
        """Number of broken samples of all kinds."""
        return self.counts.total()

    def __str__(self) -> str:
        """Return a line for each kind: its count, its meaning, examples, the first one's detail."""
        lines = []
        for kind, count in self.counts.most_common():
            first, *_ = examples = self.examples[kind][:3]
            names = ", ".join(fault.id for fault in examples)
            more = ", ..." if count > 3 else ""
            detail = f"; {first.id}: {first.detail[:DETAIL]}" if first.detail else ""
            lines.append(f"{count:,} {kind} ({KINDS[kind]}): {names}{more}{detail}")
        return "\n".join(lines)


def require_few(faults: Faults, healthy: int, allowed: float) -> None:
    """Refuse data in which too large a share of the samples is broken.

    Args:
        healthy: number of samples that are not broken.
        allowed: share of all samples, 0 to 1.
    """
    total = faults.total + healthy
    if faults.total > allowed * total:
        raise ValueError(
            f"{faults.total:,} of {total:,} samples are broken, {faults.total / total:.1%}, more "
            f"than the {allowed:.0%} that --max-broken allows:\n{faults}\nRepair or remove them, "
            "or raise --max-broken."
        )


def map_reads(function: Callable[[Entry], Result], entries: Iterable[Entry]) -> Iterator[Result]:
    """Apply a function to entries, in order; in threads once it has waited more than worked.

    Threads hide the latency of network storage. With local files they would compete for the
    interpreter and take twice as long as a single thread.
    """
    rest = iter(entries)
    waited = worked = 0.0
    for entry in rest:
        start, cpu = time.perf_counter(), time.thread_time()
        result = function(entry)
        cpu = time.thread_time() - cpu
        worked += cpu
        waited += time.perf_counter() - start - cpu
        yield result
        if waited > max(NOTABLE, PATIENCE * worked):
            with ThreadPoolExecutor(THREADS) as pool:
                yield from pool.map(function, rest)


class CaptionFile(NamedTuple):
    """A stored caption: the suffixes "txt" and "caption" stand for plain text, "json" for JSON.

    `otherwise` is read if the file has no caption.
    """

    suffix: str
    blob: Blob
    otherwise: CaptionFile | None = None


def caption_files(blobs: Mapping[str, Blob]) -> CaptionFile | None:
    """Return the caption files among the files of a sample, given by their suffixes."""
    chosen = None
    for suffix in reversed(CAPTION_SUFFIXES):
        if suffix in blobs:
            chosen = CaptionFile(suffix, blobs[suffix], chosen)
    return chosen


def read_captions(source: object) -> tuple[str, ...]:
    """Return the captions of a picture.

    Args:
        source: a caption; a list of captions; an object with them under one of `CAPTION_KEYS`; or
            a file with any of these.

    Returns:
        At least one caption, each stripped, in their order, without duplicates.

    Raises:
        BrokenSample: "no caption" or "bad caption".
    """
    if isinstance(source, CaptionFile):
        try:
            return read_captions(_read_file(source))
        except BrokenSample as broken:
            if broken.kind != "no caption" or source.otherwise is None:
                raise
            return read_captions(source.otherwise)
    detail = ""
    if isinstance(source, dict):
        detail = f"its keys are {', '.join(source)}, expected {' or '.join(CAPTION_KEYS)}"
        source = pick_caption(source)
    texts = source if isinstance(source, list) else [source]
    captions = dict.fromkeys(_clean(text) for text in texts if text is not None)
    captions.pop("", None)
    if not captions:
        raise BrokenSample("no caption", detail)
    return tuple(captions)


def pick_caption(row: Mapping[str, Any]) -> Any:
    """Return the first value under `CAPTION_KEYS` that is not empty; None if there is none."""
    return next((row[key] for key in CAPTION_KEYS if not _is_empty(row.get(key))), None)


def _is_empty(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)


def _read_file(file: CaptionFile) -> Any:
    path, offset, size, _ = file.blob
    limit = MAX_FILE_BYTES + 1
    data = Blob(path, offset, limit if size is None else min(size, limit)).read()
    if len(data) == limit:
        raise BrokenSample("bad caption", f"the file has more than {MAX_FILE_BYTES:,} bytes")
    try:
        text = decode_text(data)
    except ValueError as error:
        raise BrokenSample("bad caption", str(error)) from error
    try:
        return json.loads(text) if file.suffix == "json" and text.strip() else text
    except (ValueError, RecursionError) as error:
        raise BrokenSample("bad caption", f"the file is not JSON: {error}") from error


def _clean(text: object) -> str:
    if not isinstance(text, str):
        raise BrokenSample("bad caption", f"it is of type {type(text).__name__}, expected text")
    text = text.strip()
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise BrokenSample(
            "bad caption", f"it has {len(text):,} characters, more than {MAX_PROMPT_CHARACTERS:,}"
        )
    if wrong := NO_CHARACTER.search(text):
        raise BrokenSample("bad caption", f"it has {wrong[0]!a}, which is not a character of text")
    return text
