"""Broken samples: their kinds, how they are counted, and when there are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KINDS = {
    "missing": "the picture that is named is not there",
    "unreadable": "the file can't be opened",
    "empty": "zero bytes",
    "wrong type": "no picture of a kind that is read",
    "truncated": "the picture's file ends too early",
    "damaged": "the picture can't be decoded",
    "too large": "more pixels than are read",
    "animated": "more than one frame",
    "no caption": "no caption, or an empty one",
    "bad caption": "the caption is not text, or far too long",
    "bad entry": "a line or row that can't be understood",
    "half sample": "a tar ends in the midst of it, or holds only one part",
    "duplicate": "another sample has the same name",
}
EXAMPLES = 5  # kept of each kind


class Fault(NamedTuple):
    """A sample that can't be trained on: which, and why."""

    kind: str
    id: str
    detail: str = ""


class BrokenSample(Exception):
    """Raised where a sample turns out to be broken."""

    def __init__(self, kind: str, detail: str = "") -> None:
        assert kind in KINDS, kind
        super().__init__(detail or KINDS[kind])
        self.kind, self.detail = kind, detail


class Faults:
    """Counts of broken samples by kind, with a few examples of each.

    Attributes:
        counts: how many of each kind.
        examples: the first `EXAMPLES` of each kind.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Fault]] = {}
        for fault in faults:
            self.add(fault)

    def add(self, fault: Fault) -> None:
        """Count one."""
        self.counts[fault.kind] += 1
        examples = self.examples.setdefault(fault.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(fault)

    @property
    def total(self) -> int:
        """How many there are of all kinds."""
        return self.counts.total()

    def __str__(self) -> str:
        """A line for each kind: its count, its meaning, examples."""
        lines = []
        for kind, count in self.counts.most_common():
            names = ", ".join(fault.id for fault in self.examples[kind][:3])
            more = ", ..." if count > 3 else ""
            lines.append(f"{count:,} {kind} ({KINDS[kind]}): {names}{more}")
        return "\n".join(lines)


def require_few(faults: Faults, healthy: int, allowed: float) -> None:
    """Stop where too large a share of the samples is broken.

    Args:
        faults: the broken ones.
        healthy: how many are not.
        allowed: share of all samples, 0 to 1.

    Raises:
        ValueError: with the counts by kind and examples.
    """
    total = faults.total + healthy
    if faults.total > allowed * total:
        raise ValueError(
            f"{faults.total:,} of {total:,} samples are broken, {faults.total / total:.1%}, more "
            f"than the {allowed:.0%} that --max-broken allows:\n{faults}\nMend or remove them, or "
            "raise --max-broken."
        )
