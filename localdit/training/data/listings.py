"""Lists of the pictures in folders, in metadata files and in saved Hugging Face datasets.

- A folder has pictures, each with a caption file beside it.
- A `metadata.jsonl`, `metadata.csv` or `metadata.parquet` names pictures by `file_name`, relative
  to its own folder, with a caption under `text` or another of `CAPTION_KEYS`: the image folder
  convention of Hugging Face datasets. JSON Lines and Parquet may also hold lists of captions.
  Several folders of the data may have such a file.
- `save_to_disk` of a `Dataset` or `DatasetDict` writes a saved dataset. Up to 8 of them stay open
  for reading until the process ends.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from localdit.files import decode_text, is_unicode, read_json, text_encoding
from localdit.training.data.samples import (
    CAPTION_KEYS,
    CAPTION_SUFFIXES,
    Blob,
    BrokenSample,
    Candidate,
    Fault,
    caption_files,
    pick_caption,
)

# Of the formats that `localdit.images` reads.
PICTURE_SUFFIXES = frozenset(
    {"bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm"}
    | {"tif", "tiff", "webp"}
)
# Data with several splits is trained on the first of these, and not on the others.
TRAIN_SPLITS = ("train", "training")
OTHER_SPLITS = frozenset(
    {"test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

MAX_LINE = 10_000_000  # characters of a line of a metadata file

Row = Mapping[str, Any] | BrokenSample


def list_files(root: Path, without: Path | None = None) -> list[str]:
    """Return the files in a folder and below it, in an order that is the same on every machine.

    Hidden files and folders, whose names begin with a dot, are skipped. Links are followed, except
    to a folder that contains the link or `root`. A folder is listed once, however many links lead
    to it: under its own name if that is below `root`, otherwise under the first link.

    Args:
        without: a folder that is skipped.

    Returns:
        Their paths relative to `root`, with slashes, sorted by code points.
    """
    files: list[str] = []
    folders, links = [""], list[str]()
    top = Path(root).resolve()
    seen = {Path(without).resolve()} if without else set()
    while folders or links:
        links.sort()
        folder = folders.pop() if folders else links.pop(0)
        here = Path(root, folder).resolve()
        if here in seen:
            continue
        seen.add(here)
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = folder + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name + "/")
                elif entry.is_dir():
                    target = Path(entry.path).resolve()
                    if not (here.is_relative_to(target) or top.is_relative_to(target)):
                        links.append(name + "/")
                elif entry.is_file() or not os.path.exists(entry.path):
                    files.append(name)  # a broken link is reported when it is opened
    return sorted(files)


def other_splits(files: Sequence[str]) -> list[str]:
    """Return the folders of splits beside one for training, such as `test` beside `train`.

    Args:
        files: the result of `list_files`.
    """
    parents = {PurePosixPath(posixpath.dirname(file)) for file in files}
    folders = parents | {above for folder in parents for above in folder.parents}
    lower = {str(folder).lower() for folder in folders}
    return sorted(
        str(folder)
        for folder in folders
        if folder.name.lower() in OTHER_SPLITS
        and any(str(folder.with_name(name)).lower() in lower for name in TRAIN_SPLITS)
    )


def list_pictures(root: Path, files: Sequence[str]) -> list[Candidate | Fault]:
    """Return the pictures among files, each with the caption file of its name.

    `a.png` takes its caption from `a.txt`, `a.caption` or `a.json`, the first of these that
    has one. A file with a caption but an unknown suffix, such as `a.heic`, is a fault, and so is
    `a.TXT` beside `a.txt`.

    Args:
        files: the result of `list_files`.
    """
    suffixes: dict[str, list[str]] = {}
    for file in files:
        stem, suffix = split_suffix(file)
        suffixes.setdefault(stem, []).append(suffix)
    listing: list[Candidate | Fault] = []
    for file in files:
        stem, suffix = split_suffix(file)
        beside = {
            other.lower(): Blob(os.path.join(root, f"{stem}.{other}")) for other in suffixes[stem]
        }
        captions = caption_files(beside)
        if suffix.lower() in PICTURE_SUFFIXES:
            listing.append(Candidate(printable(file), Blob(os.path.join(root, file)), captions))
        elif (
            captions and suffix.lower() not in CAPTION_SUFFIXES and not PICTURE_SUFFIXES & {*beside}
        ):
            listing.append(Fault("wrong type", printable(file), f".{suffix} files are not read"))
        elif suffix.lower() in CAPTION_SUFFIXES and PICTURE_SUFFIXES & {*beside}:
            used = beside[suffix.lower()].path
            if used != os.path.join(root, file):
                detail = f"the caption is read from {printable(os.path.basename(used))}"
                listing.append(Fault("duplicate", printable(file), detail))
    return listing


def split_suffix(file: str) -> tuple[str, str]:
    """Split a path into the part before its last suffix, and the suffix without the dot."""
    suffix = PurePosixPath(file).suffix
    return file.removesuffix(suffix), suffix[1:]


def printable(name: str) -> str:
    """Return a file's name for reports: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def metadata_files(files: Sequence[str]) -> list[str]:
    """Return the metadata files among the result of `list_files`."""
    return [file for file in files if posixpath.basename(file) in METADATA_NAMES]


