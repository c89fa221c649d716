"""Tests of the data of a stage, and of the report that `--dry-run` prints."""

from pathlib import Path

import numpy as np
import pytest
import torch

from localdit.training.data.buckets import Size
from localdit.training.data.encoded import EncodedSet
from localdit.training.data.finding import Found
from localdit.training.data.listings import Cell
from localdit.training.data.samples import Blob, Fault, Faults, Sample
from localdit.training.data.stage_data import (
    StageData,
    dry_run_report,
    prepare_data,
    unknown_captions,
    withhold,
)
from localdit.training.stages import Stage
from tests.training.manifests import some_manifest


def prepared(found, image_size=64, pixels_per_token=16, held_out=1, **pictures):
    stage = Stage(0, 0, "data", image_size, 4, 1, 10, 1e-4, "constant", 0)
    return prepare_data(
        found,
        stage,
        window_size=1,
        pixels_per_token=pixels_per_token,
        pictures=pictures,
        validation_samples=held_out,
    )


def found(*shapes, encoded=None):
    samples = [
        Sample(f"{number}", Blob(f"{number}.png"), ("a bear",), *shape)
        for number, shape in enumerate(shapes)
    ]
    return Found("encoded" if encoded else "folder", samples, Faults(), encoded)


def encoded_set(**changes):
    return EncodedSet(Path("data"), some_manifest(**changes), torch.zeros(1, 16))


def test_sides_of_buckets_are_multiples_of_a_token():
    for pixels_per_token in (8, 16, 32):
        data = prepared(found((192, 192), (250, 150)), 192, pixels_per_token)
        assert all(side % pixels_per_token == 0 for size in data.sizes for side in size)
        assert len(data.sizes) > 1
    assert prepared(found((64, 64), (99, 60)), crop="center").sizes == [Size(64, 64)]


def test_held_out_and_small_samples_are_not_visited():
    data = prepared(found((64, 64), (64, 64), (8, 8), (64, 64)))
    assert data.buckets[2] == -1
    assert len(data.held_out) == 1
    stage = Stage(0, 0, "data", 64, 4, 1, 10, 1e-4, "constant", 0)
    visited = data.order(stage, 1, 0).samples.tolist()
    assert sorted([*visited, *data.held_out]) == [0, 1, 3]


def test_no_stage_trains_on_what_another_holds_out():
    """Larger sizes can use fewer pictures, so each stage may hold out others."""
    pictures = [(200, 200) if number % 2 else (64, 64) for number in range(20)]
    sizes = [(64, found(*pictures)), (192, found(*pictures)), (192, found(*pictures[:8]))]
    alone = [prepared(data, size, held_out=3, max_upscale=1) for size, data in sizes]
    before = [(data.held_out, data.digest) for data in alone]
    withhold(alone[:1])
    assert alone[0].digest == before[0][1]  # a single stage stays as it was
    withhold(alone)
    assert [data.held_out for data in alone] == [held_out for held_out, _ in before]
    assert len({tuple(held_out) for held_out, _ in before}) > 1
    ids = {data.found.samples[index].id for data in alone for index in data.held_out}
    for data in alone:
        stage = Stage(0, 0, "data", 64, 4, 1, 10, 1e-4, "constant", 0)
        visited = data.order(stage, 1, 0).samples
        assert not ids & {data.found.samples[index].id for index in visited}
        assert len(visited) == sum(
            bucket >= 0 and sample.id not in ids
            for sample, bucket in zip(data.found.samples, data.buckets, strict=True)
        )


def test_no_stage_trains_on_what_another_holds_out_of_a_root_around_it(tmp_path):
    (tmp_path / "all/part").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "all/part")
    places = {
        "files": lambda root, n: Blob(f"{root}/{n}.png"),
        "tar": lambda root, n: Blob(f"{root}/a.tar", 512 * n, 99),
        "saved": lambda root, n: (
            Cell(str(tmp_path / "all"), "part", "image", n)
            if root == tmp_path / "all/part"
            else Cell(str(root), None, "image", n)
        ),
    }
    for image in places.values():
        stages = []
        for root, prefix in ((tmp_path / "all/part", "part/"), (tmp_path / "link", "")):
            samples = [
                Sample(f"{prefix}{number}", image(root, number), ("a bear",), 64, 64)
                for number in range(20)
            ]
            stages.append(prepared(Found("folder", samples, Faults()), held_out=3))
        withhold(stages)
        first, second = (data.withheld for data in stages)
        assert first == second and len(first) > 3


def test_encoded_samples_keep_their_buckets():
    data = prepared(found((64, 32), (32, 64), (64, 32), encoded=encoded_set()))
    assert data.sizes == [Size(64, 32), Size(32, 64)]
    assert data.buckets.tolist() == [0, 1, 0]


