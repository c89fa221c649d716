"""Folders with a `metadata.jsonl`, `metadata.csv` or `metadata.parquet` that names the pictures.

Each entry has a `file_name`, relative to the folder of the metadata, and a caption under `text` or
another of `CAPTION_KEYS`: the image folder convention of Hugging Face datasets. JSON Lines and
Parquet may also hold lists of captions. Several folders of the data may have such a file.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from localdit.training.data.captions import CAPTION_KEYS, is_unicode
from localdit.training.data.folders import printable
from localdit.training.data.samples import Blob, BrokenSample, Candidate, Fault

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

Row = Mapping[str, Any] | BrokenSample


def metadata_files(files: Sequence[str]) -> list[str]:
    """Return the metadata files among the result of `folders.list_files`."""
    return [file for file in files if posixpath.basename(file) in METADATA_NAMES]


def list_metadata(root: Path, files: Sequence[str]) -> list[Candidate | Fault]:
    """Return the pictures that metadata files name.

    A picture that is named several times gets all of the captions. Names outside of `root` are
    faults.

    Args:
        root: the folder of the data.
        files: the result of `folders.list_files`.

    Raises:
        ValueError: if a folder has several metadata files, or one can't be read at all or lacks the
            columns.
    """
    metadata = metadata_files(files)
    folders = [posixpath.dirname(file) for file in metadata]
    if len({*folders}) < len(folders):
        raise ValueError(f"Expected one metadata file per folder, found {', '.join(metadata)}.")
    captions: dict[str, list[Any]] = {}
    faults: list[Fault] = []
    for file, folder in zip(metadata, folders, strict=True):
        for number, row in enumerate(_rows(root / file), start=1):
            try:
                name = posixpath.normpath(posixpath.join(folder, _file_name(row)))
                if name == ".." or name.startswith("../"):
                    raise BrokenSample("bad entry", f"{name} is outside of the data folder")
                captions.setdefault(name, []).append(_caption(row))
            except BrokenSample as broken:
                faults.append(Fault(broken.kind, f"{file}, entry {number}", broken.detail))
    candidates = [
        Candidate(printable(name), Blob(os.path.join(root, name)), _joined(texts))
        for name, texts in captions.items()
    ]
    return [*candidates, *faults]


def _file_name(row: Row) -> str:
    if isinstance(row, BrokenSample):
        raise row
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise BrokenSample("bad entry", f"file_name is {name!r}, expected the path of a picture")
    if "\0" in name or not is_unicode(name) or posixpath.isabs(name):
        raise BrokenSample(
            "bad entry", f"file_name {name[:100]!r} is not a path within the data folder"
        )
    return name


def _caption(row: Row) -> Any:
    assert not isinstance(row, BrokenSample)
    return next((row[key] for key in CAPTION_KEYS if key in row), None)


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
    named = read = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            read += 1
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            except (ValueError, RecursionError) as error:
                yield BrokenSample("bad entry", f"not a line of JSON: {error}")
                continue
            named += "file_name" in row
            yield row
    if read and not named:
        raise ValueError(
            f"No line of {path} has a file_name. Expected lines such as "
            '{"file_name": "a.png", "text": "a caption"}.'
        )


def _csv_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            columns = next(rows, [])
        except csv.Error as error:
            raise ValueError(f"The first line of {path} is not CSV: {error}.") from error
        _require_columns(path, columns)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield BrokenSample("bad entry", f"not a line of CSV: {error}")
                continue
            if not row:
                continue
            if len(row) != len(columns):
                detail = f"{len(row)} cells, expected {len(columns)}: is a quote missing?"
                yield BrokenSample("bad entry", detail)
            else:
                yield dict(zip(columns, row, strict=True))


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


def _require_columns(path: Path, columns: Sequence[str]) -> None:
    if "file_name" not in columns or not {*CAPTION_KEYS} & {*columns}:
        raise ValueError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; expected file_name and one "
            f"of {', '.join(CAPTION_KEYS)}."
        )
