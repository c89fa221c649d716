"""From `--data-root` to samples: recognise the format, list the entries, examine each of them."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from localdit.training.data.encoded import MANIFEST, EncodedSet, open_encoded
from localdit.training.data.listings import (
    PICTURE_SUFFIXES,
    list_files,
    list_metadata,
    list_pictures,
    list_saved,
    metadata_files,
    other_saved_splits,
    other_splits,
    printable,
    split_suffix,
)
from localdit.training.data.pictures import inspect_picture
from localdit.training.data.samples import (
    CAPTION_SUFFIXES,
    Blob,
    BrokenSample,
    Candidate,
    Fault,
    Faults,
    Sample,
    map_reads,
    read_captions,
)
from localdit.training.data.tars import COMPRESSED_SUFFIXES, find_tars, list_tars

FORMATS = {
    "folder": "pictures, each with a .txt, .caption or .json of its name beside it",
    "metadata": "pictures and a metadata.jsonl, metadata.csv or metadata.parquet that names them",
    "webdataset": "WebDataset tars; a picture and its .txt, .caption or .json share a name",
    "saved": "a Hugging Face dataset, written by its save_to_disk",
    "encoded": "written by python -m localdit.training.encode",
}
# A command's output, or an address on a network, both of which WebDataset itself takes.
STREAM = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+:/")
CHUNK = 64  # candidates per task of a thread
NAMES = 6  # of files, listed where there is no data
MANY = 5000  # candidates from which on a progress bar is shown


@dataclass
class Found:
    """The data to train on."""

    format: str  # one of `FORMATS`
    samples: list[Sample]  # in an order that is the same on every machine
    faults: Faults = field(default_factory=Faults)
    encoded: EncodedSet | None = None  # the set that encoded samples belong to
    other_splits: list[str] = field(default_factory=list)  # those that are left out
    unnamed: list[str] = field(default_factory=list)  # pictures that no metadata file names
    contents: str = ""  # of a folder, described

    def unused(self) -> str:
        """Return a line about other splits and one about unnamed pictures, if there are any."""
        lines = []
        if self.other_splits:
            lines.append(f"Splits: train is used; left out: {', '.join(self.other_splits)}")
        if self.unnamed:
            names = ", ".join(printable(file) for file in self.unnamed[:NAMES])
            more = ", ..." if len(self.unnamed) > NAMES else ""
            lines.append(
                f"Left out because no metadata file names them: {len(self.unnamed):,} pictures: "
                f"{names}{more}"
            )
        return "\n".join(lines)

    def require_samples(self, data_root: str | Path) -> None:
        """Refuse data without a sound sample, with the reason."""
        if self.samples:
            return
        broken = f"all {self.faults.total:,} are broken:\n{self.faults}"
        lines = [
            f"{data_root} has no sample that can be used: "
            + (broken if self.faults.total else "it is empty."),
            f"Expected {FORMATS[self.format]}.",
            self.contents,
            self.unused(),
        ]
        raise ValueError("\n".join(filter(None, lines)))


def find_samples(
    data_root: str | Path,
    data_format: str = "auto",
    progress: bool = True,
    output: Path | None = None,
) -> Found:
    """Find the samples to train on.

    Every caption is read and every picture's header; pictures are not decoded.

    Args:
        data_root: a folder; or the path of WebDataset tars, with `*`, `?`, `[...]`, `{000..123}`
            or `{a,b}` for several.
        data_format: one of `FORMATS`, or "auto" to recognise it by the files.
        progress: show a progress bar if there are many samples.
        output: folder that is written to. If it is within `data_root`, it holds no data.

    Raises:
        FileNotFoundError: if nothing exists at `data_root`.
        ValueError: if there is no data of a known format, or data of several formats, or it can't
            be used at all. Broken samples are no error: they are counted in the result.
    """
    if STREAM.match(str(data_root)):
        raise ValueError(
            f"--data-root {data_root}: commands and addresses are not read. Samples are visited in "
            "any order, so the data must be on a disk: download it, and give its path."
        )
    root = Path(data_root)
    if not root.is_dir():
        return Found("webdataset", *examine(_list_tars(str(data_root), data_format), progress))
    if output is not None and output.resolve() == root.resolve():
        raise ValueError(f"--output {output} is the folder of the data. Choose another.")
    if data_format == "auto":
        data_format = _marked_format(root) or "auto"
    if data_format == "encoded":
        return Found("encoded", *open_encoded(root))
    if data_format == "saved":
        samples, faults = examine(list_saved(root), progress)
        return Found("saved", samples, faults, other_splits=other_saved_splits(root))
    files = list_files(root, without=output)
    splits = other_splits(files)
    beginnings = tuple(f"{folder}/" for folder in splits)
    files = [file for file in files if not file.startswith(beginnings)]
    data_format, listing = _list_folder(root, files, data_format)
    listing = [entry for entry in listing if not entry.id.startswith(beginnings)]
    samples, faults = examine(listing, progress)
    return Found(
        data_format,
        samples,
        faults,
        other_splits=splits,
        unnamed=_unnamed(root, files, listing) if data_format == "metadata" else [],
        contents=_contents(files),
    )


def examine(
    listing: Sequence[Candidate | Fault], progress: bool = True
) -> tuple[list[Sample], Faults]:
    """Read the captions and the header of every candidate.

    Returns:
        The samples, in the order of the listing, and the broken ones.
    """
    chunks = [listing[start : start + CHUNK] for start in range(0, len(listing), CHUNK)]
    samples: list[Sample] = []
    faults = Faults()
    bar = tqdm(
        total=len(listing),
        desc="Examining the data",
        unit=" samples",
        disable=not progress or len(listing) < MANY or None,  # None: on terminals only
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
        captions = read_captions(candidate.captions)
    except BrokenSample as broken:
        return Fault(broken.kind, candidate.id, broken.detail)
    except OSError as error:  # `inspect_picture` turns its own into BrokenSample
        return Fault("unreadable", candidate.id, f"its caption: {error}")
    return Sample(candidate.id, candidate.image, captions, height, width)


def _list_tars(pattern: str, data_format: str) -> list[Candidate | Fault]:
    """List the samples of tars that a path or a pattern names."""
    if data_format not in ("auto", "webdataset"):
        raise FileNotFoundError(
            f"--data-root {pattern} is not a folder, but data of the format {data_format} must be."
        )
    tars = find_tars(pattern)
    others = [path for path in tars if not _is_tar(path)]
    if others:
        raise ValueError(
            f"--data-root {pattern} names {others[0]}, which is not a .tar. Give a folder or "
            "WebDataset tars."
        )
    return list_tars(tars)


def _list_folder(
    root: Path, files: Sequence[str], data_format: str
) -> tuple[str, list[Candidate | Fault]]:
    """Return the format of a folder with these files, and its candidates."""
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
            f"{root} has no data of the format {data_format} ({FORMATS[data_format]}). "
            f"{_contents(files)}"
        )
    return data_format, listing


def _marked_format(root: Path) -> str | None:
    """Return the format of a folder with a file that names it."""
    if (root / MANIFEST).is_file():
        return "encoded"
    dataset = (root / "dataset_info.json").is_file() and (root / "state.json").is_file()
    return "saved" if dataset or (root / "dataset_dict.json").is_file() else None


def _recognize(root: Path, files: Sequence[str]) -> str:
    """Return the format of a folder by its files, which must all be of one format."""
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
            f"{root} has data of more than one format: {kinds}. Choose one with --data-format."
        )
    if found:
        return next(iter(found))
    if pictures:
        return "folder"  # all without captions, which will be reported
    formats = "\n".join(f"  {name}: {meaning}" for name, meaning in FORMATS.items())
    hint = ""
    if any(_suffix(file) in ("parquet", "arrow") for file in files):
        hint = " If these tables hold pictures, load them with datasets and use save_to_disk."
    raise ValueError(
        f"{root} has nothing to train on. These formats are known:\n{formats}\n"
        f"{_contents(files)}{hint}"
    )


def _unnamed(root: Path, files: Sequence[str], listing: Sequence[Candidate | Fault]) -> list[str]:
    """Return the pictures among files that are not in a listing."""
    named = {entry.image for entry in listing if isinstance(entry, Candidate)}
    pictures = (file for file in files if _suffix(file) in PICTURE_SUFFIXES)
    return [file for file in pictures if Blob(os.path.join(root, file)) not in named]


def _suffix(file: str) -> str:
    return split_suffix(file)[1].lower()


def _is_tar(file: str) -> bool:
    return file.lower().endswith((".tar", *COMPRESSED_SUFFIXES))


def _contents(files: Sequence[str]) -> str:
    """Describe the files that were found instead."""
    suffixes = Counter(f".{_suffix(file)}" if _suffix(file) else "no suffix" for file in files)
    kinds = ", ".join(f"{count:,} with {suffix}" for suffix, count in suffixes.most_common(5))
    names = ", ".join(printable(file) for file in files[:NAMES])
    return f"Found {len(files):,} files" + (f": {kinds}. The first: {names}." if files else ".")
