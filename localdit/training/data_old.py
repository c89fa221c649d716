"""Pictures and their captions, and the order in which training visits them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from localdit.images import fit_image, load_image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Sample:
    """A picture's file and its captions, at least one."""

    image: Path
    captions: tuple[str, ...]


def find_samples(data_root: Path) -> list[Sample]:
    """The captioned pictures of a folder.

    Either a `metadata.jsonl` in the folder names them, one JSON object a line with `file_name`
    (relative to the folder) and `text` (a caption or a list of captions), or each picture in the
    folder or below it has its caption beside it, in a `.txt` file of the same name.

    Raises:
        FileNotFoundError: if the folder, a picture or a caption is missing.
        ValueError: if there are no pictures, or `metadata.jsonl` is not as described.
    """
    if not data_root.is_dir():
        raise FileNotFoundError(f"--data-root {data_root} is no folder. Give a folder of pictures.")
    metadata = data_root / "metadata.jsonl"
    samples = _listed_samples(metadata) if metadata.is_file() else _neighbour_samples(data_root)
    if not samples:
        raise ValueError(
            f"{data_root} holds no captioned pictures. Expected a metadata.jsonl with lines such "
            'as {"file_name": "a.png", "text": "a caption"}, or a.txt beside each a.png.'
        )
    return samples


def _listed_samples(metadata: Path) -> list[Sample]:
    """The samples that the lines of a `metadata.jsonl` name."""
    samples = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a JSON object ({error}).") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ValueError(f'{where}: expected {{"file_name": "a.png", "text": "a caption"}}.')
        text = entry.get("text")
        captions: list[Any] = text if isinstance(text, list) else [text]
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise ValueError(
                f'{where}: "text" is {text!r}; expected a caption or a list of captions.'
            )
        image = metadata.parent / entry["file_name"]
        if not image.is_file():
            raise FileNotFoundError(f"{where}: there is no file {image}.")
        samples.append(Sample(image, tuple(captions)))
    return samples


def _neighbour_samples(data_root: Path) -> list[Sample]:
    """The pictures at or below a folder, each with the text of the `.txt` file beside it."""
    samples = []
    for image in sorted(data_root.rglob("*")):
        if image.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        caption_file = image.with_suffix(".txt")
        if not caption_file.is_file():
            raise FileNotFoundError(
                f"{image} has no caption: expected {caption_file.name} beside it, or a "
                f"metadata.jsonl in {data_root}."
            )
        caption = caption_file.read_text(encoding="utf-8").strip()
        if not caption:
            raise ValueError(f"{caption_file} is empty; expected a caption.")
        samples.append(Sample(image, (caption,)))
    return samples


def read_picture(path: Path, size: int) -> torch.Tensor:
    """A picture's centre square, scaled to `size` pixels: (3, size, size) float32 in [-1, 1].

    Raises:
        ValueError: naming the file, if it can't be read as a picture.
    """
    square = fit_image(load_image(path), size, size)
    pixels = torch.from_numpy(np.array(square))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


class PictureDataset(Dataset[tuple[int, torch.Tensor]]):
    """Pictures with their indices, so that the caption can be drawn outside the workers."""

    def __init__(self, samples: Sequence[Sample], image_size: int) -> None:
        self.paths = [sample.image for sample in samples]
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, read_picture(self.paths[index], self.image_size)


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of sample indices, a new order each epoch, the same on every machine.

    The processes cut up one stream of indices: at each step, `num_processes` times `batch_size` of
    them, of which process `rank` takes the `rank`-th part. So they never share a sample within an
    epoch, and the order depends on the seed alone.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, num_processes: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        while True:
            step = [next(stream) for _ in range(self.num_processes * self.batch_size)]
            yield step[self.rank * self.batch_size :][: self.batch_size]

    def _stream(self) -> Iterator[int]:
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
            yield from order.tolist()
            epoch += 1


def draw_captions(
    samples: Sequence[Sample], indices: Sequence[int], dropout: float, rng: np.random.Generator
) -> list[str]:
    """One caption for each index, at random; with probability `dropout` the empty one instead.

    The empty caption teaches the model the unconditional prediction that classifier-free guidance
    steers away from (Ho & Salimans, 2022, algorithm 1).
    """
    return [
        ""
        if rng.random() < dropout
        else samples[i].captions[rng.integers(len(samples[i].captions))]
        for i in indices
    ]
