"""WebDataset tars: samples whose files lie together in tars and share a name.

Only the headers of a tar are read to index it; after that, any sample can be read at any time.
Reading headers directly is five times as fast as the `tarfile` module, and reports what that module
hides: a missing end, or a damaged header in the middle. Only pictures and captions are ever opened.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from localdit.training.data.listings import PICTURE_SUFFIXES, printable
from localdit.training.data.samples import (
    Blob,
    Candidate,
    Fault,
    caption_files,
    map_reads,
)

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED_SIGNATURES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
MAX_TARS = 1_000_000
# The path up to the first dot of the base name is the sample's key; the rest is the file's suffix.
MEMBER_NAME = re.compile(r"(?:\./)?((?:.*/)?[^/.]+)\.([^/]+)")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")

BLOCK = 512
ZEROS = bytes(BLOCK)
# Concatenated tars have blocks of zeros between them, at most about this many.
MAX_ZERO_BLOCKS = 2048
MAX_NAME_BYTES = 1_000_000
FILES = b"0\0" + b"7"  # types of members that are regular files
WITHOUT_DATA = b"123456"  # links, devices, folders
OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
ABSURD = 1 << 63  # bytes: stands for a size that can't be right, more than any file has
LONG_NAME, EXTENDED = b"L", b"x"  # types of members that hold the next one's name
PAX_RECORD = re.compile(
    rb"(\d{1,10}) ([^=]+)="
)  # then the value; the number is the length of the record


def find_tars(pattern: str) -> list[str]:
    """Return the tars that a path names, sorted.

    Args:
        pattern: path of a tar. `*`, `?` and `[...]` match existing files; every file that
            `{000..123}` or `{a,b}` names must exist.
    """
    if os.path.isfile(pattern):
        return [pattern]
    found: set[str] = set()
    missing = []
    for path in expand_braces(pattern):
        paths = glob.glob(path) if glob.has_magic(path) else [path] * os.path.isfile(path)
        found.update(paths)
        if not paths:
            missing.append(path)
    if missing:
        more = f", and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"--data-root: not found: {', '.join(missing[:3])}{more}.")
    return sorted(found)


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..123}` and `{a,b}` in a pattern, in order, without duplicates."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    choices: Sequence[str] = braces[1].split(",")
    if numbers := RANGE.fullmatch(braces[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= MAX_TARS:
            raise ValueError(f"{pattern} stands for more than {MAX_TARS:,} tars.")
        step = 1 if first <= last else -1
        digits = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices = [f"{number:0{digits}d}" for number in range(first, last + step, step)]
    expanded: dict[str, None] = {}
    for choice in choices:
        expanded.update(dict.fromkeys(expand_braces(before + choice + after)))
        if len(expanded) > MAX_TARS:
            raise ValueError(f"{pattern} stands for more than {MAX_TARS:,} tars.")
    return list(expanded)


def list_tars(paths: Sequence[str], root: Path | None = None) -> list[Candidate | Fault]:
    """Return the samples in tars.

    Args:
        root: the folder that names in reports start from; by default the one that holds all tars.
    """
    if not paths:
        return []
    compressed = [path for path in paths if _is_compressed(path)]
    if compressed:
        raise ValueError(
            f"{compressed[0]} is compressed, and its samples can't be read in any order. Unpack "
            "it to a plain .tar (gunzip, unxz or zstd -d)."
        )
    base = root or os.path.commonpath([os.path.dirname(path) for path in paths]) or "."
    names = [printable(Path(os.path.relpath(path, base)).as_posix()) for path in paths]
    listings = map_reads(lambda tar: _list_tar(*tar), zip(paths, names, strict=True))
    return [entry for listing in listings for entry in listing]


def _is_compressed(path: str) -> bool:
    if path.lower().endswith(COMPRESSED_SUFFIXES):
        return True
    try:
        return Blob(path, size=8).read().startswith(COMPRESSED_SIGNATURES)
    except OSError:
        return False  # reported when it is indexed


def _list_tar(path: str, tar: str) -> list[Candidate | Fault]:
    """Return the samples in a tar, in its order.

    Args:
        tar: name of the tar in reports.
    """
    try:
        if not os.path.getsize(path):
            return [Fault("empty", tar)]
        index = index_tar(path)
    except (OSError, ValueError) as error:
        return [Fault("unreadable", tar, str(error))]
    samples: dict[str, dict[str, Blob]] = {}
    repeats: Counter[tuple[str, str]] = Counter()
    for name, offset, size in index.members:
        if match := MEMBER_NAME.fullmatch(name):
            key, suffix = match[1], match[2].lower()
            blobs = samples.setdefault(key, {})
            if suffix in blobs:
                repeats[key, suffix] += 1
            else:
                blobs[suffix] = Blob(path, offset, size)
    listing = [_entry(f"{tar}/{printable(key)}", blobs) for key, blobs in samples.items()]
    for key, blobs in samples.items():
        first, *others = [suffix for suffix in blobs if suffix in PICTURE_SUFFIXES] or [""]
        listing += [
            Fault("duplicate", f"{tar}/{printable(key)}.{suffix}", f"its .{first} is used")
            for suffix in others
        ]
    listing += [Fault("bad entry", f"{tar}, byte {at:,}", "no header") for at in index.damaged]
    copies = {key: max(repeats[key, suffix] for suffix in samples[key]) for key, _ in repeats}
    for key, count in copies.items():
        listing += [Fault("duplicate", f"{tar}/{printable(key)}")] * count
    return listing if index.ended else _cut_off(listing, index, tar)


def _entry(id: str, blobs: Mapping[str, Blob]) -> Candidate | Fault:
    """Return the candidate that the files of a sample make, given by their suffixes."""
    picture = next((blobs[suffix] for suffix in blobs if suffix in PICTURE_SUFFIXES), None)
    if picture is None:
        return Fault("half sample", id, f"no picture, only {', '.join(blobs)}")
    return Candidate(id, picture, caption_files(blobs))


def _cut_off(
    listing: list[Candidate | Fault], index: TarIndex, tar: str
) -> list[Candidate | Fault]:
    """Mark the last sample of a tar whose end is missing, unless it is complete."""
    last = index.cut or (index.members[-1].name if index.members else "")
    match = MEMBER_NAME.fullmatch(last)
    id = f"{tar}/{printable(match[1])}" if match else tar
    fault = Fault("half sample", id, "the tar ends within it")
    for number, entry in enumerate(listing):
        if entry.id == id:
            whole = isinstance(entry, Candidate) and entry.captions is not None
            if not whole:
                listing[number] = fault
            elif index.cut == "":  # the header of the next sample is cut off
                listing.append(Fault("half sample", tar, "the tar ends within a header"))
            return listing
    return [*listing, fault]


class TarMember(NamedTuple):
    """A regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass
