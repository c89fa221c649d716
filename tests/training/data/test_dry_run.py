"""Tests of the report that `--dry-run` prints."""

import numpy as np

from localdit.training.data.buckets import Size
from localdit.training.data.finding import Found
from localdit.training.data.samples import Blob, Fault, Faults, Sample
from localdit.training.data.stage_data import StageData, dry_run_report


def sample(number, height, width, *captions):
    return Sample(f"{number}.png", Blob("x"), captions or ("a bear",), height, width)


def test_everything_is_counted():
    samples = [sample(number, 64, 64) for number in range(5)]
    samples += [sample(5, 96, 32, "line\none", "two", "three"), sample(6, 8, 8, "x" * 500)]
    faults = Faults(
        [Fault("no caption", "n.png"), Fault("empty", "e.png"), Fault("empty", "f.png")]
    )
    sizes = [Size(96, 32), Size(64, 64), Size(32, 96)]
    buckets = np.array([1, 1, 1, 1, 1, 0, -1])
    data = StageData(Found("folder", samples, faults), sizes, buckets, held_out=[])
    report = dry_run_report(data, global_batch=4)
    lines = report.splitlines()
    assert lines[0].startswith("Format: folder (pictures")
    assert "Samples: 6 to train on, 1 too small, 3 broken (30.0% of 10)" in lines
    assert "Resolutions: 3, from 8 x 8 to 64 x 64 (height x width)" in lines
    assert "  most frequent: 64 x 64 (5), 8 x 8 (1), 96 x 32 (1)" in lines
    # 6 samples in 3 batches of 4
    assert (
        "Buckets: 2 of 3 in use; 50.0% of the places in the batches of an epoch stay empty"
    ) in lines
    table = [line.split() for line in lines]
    assert ["96", "x", "32", "1", "1", "1", "of", "4"] in table
    assert ["64", "x", "64", "5", "2", "1", "of", "4"] in table
    assert (
        "Captions: 9, 1 to 3 per picture; 3 to 500 characters long (median 6); pictures without: 1"
    ) in lines
    assert "  2 empty (zero bytes): e.png, f.png" in lines
    examples = lines[lines.index("Examples:") + 1 :]
    assert len(examples) == 10
    assert "  0.png: 64 x 64, bucket 64 x 64" in examples
    assert examples[-2:] == ["  6.png: 8 x 8, too small", f'    "{"x" * 100}..."']


def test_several_captions_and_line_breaks_in_an_example():
    found = Found("folder", [sample(5, 96, 32, "line\none", "two", "three")])
    report = dry_run_report(StageData(found, [Size(96, 32)], np.array([0]), []), 1)
    assert '    "line one" (and 2 more)' in report.splitlines()
    assert "Broken" not in report


def test_nothing_usable():
    found = Found("webdataset", [], Faults([Fault("empty", "a.tar")]))
    report = dry_run_report(StageData(found, [Size(64, 64)], np.empty(0, dtype=np.int64), []), 4)
    assert "0 to train on, 0 too small, 1 broken (100.0% of 1)" in report
    assert "1 empty (zero bytes): a.tar" in report
    small = Found("folder", [sample(0, 8, 8)])
    data = StageData(small, [Size(64, 64)], np.array([-1]), [])
    assert "Buckets: none in use" in dry_run_report(data, 4)
