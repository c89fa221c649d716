"""From `--data-root` to samples: what kind of data it is, and what is in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from localdit.training.data.candidates import Candidate, examine
from localdit.training.data.captions import CAPTION_SUFFIXES
from localdit.training.data.faults import Fault, Faults
from localdit.training.data.folders import (
    PICTURE_SUFFIXES,
    list_files,
    list_pictures,
    split_suffix,
)
from localdit.training.data.metadata import list_metadata, metadata_files
from localdit.training.data.samples import Sample
from localdit.training.data.tars import COMPRESSED_SUFFIXES, find_tars, list_tars

if TYPE_CHECKING:
    from localdit.training.data.encoded import EncodedSet

FORMATS = {
    "folder": "pictures, each with a .txt, .caption or .json of its name beside it",
    "metadata": "pictures and a metadata.jsonl, metadata.csv or metadata.parquet that names them",
    "webdataset": "WebDataset tars",
    "saved": "a Hugging Face dataset, as its save_to_disk writes it",
    "encoded": "what python -m localdit.training.encode wrote",
}
# A command's output, or something on a network, as WebDataset itself takes them.
STREAM = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass
class Found:
    """What there is to train on.

    Attributes:
        format: one of `FORMATS`.
        samples: in an order that is the same on every machine.
        faults: broken ones.
        encoded: what belongs to encoded samples.
    """

    format: str
    samples: list[Sample]
    faults: Faults = field(default_factory=Faults)
    encoded: EncodedSet | None = None


def find_samples(data_root: str | Path, data_format: str = "auto", progress: bool = True) -> Found:
    """Find out what there is to train on.

    Every caption is read and every picture's header; pictures are not decoded.

    Args:
        data_root: a folder; or, of WebDataset tars, their path, with `*`, `?`, `[...]`,
            `{000..123}` or `{a,b}` for several.
        data_format: one of `FORMATS`, or "auto" to go by what is there.
        progress: show a progress bar if there are many samples.

    Raises:
        FileNotFoundError: if there is nothing at `data_root`.
        ValueError: if there is nothing of a known kind, or of several kinds, or what there is can't
            be used as a whole. Broken samples are no error: they are counted in the result.
    """
    if data_format not in ("auto", *FORMATS):
        raise ValueError(
            f"--data-format is {data_format!r}, expected auto or one of {', '.join(FORMATS)}."
        )
    if STREAM.match(str(data_root)):
        raise ValueError(
            f"--data-root {data_root}: commands and addresses are not read. Samples are visited in "
            "any order, so the data has to be on a disk: download it, and give its path."
        )
    root = Path(data_root)
    if not root.is_dir():
        return _found("webdataset", _list_tars(str(data_root), data_format), progress)
    if data_format == "auto":
        data_format = _marked_format(root) or "auto"
    if data_format == "encoded":
        from localdit.training.data.encoded import open_encoded

        return open_encoded(root)
    if data_format == "saved":
        from localdit.training.data.saved import list_saved

        return _found("saved", list_saved(root), progress)
    return _found(*_list_folder(root, data_format), progress)


def _list_tars(pattern: str, data_format: str) -> list[Candidate | Fault]:
    """The samples of tars that are named by a path or a pattern."""
    if data_format not in ("auto", "webdataset"):
        raise FileNotFoundError(
            f"--data-root {pattern} is no folder, as data of the format {data_format} has to be."
        )
    tars = find_tars(pattern)
    others = [path for path in tars if not _is_tar(path)]
    if others:
        raise ValueError(
            f"--data-root {pattern} stands for {others[0]}, which is no .tar. Give a folder, or "
            "WebDataset tars."
        )
    return list_tars(tars)


def _list_folder(root: Path, data_format: str) -> tuple[str, list[Candidate | Fault]]:
    """The format of a folder, and what may become samples."""
    files = list_files(root)
    if data_format == "auto":
        data_format = _recognize(root, files)
    if data_format == "folder":
        listing = list_pictures(root, files)
    elif data_format == "metadata":
        listing = list_metadata(root, files)
    else:
        listing = list_tars([str(root / file) for file in files if _is_tar(file)], root)
    if not listing:
        raise ValueError(
            f"{root} holds nothing of the format {data_format} ({FORMATS[data_format]}). "
            f"{_contents(files)}"
        )
    return data_format, listing


def _found(data_format: str, listing: Sequence[Candidate | Fault], progress: bool) -> Found:
    samples, faults = examine(listing, progress)
    return Found(data_format, samples, faults)


def _marked_format(root: Path) -> str | None:
    """The format of a folder that says so itself."""
    if (root / "encoded.json").is_file():
        return "encoded"
    dataset = (root / "dataset_info.json").is_file() and (root / "state.json").is_file()
    return "saved" if dataset or (root / "dataset_dict.json").is_file() else None


def _recognize(root: Path, files: Sequence[str]) -> str:
    """The format of a folder, by the files in it; each must be of one kind only."""
    captions = {split_suffix(file)[0] for file in files if _suffix(file) in CAPTION_SUFFIXES}
    pictures = [file for file in files if _suffix(file) in PICTURE_SUFFIXES]
    signs = {
        "metadata": metadata_files(files),
        "webdataset": [file for file in files if _is_tar(file)],
        "folder": [file for file in pictures if split_suffix(file)[0] in captions],
    }
    found = {name: examples for name, examples in signs.items() if examples}
    if len(found) > 1:
        kinds = " and ".join(f"{name} ({examples[0]})" for name, examples in found.items())
        raise ValueError(
            f"{root} holds data of more than one format: {kinds}. Say which is meant with "
            "--data-format."
        )
    if found:
        return next(iter(found))
    if pictures:
        return "folder"  # all without captions, which is reported
    formats = "\n".join(f"  {name}: {meaning}" for name, meaning in FORMATS.items())
    hint = ""
    if any(_suffix(file) in ("parquet", "arrow") for file in files):
        hint = " Tables with pictures in them: load them with datasets, and use save_to_disk."
    raise ValueError(
        f"{root} holds nothing to train on. Looked for one of these:\n{formats}\n"
        f"{_contents(files)}{hint}"
    )


def _suffix(file: str) -> str:
    return split_suffix(file)[1].lower()


def _is_tar(file: str) -> bool:
    return file.lower().endswith((".tar", *COMPRESSED_SUFFIXES))


def _contents(files: Sequence[str]) -> str:
    """What was found instead of what was looked for."""
    suffixes = Counter(f".{_suffix(file)}" if _suffix(file) else "no suffix" for file in files)
    kinds = ", ".join(f"{count:,} with {suffix}" for suffix, count in suffixes.most_common(5))
    return f"Found {len(files):,} files" + (f": {kinds}." if files else ".")
