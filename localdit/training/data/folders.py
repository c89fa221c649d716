"""Folders of pictures, each with a caption file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from localdit.training.data.captions import CAPTION_SUFFIXES, CaptionFile
from localdit.training.data.samples import Blob, Candidate, Fault

# Of the formats that `localdit.images` reads.
PICTURE_SUFFIXES = frozenset(
    {"bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm"}
    | {"tif", "tiff", "webp"}
)


def list_files(root: Path) -> list[str]:
    """Return the files in a folder and below it, in an order that is the same on every machine.

    Hidden files and folders, whose names begin with a dot, are skipped. Links are followed, except
    to a folder that contains the link.

    Returns:
        Their paths relative to `root`, with slashes, sorted by code points.
    """
    return sorted(_walk(str(root), ""))


def _walk(root: str, folder: str) -> Iterator[str]:
    here = os.path.join(root, folder)
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = folder + entry.name
            broken_link = entry.is_symlink() and not os.path.exists(entry.path)
            if entry.is_file() or broken_link:  # a broken link is reported when it is opened
                yield name
            elif entry.is_dir() and not (entry.is_symlink() and _leads_back(entry.path, here)):
                yield from _walk(root, name + "/")


def _leads_back(link: str, folder: str) -> bool:
    return Path(folder).resolve().is_relative_to(Path(link).resolve())


def list_pictures(root: Path, files: Sequence[str]) -> list[Candidate | Fault]:
    """Return the pictures among files, each with the caption file of its name.

    `a.png` takes its caption from `a.txt`, `a.caption` or `a.json`, the first of these that
    exists. A file with a caption but an unknown suffix, such as `a.heic`, is a fault.

    Args:
        root: the folder.
        files: the result of `list_files`.
    """
    suffixes: dict[str, list[str]] = {}
    for file in files:
        stem, suffix = split_suffix(file)
        suffixes.setdefault(stem, []).append(suffix)
    listing: list[Candidate | Fault] = []
    for file in files:
        stem, suffix = split_suffix(file)
        beside = {other.lower(): f"{stem}.{other}" for other in suffixes[stem]}
        kind = next((kind for kind in CAPTION_SUFFIXES if kind in beside), None)
        if suffix.lower() in PICTURE_SUFFIXES:
            caption = kind and CaptionFile(kind, Blob(os.path.join(root, beside[kind])))
            listing.append(Candidate(printable(file), Blob(os.path.join(root, file)), caption))
        elif kind and suffix.lower() not in CAPTION_SUFFIXES and not PICTURE_SUFFIXES & {*beside}:
            listing.append(Fault("wrong type", printable(file), f".{suffix} files are not read"))
    return listing


def split_suffix(file: str) -> tuple[str, str]:
    """Split a path into the part before its last suffix, and the suffix without the dot."""
    suffix = PurePosixPath(file).suffix
    return file.removesuffix(suffix), suffix[1:]


def printable(name: str) -> str:
    """Return a file's name for reports: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
