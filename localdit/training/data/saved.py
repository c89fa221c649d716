"""Hugging Face datasets on disk, as `save_to_disk` of `Dataset` or `DatasetDict` writes them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from localdit.training.data.captions import CAPTION_KEYS
from localdit.training.data.samples import BrokenSample, Candidate, Fault


class Cell(NamedTuple):
    """The picture in a row of a saved dataset.

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
            BrokenSample: if the cell is empty.
        """
        cell = _open_pictures(self.folder, self.split, self.column)[self.row][self.column]
        if cell and cell["bytes"] is not None:
            return cell["bytes"]
        if not (cell and cell["path"]):
            raise BrokenSample("missing", f"{self.column} is empty")
        return Path(cell["path"]).read_bytes()


def list_saved(root: Path) -> list[Candidate | Fault]:
    """Return the rows of a saved dataset; of several splits, those of "train".

    Raises:
        ValueError: if it can't be opened, or has no such split or columns.
        ImportError: if the datasets package is missing.
    """
    dataset, split = _open(str(root))
    image, caption = _columns(root, dataset)
    prefix = f"{split} row" if split else "row"
    listing: list[Candidate | Fault] = []
    for batch in dataset.select_columns([caption]).iter(batch_size=1000):
        for text in batch[caption]:
            row = len(listing)
            cell = Cell(str(root), split, image, row)
            listing.append(Candidate(f"{prefix} {row}", cell, text))
    return listing


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
    if not isinstance(dataset, DatasetDict):
        return dataset, None
    names = list(dataset)
    split = split or ("train" if len(names) != 1 else names[0])
    if split not in dataset:
        raise ValueError(
            f"{folder} has the splits {', '.join(names) or '(none)'}, none of them called train. "
            "Give the folder of one split."
        )
    return dataset[split], split


def _columns(root: Path, dataset: Any) -> tuple[str, str]:
    """Return the names of the columns with pictures and captions."""
    from datasets import Image

    images = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
    image = images[0] if len(images) == 1 else "image"
    caption = next((key for key in CAPTION_KEYS if key in dataset.features), None)
    if image not in images or caption is None:
        columns = ", ".join(f"{name} ({kind})" for name, kind in dataset.features.items())
        raise ValueError(
            f"{root} has the columns {columns}. Expected one column of type Image, "
            f"or one called image among several, and captions in {', '.join(CAPTION_KEYS[:-1])} or "
            f"{CAPTION_KEYS[-1]}; see rename_column and cast_column of datasets."
        )
    return image, caption