class TarIndex:
    """The files in a tar, in their order."""

    members: list[TarMember] = field(default_factory=list)  # the complete files
    # Positions without the expected header, or with one whose size can't be right; reading
    # continued at the next header.
    damaged: list[int] = field(default_factory=list)
    ended: bool = False  # whether the tar has its end marker
    cut: str | None = None  # name of the last file if it is incomplete; "" if a header is cut off


class _Header(NamedTuple):
    name: str
    size: int
    type: bytes


def index_tar(path: str) -> TarIndex:
    """Read the headers of an uncompressed tar (ustar, GNU or pax).

    A size is believed if the file ends behind it, or goes on with a header or zeros. Otherwise the
    next header is looked for among the bytes that it covers.

    Raises:
        ValueError: if there is no header, so it is not a tar.
        OSError: if it can't be read.
    """
    index = TarIndex()
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        at = 0
        header: _Header | None = None
        name: str | None = None  # of the next member, if they are given ahead of it
        size: int | None = None
        while found := _find_header(file, at, index):
            start, header = found
            covered = 0 if header.type in WITHOUT_DATA else header.size
            if size is not None and header.type in FILES:
                covered = size
            at = _behind(start, covered)
            whole = start + covered <= length
            if not (whole and _may_go_on(file, at)):
                inner = _search_header(file, start, min(at, length))
                if inner is not None:
                    index.damaged.append(start - BLOCK)
                    at, name, size = inner, None, None
                    continue
            if not whole:
                index.cut = (name or header.name) if header.type in FILES else ""
                break
            if header.type in (LONG_NAME, EXTENDED):
                longer, size = _read_ahead(file, start, header)
                name = longer or name
                continue
            if header.type in FILES:
                index.members.append(TarMember(name or header.name, start, covered))
            name = size = None
    if header is None and index.damaged:
        raise ValueError("it doesn't begin with the header of a tar")
    return index


