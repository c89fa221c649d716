"""The order of visits to the samples, a pure function of the seed, and a position in it.

A batch here is the *global* batch: the samples of all processes in one optimizer step. It depends
only on the seed, the epoch and its size, not on the number of processes that share it. Each sample
is visited exactly once per epoch. When a bucket runs out, its last batch is filled up with
`NOTHING`, so that all batches have the same size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

NOTHING = -1


class Visit(NamedTuple):
    """One sample (or `NOTHING`) in one epoch, scaled to the size of a bucket."""

    sample: int
    epoch: int
    bucket: int


@dataclass(frozen=True)
class Position:
    """The progress of training through its data."""

    epoch: int = 0  # the current one, from 0
    # The batches taken from it, as pairs of a global batch size and a number of batches. There are
    # several pairs if a run was resumed with another global batch size within an epoch.
    taken: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the position as plain lists and numbers."""
        return {"epoch": self.epoch, "taken": [list(pair) for pair in self.taken]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Position:
        """Invert `to_json`."""
        return cls(values["epoch"], tuple((size, count) for size, count in values["taken"]))


class Step(NamedTuple):
    """The samples of one optimizer step."""

    samples: np.ndarray  # (global batch,) int64 indices, `NOTHING` after the bucket ran out
    bucket: int  # of all of them
    epoch: int
    position: Position  # after the step

    def share(self, rank: int, num_processes: int, batch_size: int) -> Iterator[list[Visit]]:
        """Yield the batches of one process, one for each accumulation of gradients.

        The global batch is cut into accumulations, and each of these into one part per process.
        """
        parts = self.samples.reshape(-1, num_processes, batch_size)[:, rank]
        for part in parts.tolist():
            yield [Visit(sample, self.epoch, self.bucket) for sample in part]


def epoch_batches(
    buckets: np.ndarray, samples: np.ndarray, batch_size: int, seed: Sequence[int]
) -> np.ndarray:
    """Shuffle samples into batches, each within one bucket.

    Args:
        buckets: (N,) bucket of each sample.
        samples: (M,) indices of the samples to visit.
        batch_size: samples in a batch.
        seed: numbers that the order depends on.

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
    """The endless sequence of steps, from any position.

    Args:
        buckets: (N,) bucket of each sample; negative for samples that are never visited.
        global_batch: samples in an optimizer step.
        seed: numbers that the order depends on, among them the number of the stage.
    """

    def __init__(self, buckets: np.ndarray, global_batch: int, seed: Sequence[int]) -> None:
        self.buckets = buckets
        self.global_batch = global_batch
        self.seed = list(seed)
        self.samples = np.flatnonzero(buckets >= 0)
        assert len(self.samples)

    def steps(self, position: Position) -> Iterator[Step]:
        """Yield all steps after a position.

        Batches of the current epoch that were taken at another size stay taken. The rest of the
        epoch is cut into batches of the present size.
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
        """Return how many batches of the last cut are taken, and all batches of that cut."""
        left, done = self.samples, 0
        batches = np.empty((0, self.global_batch), dtype=np.int64)
        for cut, (batch_size, done) in enumerate(taken):
            batches = epoch_batches(
                self.buckets, left, batch_size, [*self.seed, epoch, cut, batch_size]
            )
            left = np.setdiff1d(left, batches[:done])
        return done, batches


def hold_out(ids: Sequence[str], count: int) -> np.ndarray:
    """Choose the samples to hold out for validation: those with the lowest hash of their id.

    The choice depends only on the ids, not on their order, and hardly changes when samples are
    added or removed.

    Returns:
        Their indices, ascending, (count,) int64.
    """
    if not 0 <= count < max(1, len(ids)):
        raise ValueError(
            f"{count:,} of {len(ids):,} samples are to be held out for validation. Hold out fewer "
            "than there are, and at least 0."
        )
    hashes = [stable_hash(0, sample) for sample in ids]
    chosen = sorted(range(len(ids)), key=lambda index: (hashes[index], index))[:count]
    return np.array(sorted(chosen), dtype=np.int64)


def stable_hash(*parts: int | str) -> int:
    """Return a number of 63 bits that is the same in every process and on every machine."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
