"""Tests of buckets: their sizes, and the bucket of each picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdit.training.data.buckets import Size, assign_buckets, bucket_sizes

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