def list_metadata(root: Path, files: Sequence[str]) -> list[Candidate | Fault]:
    """Return the pictures that metadata files name.

    A picture that is named several times gets all of the captions. Names outside of `root` are
    faults. Names may have backslashes, or their accents composed in another way than the files.

    Args:
        files: the result of `list_files`.

    Raises:
        ValueError: if a folder has several metadata files, or one can't be read at all or lacks the
            columns.
    """
    metadata = metadata_files(files)
    folders = [posixpath.dirname(file) for file in metadata]
    if len({*folders}) < len(folders):
        raise ValueError(f"Expected one metadata file per folder, found {', '.join(metadata)}.")
    known = {_plain(file): file for file in files} | {file: file for file in files}
    captions: dict[str, list[Any]] = {}
    faults: list[Fault] = []
    for file, folder in zip(metadata, folders, strict=True):
        for number, row in enumerate(_rows(root / file), start=1):
            try:
                if isinstance(row, BrokenSample):
                    raise row
                name = _inner_path(row.get("file_name"), "file_name", folder)
                name = known.get(name) or known.get(_plain(name), name)
                captions.setdefault(name, []).append(pick_caption(row))
            except BrokenSample as broken:
                faults.append(Fault(broken.kind, f"{file}, entry {number}", broken.detail))
    candidates = [
        Candidate(printable(name), Blob(os.path.join(root, name)), _joined(texts))
        for name, texts in captions.items()
    ]
    return [*candidates, *faults]


