"""In which order training visits the samples: pure functions of the seed, and a position in them.

A batch here is the *global* one: what all processes together see in one optimizer step. Its samples
depend on the seed, the epoch and its size alone, not on how many processes share it out, and each
sample comes exactly once in an epoch. Where a bucket runs out, its last batch is filled up with
`NOTHING`, so that all batches have one size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NOTHING = -1


class Visit(NamedTuple):
    """One sample (or `NOTHING`) in one epoch, brought to the size of a bucket."""

    sample: int
    epoch: int
    bucket: int


@dataclass(frozen=True)
class Position:
    """How far training has come in its data.

    Attributes:
        epoch: the current one, from 0.
        taken: what was taken of it: pairs of a global batch size and a number of batches. There is
            more than one pair where a run went on with another global batch size within an epoch.
    """

    epoch: int = 0
    taken: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The position in plain lists and numbers."""
        return {"epoch": self.epoch, "taken": [list(pair) for pair in self.taken]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Position:
        """The inverse of `to_json`."""
        return cls(values["epoch"], tuple((size, count) for size, count in values["taken"]))


class Step(NamedTuple):
    """The samples of one optimizer step.

    Attributes:
        samples: (global batch,) int64 indices, `NOTHING` where the bucket ran out.
        bucket: the bucket they are all in.
        epoch: the epoch that they belong to.
        position: where training stands once the step is taken.
    """

    samples: np.ndarray
    bucket: int
    epoch: int
    position: Position

    def share(self, rank: int, num_processes: int, batch_size: int) -> Iterator[list[Visit]]:
        """The batches of one process, one for each accumulation of gradients.

        The global batch is cut into accumulations, and these into the processes' parts.
        """
        parts = self.samples.reshape(-1, num_processes, batch_size)[:, rank]
        for part in parts.tolist():
            yield [Visit(sample, self.epoch, self.bucket) for sample in part]


def epoch_batches(
    buckets: np.ndarray, samples: np.ndarray, batch_size: int, seed: Sequence[int]
) -> np.ndarray:
    """Shuffle samples into batches, each within one bucket.

    Args:
        buckets: (N,) bucket of every sample.
        samples: (M,) indices of those to visit.
        batch_size: samples in a batch.
        seed: what the order depends on.

    Returns:
        (number of batches, batch_size) int64, filled up with `NOTHING`.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(samples)
    rows = [np.empty((0, batch_size), dtype=np.int64)]
    for bucket in np.unique(buckets[samples]):
        members = shuffled[buckets[shuffled] == bucket]
        filled = np.full(-(-len(members) // batch_size) * batch_size, NOTHING, dtype=np.int64)
        filled[: len(members)] = members
        rows.append(filled.reshape(-1, batch_size))
    return rng.permutation(np.concatenate(rows))


class Order:
    """The endless sequence of steps, from any position on.

    Args:
        buckets: (N,) bucket of every sample; -1 for those that are never visited.
        global_batch: samples in an optimizer step.
        seed: numbers that the order depends on, the stage's among them.

    Raises:
        ValueError: if there is no sample to visit.
    """

    def __init__(self, buckets: np.ndarray, global_batch: int, seed: Sequence[int]) -> None:
        self.buckets = buckets
        self.global_batch = global_batch
        self.seed = list(seed)
        self.samples = np.flatnonzero(buckets >= 0)
        if not len(self.samples):
            raise ValueError("There is no sample to train on.")

    def steps(self, position: Position) -> Iterator[Step]:
        """All steps after a position.

        Batches of the current epoch that were taken at another size stay taken: what is left of
        the epoch is cut into batches of the size that holds now.
        """
        epoch, taken = position.epoch, position.taken
        while True:
            if not taken or taken[-1][0] != self.global_batch:
                taken += ((self.global_batch, 0),)
            done, batches = self._epoch(epoch, taken)
            for count in range(done, len(batches)):
                row = batches[count]
                after = Position(epoch, (*taken[:-1], (self.global_batch, count + 1)))
                if count + 1 == len(batches):
                    after = Position(epoch + 1)
                yield Step(row, int(self.buckets[row.max()]), epoch, after)
            epoch, taken = epoch + 1, ()

    def _epoch(self, epoch: int, taken: tuple[tuple[int, int], ...]) -> tuple[int, np.ndarray]:
        """How many batches of the last cut are taken, and all batches of that cut."""
        left, done = self.samples, 0
        batches = np.empty((0, self.global_batch), dtype=np.int64)
        for cut, (batch_size, done) in enumerate(taken):
            batches = epoch_batches(
                self.buckets, left, batch_size, [*self.seed, epoch, cut, batch_size]
            )
            left = np.setdiff1d(left, batches[:done])
        return done, batches

    def batches_per_epoch(self) -> int:
        """Steps in a whole epoch."""
        counts = np.bincount(self.buckets[self.samples])
        return int((-(-counts // self.global_batch)).sum())
