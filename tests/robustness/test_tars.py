"""Mutated tars: each is indexed in bounded time, and what was not touched is found."""

import random
import tarfile
import time

import pytest

from localdit.training.data.finding import examine
from localdit.training.data.samples import KINDS
from localdit.training.data.tars import BLOCK, list_tars
from tests.training.data.drawn import picture_bytes, tar_bytes

SECONDS = 5.0  # for one tar of some kilobytes; a second is far more than it takes
SAMPLES = 6


def original(rng):
    """Return a tar of some samples, in one of three formats, some with long names."""
    members = []
    for number in range(SAMPLES):
        name = f"{'long/' * rng.choice([0, 0, 40])}{number}"
        members.append((f"{name}.png", picture_bytes("PNG", 4, 4, seed=number)))
        members.append((f"{name}.txt", f"caption {number}"))
    formats = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
    return tar_bytes(members, rng.choice(formats))


def field(rng):
    """Return twelve bytes for the size in a header."""
    number = rng.choice([0, 1, 511, 512, 513, rng.randrange(1 << 20), 1 << 33, 1 << 62])
    return rng.choice([
        b"%011o\0" % (number % 8**11),
        b"-%010o\0" % (number % 8**10),
        b"\x80" + number.to_bytes(11, "big"),
        b"\xff" + (-number).to_bytes(11, "big", signed=True),
        rng.randbytes(12),
    ])  # fmt: skip


def mutated(data, rng):
    """Return a tar with one to three changes, and the position of the first of them."""
    data, first = bytearray(data), len(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        kind = rng.choice(["bytes", "size", "type", "cut", "insert", "remove", "repeat", "zeros"])
        if kind in ("size", "type"):  # with the right checksum, so that the header is believed
            at -= at % BLOCK
            header = data[at : at + BLOCK].ljust(BLOCK, b"\0")
            header[124:136] = field(rng) if kind == "size" else header[124:136]
            header[156] = header[156] if kind == "size" else rng.choice(b"01567LKxgSDVM\0\xff")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            data[at : at + BLOCK] = header
        elif kind == "bytes":
            data[at : at + 8] = rng.randbytes(8)
        elif kind == "cut":
            del data[max(at, 1) :]
        elif kind == "insert":
            data[at:at] = rng.randbytes(rng.choice([1, 100, BLOCK]))
        elif kind == "remove":
            del data[at : at + rng.choice([1, 100, BLOCK])]
        elif kind == "repeat":
            data[at:at] = data[: rng.choice([BLOCK, len(data)])]
        else:
            data[at : at + BLOCK] = bytes(BLOCK)
        first = min(first, at)
    return bytes(data), first


def try_tars(folder, seeds):
    for seed in seeds:
        rng = random.Random(seed)
        whole = original(rng)
        data, first = mutated(whole, rng)
        path = folder / "a.tar"
        path.write_bytes(data)
        start = time.perf_counter()
        samples, faults = examine(list_tars([str(path)]), progress=False)
        assert time.perf_counter() - start < SECONDS, seed
        assert {*faults.counts} <= {*KINDS}, seed
        captions = {caption for sample in samples for caption in sample.captions}
        for number in range(SAMPLES):
            behind = whole.index(b"caption %d" % number) + BLOCK
            if behind <= first:  # the sample and the next header were not touched
                assert f"caption {number}" in captions, seed


def test_some_mutated_tars(tmp_path):
    try_tars(tmp_path, range(100))


@pytest.mark.robustness
def test_mutated_tars(tmp_path):
    try_tars(tmp_path, range(2000))