def _plain(name: str) -> str:
    """Return a name as other systems write it: composed accents, and slashes for backslashes."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def _inner_path(name: object, field: str, folder: str = "") -> str:
    """Return the path of a file that an entry names, relative to the folder of the data.

    Args:
        name: the path, relative to `folder`.
        field: what names it, for errors.
        folder: a folder within that of the data.

    Raises:
        BrokenSample: if it is no path, or leads out of the folder of the data. Data may come from
            anyone, and must not name other files of this machine.
    """
    if not isinstance(name, str) or not name:
        raise BrokenSample("bad entry", f"{field} is {name!r}, expected the path of a picture")
    path = posixpath.normpath(posixpath.join(folder, name.replace(os.sep, "/")))
    absolute = posixpath.isabs(path) or os.path.splitdrive(path)[0]
    if "\0" in name or not is_unicode(name) or absolute or path.split("/")[0] == "..":
        raise BrokenSample(
            "bad entry", f"{field} {name[:100]!r} is not a path within the data folder"
        )
    return path


def _joined(texts: list[Any]) -> Any:
    """Join the captions of a picture that is named once or several times."""
    if len(texts) == 1:
        return texts[0]
    return [one for text in texts for one in (text if isinstance(text, list) else [text])]


def _rows(path: Path) -> Iterator[Row]:
    """Yield the entries of a metadata file; an exception stands for one that can't be parsed."""
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers[path.suffix](path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    keys: set[str] = set()
    read = 0
    for line in _lines(path):
        if not line.strip():
            continue
        read += 1
        try:
            _require_text(line)
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            yield BrokenSample("bad entry", f"not a line of JSON: {error}")
            continue
        keys |= row.keys()
        yield row
    if read and not _has_columns(keys):
        raise ValueError(
            f"No line of {path} has a file_name and one of {', '.join(CAPTION_KEYS)}. Expected "
            f'lines such as {{"file_name": "a.png", "text": "a caption"}}. '
            f"The keys are {', '.join(sorted(keys)[:20]) or '(none)'}."
        )


def _csv_rows(path: Path) -> Iterator[Row]:
    rows = csv.reader(_lines(path), strict=True)
    try:
        columns = next(rows, [])
    except csv.Error as error:
        raise ValueError(f"The first line of {path} is not CSV: {error}.") from error
    _require_columns(path, columns)
    while True:
        try:
            row = next(rows)
            _require_text("".join(row))
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            yield BrokenSample("bad entry", f"not a line of CSV: {error}")
            continue
        if not row:
            continue
        if len(row) != len(columns):
            detail = f"{len(row)} cells, expected {len(columns)}: is a quote missing?"
            yield BrokenSample("bad entry", detail)
        else:
            yield dict(zip(columns, row, strict=True))


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, each cut to `MAX_LINE` characters.

    Bytes that can't be decoded become half surrogate pairs, so that they spoil a single line.

    Raises:
        ValueError: if the first line has zero bytes, as UTF-16 without a byte order mark has.
    """
    with open(path, "rb") as binary:
        start = binary.read(1000)
    encoding, first = text_encoding(start), start.split(b"\n")[0]
    if encoding == "utf-8-sig" and b"\0" in first:
        decode_text(first, path)
    try:
        with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
            while line := file.readline(MAX_LINE):
                rest = line
                while len(rest) == MAX_LINE and rest[-1] not in "\r\n":
                    rest = file.readline(MAX_LINE)
                yield line.lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding} text: {error}; save it as UTF-8.") from error


def _require_text(line: str) -> None:
    """Raise ValueError if a line of `_lines` could not be decoded, or was cut."""
    if len(line) >= MAX_LINE:
        raise ValueError(f"it has more than {MAX_LINE:,} characters")
    if not is_unicode(line):
        decode_text(line.encode("utf-8", "surrogateescape"))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs pyarrow: pip install -r requirements-train.txt"
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            _require_columns(path, columns)
            wanted = [column for column in columns if column in ("file_name", *CAPTION_KEYS)]
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from error


def _has_columns(columns: Iterable[str]) -> bool:
    return "file_name" in columns and not {*CAPTION_KEYS}.isdisjoint(columns)


def _require_columns(path: Path, columns: Sequence[str]) -> None:
    if not _has_columns(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; expected file_name and one "
            f"of {', '.join(CAPTION_KEYS)}."
        )


class Cell(NamedTuple):
    """A picture in a row of a saved dataset.

    Sending it to another process is cheap: that process opens the dataset on its first read.
    """

    folder: str
    split: str | None
    column: str
    row: int

    def read(self) -> bytes:
        """Return the bytes of the picture's file, which the dataset holds or knows the path of.

        Raises:
            OSError: if they can't be read.
            BrokenSample: if the cell is empty, or its path leads out of the dataset's folder.
        """
        cell = _open_pictures(self.folder, self.split, self.column)[self.row][self.column]
        if cell and cell["bytes"] is not None:
            return cell["bytes"]
        if not (cell and cell["path"]):
            raise BrokenSample("missing", f"{self.column} is empty")
        return Path(self.folder, _inner_path(cell["path"], self.column)).read_bytes()

    def place(self) -> tuple[str, int]:
        """Return the real path of the folder of its split, and the row."""
        return os.path.realpath(os.path.join(self.folder, self.split or "")), self.row


def list_saved(root: Path) -> list[Candidate | Fault]:
    """Return the rows of a saved dataset; of splits, those of the first in `TRAIN_SPLITS`."""
    dataset, split = _open(str(root))
    image, captions = _columns(root, dataset)
    prefix = f"{split} row" if split else "row"
    listing: list[Candidate | Fault] = []
    for batch in dataset.select_columns(captions).iter(batch_size=1000):
        for texts in zip(*(batch[key] for key in captions), strict=True):
            row = len(listing)
            cell = Cell(str(root), split, image, row)
            caption = pick_caption(dict(zip(captions, texts, strict=True)))
            listing.append(Candidate(f"{prefix} {row}", cell, caption))
    return listing


def other_saved_splits(root: Path) -> list[str]:
    """Return the splits of a saved dataset that `list_saved` leaves out."""
    file = root / "dataset_dict.json"
    names = read_json(file)["splits"] if file.is_file() else []
    return [name for name in names if len(names) > 1 and name != _train_split(names)]


def _train_split(names: Sequence[str]) -> str | None:
    return next((name for name in TRAIN_SPLITS if name in names), None)


@lru_cache(maxsize=8)
def _open_pictures(folder: str, split: str | None, column: str) -> Any:
    """Open a dataset that returns its pictures without decoding them."""
    from datasets import Image

    dataset, _ = _open(folder, split)
    return dataset.select_columns([column]).cast_column(column, Image(decode=False))


def _open(folder: str, split: str | None = None) -> tuple[Any, str | None]:
    """Open a saved dataset; of several splits, the one to train on. Also return its name."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise ImportError(
            f"Reading {folder} needs datasets: pip install -r requirements-train.txt"
        ) from error
    try:
        dataset = load_from_disk(folder)
    except Exception as error:  # damaged JSON, Arrow files that are missing or cut off, ...
        raise ValueError(f"{folder} can't be opened as a saved dataset: {error}") from error
    tables = dataset.values() if isinstance(dataset, DatasetDict) else [dataset]
    for file in (file["filename"] for table in tables for file in table.cache_files):
        if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise ValueError(f"{folder} names {file}, which is not in that folder.")
    if not isinstance(dataset, DatasetDict):
        return dataset, None
    names = list(dataset)
    if split is None:
        split = names[0] if len(names) == 1 else _train_split(names)
    if split is None:
        raise ValueError(
            f"{folder} has the splits {', '.join(names) or '(none)'}, none of them called train. "
            "Give the folder of one split."
        )
    return dataset[split], split


def _columns(root: Path, dataset: Any) -> tuple[str, list[str]]:
    """Return the names of the column with pictures and of those with captions."""
    from datasets import Image

    images = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
    image = images[0] if len(images) == 1 else "image"
    captions = [key for key in CAPTION_KEYS if key in dataset.features and key not in images]
    if image not in images or not captions:
        columns = ", ".join(f"{name} ({kind})" for name, kind in dataset.features.items())
        raise ValueError(
            f"{root} has the columns {columns}. Expected one column of type Image, "
            f"or one called image among several, and captions in {', '.join(CAPTION_KEYS[:-1])} or "
            f"{CAPTION_KEYS[-1]}; see rename_column and cast_column of datasets."
        )
    return image, captions
