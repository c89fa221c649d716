"""The data of a stage: buckets, held-out samples, and sets that were encoded for something else."""

from pathlib import Path

import pytest
import torch

from localdit.training.data.buckets import Size
from localdit.training.data.encoded import EncodedSet
from localdit.training.data.finding import Found
from localdit.training.data.samples import Blob, Faults, Sample
from localdit.training.data.stage_data import prepare_data
from localdit.training.options import Stage
from tests.training.manifests import some_manifest


def prepared(found, image_size=64, pixels_per_token=16, crop="buckets", held_out=1):
    stage = Stage(0, 0, "data", image_size, 4, 1, 10, 1e-4, "constant", 0)
    return prepare_data(
        found,
        stage,
        window_size=1,
        pixels_per_token=pixels_per_token,
        crop=crop,
        max_aspect_ratio=2.0,
        max_upscale=1.5,
        validation_samples=held_out,
    )


def found(*shapes, encoded=None):
    samples = [
        Sample(f"{number}", Blob("a"), ("a bear",), *shape) for number, shape in enumerate(shapes)
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


def test_held_out_samples_are_not_visited_and_small_ones_neither():
    data = prepared(found((64, 64), (64, 64), (8, 8), (64, 64)))
    assert data.buckets[2] == -1
    assert len(data.held_out) == 1
    stage = Stage(0, 0, "data", 64, 4, 1, 10, 1e-4, "constant", 0)
    visited = data.order(stage, 1, 0).samples.tolist()
    assert sorted([*visited, *data.held_out]) == [0, 1, 3]


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
