"""Ten thousand samples of which one in twenty is broken, in every way there is."""

import time
from collections import Counter

import numpy as np
import pytest

from localdit.training.data.buckets import Size
from localdit.training.data.finding import _examine, find_samples
from localdit.training.data.listings import list_files, list_pictures
from localdit.training.data.pictures import read_picture
from localdit.training.data.samples import BrokenSample, Candidate, CaptionFile
from localdit.training.data.tars import list_tars
from tests.training.data.drawn import (
    animation,
    damaged_png,
    picture_bytes,
    png_claiming,
    tar_bytes,
)

NUMBER = 10_000
SIZE = Size(32, 32)
HEALTHY = [picture_bytes(kind, seed=seed) for seed in range(4) for kind in ("JPEG", "PNG", "WEBP")]
MOST_MS = 5.0

# Way of being broken: kind, picture, caption. None is a file that is not there.
BROKEN = {
    "empty picture": ("empty", b"", b"a bear"),
    "text for a picture": ("wrong type", b"<html>404 Not Found</html>", b"a bear"),
    "JPEG cut off": ("truncated", HEALTHY[0][:-500], b"a bear"),
    "PNG cut off": ("truncated", HEALTHY[1][:-500], b"a bear"),
    "WebP cut off": ("truncated", HEALTHY[2][:-50], b"a bear"),
    "header damaged": ("damaged", b"\x89PNG\r\n\x1a\n" + bytes(500) + b"IEND", b"a bear"),
    "bomb": ("too large", png_claiming(30_000, 30_000), b"a bear"),
    "animation": ("animated", animation(), b"a bear"),
    "no caption": ("no caption", HEALTHY[0], None),
    "empty caption": ("no caption", HEALTHY[0], b" \n"),
    "caption in another encoding": ("bad caption", HEALTHY[0], "Bär".encode("latin-1")),
    "caption without end": ("bad caption", HEALTHY[0], b"bear " * 100_000),
}
UNDECODABLE = "pixels damaged"  # which only reading shows
ALL = {**BROKEN, UNDECODABLE: ("damaged", damaged_png(), b"a bear")}


def content(number):
    """The way in which a sample is broken, "" for none; its picture and caption."""
    if number % 20 != 7:
        return "", HEALTHY[number % len(HEALTHY)], b"caption %d" % number
    way = list(ALL)[number // 20 % len(ALL)]
    return way, *ALL[way][1:]


def way_of(sample_id):
    return content(int(sample_id.rpartition("/")[2].split(".")[0]))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for number in range(NUMBER):
        _, picture, caption = content(number)
        (root / f"{number % 10}").mkdir(exist_ok=True)
        (root / f"{number % 10}/{number:05d}.jpg").write_bytes(picture)
        if caption is not None:
            (root / f"{number % 10}/{number:05d}.txt").write_bytes(caption)
    return root


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    root = tmp_path_factory.mktemp("tars")
    for shard in range(10):
        members = []
        for number in range(shard * NUMBER // 10, (shard + 1) * NUMBER // 10):
            _, picture, caption = content(number)
            members.append((f"{number:05d}.jpg", picture))
            if caption is not None:
                members.append((f"{number:05d}.txt", caption))
        (root / f"{shard:03d}.tar").write_bytes(tar_bytes(members))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "tars"])
def test_exactly_the_healthy_ones_are_found(where, request):
    found = find_samples(request.getfixturevalue(where))
    ways = Counter(content(number)[0] for number in range(NUMBER))
    assert sum(ways.values()) - ways[""] == NUMBER // 20
    assert len(ways) == 1 + len(ALL)

    found_ways = Counter(way_of(sample.id) for sample in found.samples)
    assert found_ways == {way: ways[way] for way in ("", UNDECODABLE)}
    assert len({sample.id for sample in found.samples}) == len(found.samples)
    expected = Counter()
    for way, (kind, _, _) in BROKEN.items():
        expected[kind] += ways[way]
    assert found.faults.counts == expected

    read = Counter()
    for sample in found.samples:
        number = int(sample.id.rpartition("/")[2].split(".")[0])
        assert sample.captions in ((f"caption {number}",), ("a bear",))
        try:
            assert read_picture(sample.image, SIZE).shape == (3, *SIZE)
            read[""] += 1
        except BrokenSample as broken:
            assert (broken.kind, way_of(sample.id)) == ("damaged", UNDECODABLE)
            read[UNDECODABLE] += 1
    assert read == found_ways


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "tars"])
def test_a_broken_sample_costs_less_than_five_milliseconds(where, request):
    root = request.getfixturevalue(where)
    files = list_files(root)
    listing = (
        list_pictures(root, files)
        if where == "folder"
        else list_tars([str(root / file) for file in files], root)
    )
    costs = {}
    for entry in listing:
        assert isinstance(entry, Candidate)
        way = way_of(entry.id)
        if not way:
            continue
        start = time.perf_counter()
        _examine(entry)
        if way == UNDECODABLE:
            with pytest.raises(BrokenSample):
                read_picture(entry.image, SIZE)
        costs.setdefault(way, []).append(1000 * (time.perf_counter() - start))
    assert {*costs} == {*ALL}
    medians = {way: float(np.median(times)) for way, times in costs.items()}
    assert max(medians.values()) < MOST_MS, medians


def test_all_kinds_of_broken_samples_are_counted(tmp_path):
    """The same in small, for every run of the tests."""
    for number, (_, picture, caption) in enumerate(ALL.values()):
        (tmp_path / f"{number}.jpg").write_bytes(picture)
        if caption is not None:
            (tmp_path / f"{number}.txt").write_bytes(caption)
    found = find_samples(tmp_path)
    assert [sample.id for sample in found.samples] == [f"{len(ALL) - 1}.jpg"]
    assert found.faults.counts == Counter(kind for kind, _, _ in BROKEN.values())
    assert isinstance(list_pictures(tmp_path, list_files(tmp_path))[0].captions, CaptionFile)
