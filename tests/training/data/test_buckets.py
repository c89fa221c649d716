"""Tests of buckets: their sizes, and the bucket of each picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdit.training.data.buckets import (
    CUT_TOO_MUCH,
    TOO_SMALL,
    Size,
    assign_buckets,
    bucket_sizes,
    cut_away,
    describe_crops,
    left_out,
)
from localdit.training.data.samples import Blob, Sample

token_counts = st.integers(2, 80)
token_sides = st.sampled_from([8, 16, 32, 64])
windows = st.sampled_from([1, 2, 4, 8, 16])
aspects = st.floats(1, 4)


@given(token_counts, windows, token_sides, aspects)
def test_sizes(tokens, window, pixels, aspect):
    image_size = tokens * pixels
    sizes = bucket_sizes(image_size, window, pixels, aspect)
    side = pixels * window if tokens % window == 0 else pixels
    assert Size(image_size, image_size) in sizes
    assert len({*sizes}) == len(sizes)
    for height, width in sizes:
        assert height % side == width % side == 0
        assert height * width <= image_size**2
        assert max(height, width) <= aspect * min(height, width)
        assert (width, height) in sizes
        # As large as can be: a step more along the longer side would be too many pixels.
        assert min(height, width) * (max(height, width) + side) > image_size**2
    ratios = [width / height for height, width in sizes]
    assert ratios == sorted(ratios)


def test_sizes_of_the_released_resolutions():
    assert bucket_sizes(512, 8, 16) == [(640, 384), (512, 512), (384, 640)]
    assert bucket_sizes(512, 8, 16, max_aspect_ratio=1.0) == [(512, 512)]
    assert len(bucket_sizes(1024, 8, 16)) > 3
    assert str(Size(384, 640)) == "384 x 640"


@given(
    st.lists(st.tuples(st.integers(16, 4000), st.integers(16, 4000)), max_size=8),
    token_counts,
    windows,
    token_sides,
    st.floats(0.5, 4),
)
def test_a_picture_goes_to_the_nearest_aspect_ratio_unless_it_is_too_small(
    shapes, tokens, window, pixels, max_upscale
):
    sizes = bucket_sizes(tokens * pixels, window, pixels)
    buckets = assign_buckets(shapes, sizes, max_upscale)
    assert buckets.shape == (len(shapes),)
    assert buckets.dtype == np.int64
    for (height, width), bucket in zip(shapes, buckets, strict=True):
        distances = [abs(np.log(width / height) - np.log(w / h)) for h, w in sizes]
        nearest = int(np.argmin(distances))
        scale = max(sizes[nearest].height / height, sizes[nearest].width / width)
        if bucket < 0:
            assert scale > max_upscale
        else:
            assert scale <= max_upscale
            assert distances[bucket] == pytest.approx(distances[nearest])


def test_the_upscale_limit_counts_the_side_that_is_enlarged_more():
    square = [Size(64, 64)]
    shapes = [(64, 64), (63, 640), (32, 64), (31, 640)]
    assert assign_buckets(shapes, square, 1.0).tolist() == [0, -1, -1, -1]
    assert assign_buckets(shapes, square, 2.0).tolist() == [0, 0, 0, -1]
    tall, wide = Size(96, 32), Size(32, 96)
    assert assign_buckets([(300, 100), (100, 300)], [tall, wide], 1.0).tolist() == [0, 1]


def sample(id, height, width):
    return Sample(id, Blob(id), ("a",), height, width)


def test_the_share_that_is_cut_away():
    sizes = [Size(128, 64), Size(64, 64), Size(64, 128)]
    shapes = [(64, 64), (1280, 640), (200, 12_000), (64, 96), (90, 60)]
    buckets = np.array([1, 0, 2, 2, 1])
    shares = [0, 0, 1 - 400 / 12_000, 1 - 48 / 64, 1 - 60 / 90]
    assert cut_away(shapes, sizes, buckets) == pytest.approx(shares)
    for (height, width), bucket, share in zip(shapes, buckets, shares, strict=True):
        # `fit_image` covers the bucket, and keeps this part of the picture.
        scale = max(sizes[bucket].height / height, sizes[bucket].width / width)
        kept = sizes[bucket].height * sizes[bucket].width / (height * width * scale**2)
        assert share == pytest.approx(1 - kept)
    assert cut_away([], sizes, np.empty(0, dtype=np.int64)).shape == (0,)


def test_a_limit_leaves_extreme_pictures_out_and_by_default_none():
    sizes = [Size(64, 64)]
    shapes = [(64, 64), (64, 128), (64, 129), (64, 6400), (8, 8), (8, 16)]
    assert assign_buckets(shapes, sizes, 1.5).tolist() == [0, 0, 0, 0, TOO_SMALL, TOO_SMALL]
    limited = assign_buckets(shapes, sizes, 1.5, max_crop=0.5)
    assert limited.tolist() == [0, 0, CUT_TOO_MUCH, CUT_TOO_MUCH, TOO_SMALL, TOO_SMALL]
    assert left_out(limited) == "2 too small, 2 cut too much"
    assert left_out(limited[:2]) == "0 too small"


def test_the_report_has_the_distribution_and_the_worst_five():
    sizes = [Size(64, 64)]
    samples = [sample(f"{side}.png", 64, side) for side in (64, 66, 80, 128, 129, 200, 257, 6400)]
    first, second, third = describe_crops(samples, sizes, np.zeros(8, dtype=np.int64)).splitlines()
    assert ", at most 99.0%; --max-crop" in first
    assert second == (
        "  pictures by share: 2 lose 0% to 10%, 1 lose 10% to 25%, 0 lose 25% to 50%, "
        "3 lose 50% to 75%, 2 lose 75% to 100%"
    )
    assert third == (
        "  most: 6400.png (64 x 6400: 99.0%), 257.png (64 x 257: 75.1%), 200.png (64 x 200: 68.0%),"
        " 129.png (64 x 129: 50.4%), 128.png (64 x 128: 50.0%)"
    )
    for few, buckets in ((samples[:1], [0]), (samples[:1], [TOO_SMALL]), ([], [])):
        assert describe_crops(few, sizes, np.array(buckets, dtype=np.int64)) == ""