def test_sets_for_another_size_or_other_tokens_are_refused():
    samples = found((64, 32), (32, 64), encoded=encoded_set())
    with pytest.raises(ValueError, match="was encoded for 64 pixels, but --image-size is 128"):
        prepared(samples, image_size=128)
    with pytest.raises(ValueError, match=r"64 x 32, .* multiples of 64 pixels.* --patch-size"):
        prepared(samples, pixels_per_token=64)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ({"crop": "buckets", "max_aspect_ratio": 2, "max_upscale": 1.5, "horizontal_flip": 0}, ""),
        ({"crop": "center"}, "data was encoded with --crop buckets, but --crop is center. Leave"),
        ({"max_aspect_ratio": 1.5}, "with --max-aspect-ratio 2.0, but --max-aspect-ratio is 1.5"),
        ({"max_upscale": 3.0}, "with --max-upscale 1.5, but --max-upscale is 3.0. Leave it out"),
        ({"max_crop": 0.5}, "--max-crop is 0.5, but data is encoded already: give the option to"),
        ({"horizontal_flip": 0.5}, "--horizontal-flip is 0.5, but data .* can't be mirrored: le"),
    ],
)
def test_options_that_contradict_encoded_data_are_refused(pictures, message):
    samples = found((64, 32), (32, 64), encoded=encoded_set())
    if not message:
        assert prepared(samples, **pictures).sizes == prepared(samples).sizes
        return
    with pytest.raises(ValueError, match=message):
        prepared(samples, **pictures)


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
    assert "Samples: 6 to train on, 1 too small, 0 held out, 3 broken (30.0% of 10)" in lines
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


def test_the_report_counts_what_the_run_trains_on():
    samples = [sample(number, 64, 64) for number in range(8)] + [sample(8, 96, 32)]
    buckets = np.array([0] * 8 + [1])
    data = StageData(Found("folder", samples), [Size(64, 64), Size(96, 32)], buckets, [0, 8], [2])
    assert len(data.order(Stage(0, 0, "data", 64, 4, 1, 9, 1e-4, "constant", 0), 4, 0).samples) == 6
    report = dry_run_report(data, global_batch=4)
    assert "Samples: 6 to train on, 0 too small, 3 held out, 0 broken" in report
    assert "Buckets: 1 of 2 in use; 25.0% of the places" in report
    assert ["64", "x", "64", "6", "2", "2", "of", "4"] in [
        line.split() for line in report.splitlines()
    ]
    assert "  0.png: 64 x 64, held out\n" in report


def test_several_captions_and_line_breaks_in_an_example():
    found = Found("folder", [sample(5, 96, 32, "line\none", "two", "three")])
    report = dry_run_report(StageData(found, [Size(96, 32)], np.array([0]), []), 1)
    assert '    "line one" (and 2 more)' in report.splitlines()
    assert "Broken" not in report


def test_data_without_usable_samples():
    found = Found("webdataset", [], Faults([Fault("empty", "a.tar")]))
    report = dry_run_report(StageData(found, [Size(64, 64)], np.empty(0, dtype=np.int64), []), 4)
    assert "0 to train on, 0 too small, 0 held out, 1 broken (100.0% of 1)" in report
    assert "1 empty (zero bytes): a.tar" in report
    small = Found("folder", [sample(0, 8, 8)])
    data = StageData(small, [Size(64, 64)], np.array([-1]), [])
    assert "Buckets: none in use" in dry_run_report(data, 4)


class Words:
    """A tokenizer that knows a few words."""

    is_fast, unk_token_id = False, 0

    def tokenize(self, text):
        return text.split()

    def convert_tokens_to_ids(self, words):
        return [int(word in ("a", "red", "bear")) for word in words]


def test_unknown_pieces_of_captions_are_counted_and_named_once():
    samples = [sample(n, 64, 64, *texts) for n, texts in enumerate(
        [("a red bear",), ("A 熊", "a bear"), ("a 熊 and a 猫",)]
    )]  # fmt: skip
    text = unknown_captions(samples, Words())
    assert text.startswith("Captions with unknown pieces: 2 of 4. The tokenizer does not know 4 ")
    assert text.endswith("token: '熊' (2 times), 'and', '猫'.")
    assert unknown_captions(samples[:1], Words()) == ""
    data = StageData(Found("folder", samples), [Size(64, 64)], np.zeros(3, dtype=np.int64), [])
    assert text in dry_run_report(data, 1, Words()).splitlines()
    assert "not counted" in dry_run_report(data, 1)


def test_the_report_tells_of_splits_and_of_what_is_cut_away():
    found = Found("folder", [sample(0, 64, 6400)], other_splits=["test", "val"])
    data = StageData(found, [Size(64, 64)], np.array([0]), [])
    report = dry_run_report(data, 1).splitlines()
    assert "Splits: train is used; left out: test, val" in report
    assert "  most: 0.png (64 x 6400: 99.0%)" in report
    limited = StageData(found, [Size(64, 64)], np.array([-2]), [])
    report = dry_run_report(limited, 1)
    assert "Samples: 0 to train on, 0 too small, 1 cut too much, 0 held out, 0 broken" in report
    assert "0.png: 64 x 6400, cut too much" in report


def test_the_true_reason_why_nothing_can_be_trained():
    stage = Stage(0, 0, "data", 64, 4, 1, 10, 1e-4, "constant", 0)
    broken = Found("folder", [], Faults([Fault("no caption", "a.png")]), contents="Found 1 file.")
    for data, message in (
        (prepared(broken), r"all 1 are broken:\n1 no caption .*: a\.png\n.*\.txt.*\nFound 1 file"),
        (prepared(found((8, 8))), "of 1 samples, 1 are too small for 64 pixels and 0 are held out"),
    ):
        with pytest.raises(ValueError, match=message):
            data.order(stage, 1, 0)
