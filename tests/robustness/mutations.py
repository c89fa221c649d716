"""Damage to bytes, the same for the same generator, and limits of time and memory."""

import resource
import time
from contextlib import contextmanager

SECONDS = 5.0  # of processor time, for one input of some kilobytes; most take milliseconds
MEMORY = 1024  # MiB that the process may grow beyond its largest size so far

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(data, rng):
    """Return bytes with one to four changes: bytes, numbers, pieces cut, doubled or inserted."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Headers are where damage tells most, so half of the changes are near the start.
        at = rng.randrange((min(len(data), 64) if rng.random() < 0.5 else len(data)) or 1)
        change = rng.choice(["bit", "bytes", "number", "cut", "remove", "double", "insert"])
        if change == "bit" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif change == "bytes":
            data[at : at + 4] = rng.randbytes(4)
        elif change == "number":
            width, order = rng.choice([1, 2, 4]), rng.choice(["little", "big"])
            number = rng.choice(NUMBERS) % 256**width
            data[at : at + width] = number.to_bytes(width, order)
        elif change == "cut":
            del data[max(at, 1) :]
        elif change == "remove":
            del data[at : at + rng.choice([1, 7, 64])]
        elif change == "double":
            data[at:at] = data[at : at + rng.choice([4, 100, 1000])]
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 16, 200]))
    return bytes(data)


@contextmanager
def bounded(what):
    """Fail where the block takes too long or too much memory; `what` names the input."""
    peak, start = _peak(), time.process_time()
    yield
    taken, grown = time.process_time() - start, _peak() - peak
    assert taken < SECONDS, f"{what}: {taken:.1f} s"
    assert grown < MEMORY, f"{what}: {grown:.0f} MiB"


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
