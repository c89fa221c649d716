"""Batches of visited samples: reading, decoding, and the random choices of each visit.

The random choices of a visit (caption, dropout, flip, noise, timestep and place) depend only on the
seed, the stage, the epoch and the sample. So they are the same in any process or worker, and a run
needs only its position to resume.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from localdit.core.diffusion import TimestepSampling, sample_position
from localdit.training.data.buckets import Size
from localdit.training.data.encoded import EncodedSet, read_encoded
from localdit.training.data.order import NOTHING, Visit
from localdit.training.data.pictures import read_picture
from localdit.training.data.samples import BrokenSample, Fault, Sample
from localdit.training.shutdown import SIGNALS


@dataclass(frozen=True)
class Item:
    """A visited sample; `weight` is 0 for a placeholder.

    It has either `pixels` (3, H, W) uint8 and `caption`, or, from encoded data, `latents` (C, h, w)
    and `text` (tokens, channels).
    """

    id: str
    weight: float
    noise: torch.Tensor  # (C, h, w)
    position: float  # of the timestep, in [0, 1)
    place: tuple[float, float] = (0.0, 0.0)  # of a part of the picture, in [0, 1)
    pixels: torch.Tensor | None = None
    caption: str = ""
    latents: torch.Tensor | None = None
    text: torch.Tensor | None = None
    fault: Fault | None = None


@dataclass
class Batch:
    """The samples of one forward pass on one process."""

    size: Size  # height and width of the pictures, in pixels
    ids: list[str]  # of the samples, empty for placeholders
    weights: torch.Tensor  # (B,) 1 for samples, 0 for placeholders
    noise: torch.Tensor  # (B, C, h, w)
    positions: torch.Tensor  # (B,) of the timesteps, in [0, 1)
    places: torch.Tensor  # (B, 2) of a part of each picture, down and across, in [0, 1)
    pixels: torch.Tensor | None  # (B, 3, H, W) uint8, and their
    captions: list[str]
    latents: torch.Tensor | None  # or (B, C, h, w), and the
    text: list[torch.Tensor]  # states of each caption, (tokens, channels)
    faults: list[Fault] = field(default_factory=list)  # the samples that turned out to be broken


@dataclass(frozen=True)
class Draws:
    """The random choices of visits."""

    seed: tuple[int, ...]  # numbers that all choices depend on, among them the number of the stage
    # Share of captions replaced by the empty caption, which teaches the unconditional prediction of
    # classifier-free guidance (Ho & Salimans, 2022, algorithm 1).
    token_dropout: float = 0.0
    flip: float = 0.0  # share of pictures mirrored
    timestep_sampling: TimestepSampling = "uniform"

    def choices(self, visit: Visit, num_captions: int) -> tuple[int | None, bool]:
        """Return the number of the caption, None for the empty one; and whether to mirror."""
        rng = np.random.default_rng([*self.seed, visit.epoch, visit.sample])
        dropped = rng.random() < self.token_dropout
        caption = int(rng.integers(num_captions))
        return None if dropped else caption, bool(rng.random() < self.flip)

    def noise(self, visit: Visit, shape: Sequence[int]) -> tuple[torch.Tensor, float]:
        """Return the noise to add, and the position of its timestep in [0, 1)."""
        sequence = np.random.SeedSequence([*self.seed, visit.epoch, visit.sample, 1])
        generator = torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        position = sample_position(generator, self.timestep_sampling)
        return torch.randn(*shape, generator=generator), position

    def place(self, visit: Visit) -> tuple[float, float]:
        """Return the place of a part of the picture along its height and width, in [0, 1)."""
        down, across = np.random.default_rng([*self.seed, visit.epoch, visit.sample, 2]).random(2)
        return float(down), float(across)


@dataclass(eq=False)
class VisitDataset(Dataset[Item]):
    """Samples by visit: pictures with captions, or encoded latents and text states."""

    samples: Sequence[Sample]
    sizes: Sequence[Size]  # of the buckets, in pixels
    draws: Draws
    latent_channels: int
    pixels_per_latent: int  # along each side
    encoded: EncodedSet | None = None  # the set that encoded samples belong to

    def __getitem__(self, visit: Visit) -> Item:
        size = self.sizes[visit.bucket]
        shape = [self.latent_channels, *(side // self.pixels_per_latent for side in size)]
        if visit.sample == NOTHING:
            return self._placeholder(size, shape)
        sample = self.samples[visit.sample]
        caption, flip = self.draws.choices(visit, len(sample.captions))
        drawn = (*self.draws.noise(visit, shape), self.draws.place(visit))
        try:
            if self.encoded is None:
                pixels = read_picture(sample.image, size, flip)
                text = "" if caption is None else sample.captions[caption]
                return Item(sample.id, 1.0, *drawn, pixels=pixels, caption=text)
            latents, states = read_encoded(sample, caption)
            states = self.encoded.empty_text if states is None else states
            return Item(sample.id, 1.0, *drawn, latents=latents, text=states)
        except BrokenSample as broken:
            return self._placeholder(size, shape, Fault(broken.kind, sample.id, broken.detail))

    def _placeholder(self, size: Size, shape: Sequence[int], fault: Fault | None = None) -> Item:
        """Return a black picture of weight 0, with the empty caption."""
        noise = torch.zeros(*shape)
        if self.encoded is None:
            pixels = torch.zeros(3, *size, dtype=torch.uint8)
            return Item("", 0.0, noise, 0.0, pixels=pixels, fault=fault)
        return Item("", 0.0, noise, 0.0, latents=noise, text=self.encoded.empty_text, fault=fault)

    def batch(self, items: Sequence[Item]) -> Batch:
        """Collate items of one size."""
        *_, height, width = items[0].noise.shape
        pixels = [item.pixels for item in items if item.pixels is not None]
        latents = [item.latents for item in items if item.latents is not None]
        return Batch(
            size=Size(height * self.pixels_per_latent, width * self.pixels_per_latent),
            ids=[item.id for item in items],
            weights=torch.tensor([item.weight for item in items]),
            noise=torch.stack([item.noise for item in items]),
            positions=torch.tensor([item.position for item in items]),
            places=torch.tensor([item.place for item in items]),
            pixels=torch.stack(pixels) if pixels else None,
            captions=[item.caption for item in items],
            latents=torch.stack(latents) if latents else None,
            text=[item.text for item in items if item.text is not None],
            faults=[item.fault for item in items if item.fault is not None],
        )


def load_batches(
    dataset: VisitDataset,
    visits: Iterable[list[Visit]],
    num_workers: int,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of visits, in their order, read ahead by `num_workers` processes."""
    loader = DataLoader(
        dataset,
        batch_sampler=visits,
        num_workers=num_workers,
        collate_fn=dataset.batch,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals if num_workers else None,
        generator=torch.Generator(),  # or the loader would draw from the global generator
    )
    return iter(loader)


def _ignore_signals(worker: int) -> None:
    """Leave signals that reach the whole process group to the training process."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
