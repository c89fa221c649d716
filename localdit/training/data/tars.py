"""WebDataset tars: samples whose files lie together in tars, told apart by their names.

The headers of a tar are read once; after that, any sample can be read at any time. Nothing but
pictures and captions is ever opened.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from localdit.training.data.candidates import Candidate
from localdit.training.data.captions import CAPTION_SUFFIXES, CaptionFile
from localdit.training.data.faults import Fault
from localdit.training.data.folders import PICTURE_SUFFIXES, printable
from localdit.training.data.parallel import map_reads
from localdit.training.data.samples import Blob
from localdit.training.data.tar_index import TarIndex, index_tar

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED_SIGNATURES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
MAX_TARS = 1_000_000
# The path up to the first dot of the base name is the sample's key, the rest tells its files apart.
MEMBER_NAME = re.compile(r"(?:\./)?((?:.*/)?[^/.]+)\.([^/]+)")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_tars(pattern: str) -> list[str]:
    """The tars that a path names, sorted.

    Args:
        pattern: path of a tar, with `*`, `?` and `[...]` for what is there, and `{000..123}` or
            `{a,b}` for what has to be there.

    Raises:
        FileNotFoundError: if one of them is missing.
        ValueError: if there are too many, or some are no tars by their name.
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
        raise FileNotFoundError(f"--data-root: there is no {', '.join(missing[:3])}{more}.")
    return sorted(found)


def expand_braces(pattern: str) -> list[str]:
    """What a pattern with `{000..123}` and `{a,b}` stands for, in order, nothing twice.

    Raises:
        ValueError: if that is more than `MAX_TARS`.
    """
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
    """The samples in tars.

    Args:
        paths: of the tars.
        root: the folder that they are named from in reports; by default the one they all are in.

    Raises:
        ValueError: if one is compressed.
    """
    if not paths:
        return []
    compressed = [path for path in paths if _is_compressed(path)]
    if compressed:
        raise ValueError(
            f"{compressed[0]} is compressed, so that samples can't be read in any order: unpack "
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
        return False  # said when it is indexed


def _list_tar(path: str, tar: str) -> list[Candidate | Fault]:
    """The samples in a tar, in its order.

    Args:
        path: of the tar.
        tar: what it is called in reports.
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
    listing += [Fault("bad entry", f"{tar}, byte {at:,}", "no header") for at in index.damaged]
    copies = {key: max(repeats[key, suffix] for suffix in samples[key]) for key, _ in repeats}
    for key, count in copies.items():
        listing += [Fault("duplicate", f"{tar}/{printable(key)}")] * count
    return listing if index.ended else _cut_off(listing, index, tar)


def _entry(id: str, blobs: Mapping[str, Blob]) -> Candidate | Fault:
    """What may become of the files of a sample, given by their suffixes."""
    picture = next((blobs[suffix] for suffix in blobs if suffix in PICTURE_SUFFIXES), None)
    kind = next((suffix for suffix in CAPTION_SUFFIXES if suffix in blobs), None)
    if picture is None:
        return Fault("half sample", id, f"no picture, only {', '.join(blobs)}")
    return Candidate(id, picture, CaptionFile(kind, blobs[kind]) if kind else None)


def _cut_off(
    listing: list[Candidate | Fault], index: TarIndex, tar: str
) -> list[Candidate | Fault]:
    """The samples of a tar whose end is missing: the last of them may be only a part."""
    last = index.cut or (index.members[-1].name if index.members else "")
    match = MEMBER_NAME.fullmatch(last)
    id = f"{tar}/{printable(match[1])}" if match else tar
    fault = Fault("half sample", id, "the tar ends in the midst of it")
    for number, entry in enumerate(listing):
        if entry.id == id:
            whole = isinstance(entry, Candidate) and entry.captions is not None
            if not whole:
                listing[number] = fault
            elif index.cut == "":  # it is the header of another one that is cut off
                listing.append(Fault("half sample", tar, "the tar ends in the midst of a header"))
            return listing
    return [*listing, fault]