def _find_header(file: BinaryIO, at: int, index: TarIndex) -> tuple[int, _Header] | None:
    """Return the next header from `at` on, and where its data begin; None at the end."""
    zeros, lost = 0, False
    while zeros <= MAX_ZERO_BLOCKS:
        block = _read_block(file, at)
        at += BLOCK
        if block == ZEROS:
            index.ended = True
            zeros += 1
        elif len(block) < BLOCK:
            if block.strip(b"\0"):
                index.ended, index.cut = False, ""
            return None
        elif header := _parse(block):
            index.ended = False
            return at, header
        elif not lost:
            index.damaged.append(at - BLOCK)
            lost = True
    return None


def _may_go_on(file: BinaryIO, at: int) -> bool:
    """Return whether a tar may go on at a position, or end there."""
    block = _read_block(file, at)
    return not block.strip(b"\0") or len(block) < BLOCK or _checksum(block) is not None


def _search_header(file: BinaryIO, at: int, end: int) -> int | None:
    """Return the position of the first header between two positions."""
    return next(
        (place for place in range(at, end, BLOCK) if _parse(_read_block(file, place))), None
    )


def _read_block(file: BinaryIO, at: int) -> bytes:
    file.seek(at)
    return file.read(BLOCK)


def _behind(start: int, size: int) -> int:
    """Return where the block after a member's bytes begins."""
    return start - (-size // BLOCK) * BLOCK


def _parse(block: bytes) -> _Header | None:
    """Parse a header; None if its checksum is wrong."""
    checksum = _checksum(block)
    # The checksum itself counts as spaces.
    if checksum is None or sum(block) - sum(block[148:156]) + 8 * ord(" ") != checksum:
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    size = _number(block[124:136])
    return _Header(name, ABSURD if size is None else size, block[156:157])


def _checksum(block: bytes) -> int | None:
    return _number(block[148:156])


def _number(field: bytes) -> int | None:
    """Return the number in a field of a header; None if it is negative or none."""
    if field[:1] == b"\x80":  # too large for octal digits
        return int.from_bytes(field[1:], "big")
    digits = OCTAL.fullmatch(field)
    return int(digits[1] or b"0", 8) if digits else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _read_ahead(file: BinaryIO, start: int, header: _Header) -> tuple[str | None, int | None]:
    """Return name and size of the next member, None for what is not given ahead of its header."""
    file.seek(start)
    data = file.read(min(header.size, MAX_NAME_BYTES))
    if header.type == LONG_NAME:
        return _text(data), None
    records, at = {}, 0
    while record := PAX_RECORD.match(data, at):
        at = max(at + int(record[1]), record.end())
        records[record[2]] = data[record.end() : at - 1]
    name, size = records.get(b"path"), records.get(b"size", b"")
    if size.isdigit():
        return _text(name) if name else None, int(size) if len(size) < 20 else ABSURD
    return _text(name) if name else None, None
