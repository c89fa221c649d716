import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localdit.pipelines import checks


@given(st.integers(-100, 5000), st.sampled_from([8, 16, 32]))
def test_sizes_are_accepted_or_the_nearest_that_work_are_named(value, multiple):
    if value > 0 and value % multiple == 0:
        checks.check_size("height", value, multiple)
        return
    with pytest.raises(ValueError, match=f"height .* {multiple} pixels, got {value};") as error:
        checks.check_size("height", value, multiple)
    named = [int(size) for size in re.findall(r"\d+", str(error.value).split(";")[1])]
    working = range(multiple, 6000, multiple)
    assert min(working, key=lambda size: abs(size - value)) in named
    assert set(named) <= set(working)


@pytest.mark.parametrize("value", [64.0, "64", True, None, float("nan")])
def test_a_size_is_an_integer(value):
    with pytest.raises(ValueError, match="width must be"):
        checks.check_size("width", value, 16)


def test_numpy_integers_are_integers():
    checks.check_size("width", np.int64(64), 16)
    checks.check_integer("n", np.int32(1), 1)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_positive_integers(value):
    with pytest.raises(ValueError, match="n must be a positive integer"):
        checks.check_integer("n", value, 1)


def test_integers_from_a_bound_on():
    checks.check_integer("n", 0, 0)
    with pytest.raises(ValueError, match="n must be an integer of at least 0, got -1"):
        checks.check_integer("n", -1, 0)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "0.5", None])
def test_numbers_in_a_range(value):
    with pytest.raises(ValueError, match="strength must be a number from 0 to 1"):
        checks.check_number("strength", value, 0, 1)


def test_both_ends_of_a_range_are_in_it():
    checks.check_number("strength", 0, 0, 1)
    checks.check_number("strength", 1.0, 0, 1)


def test_generators_are_one_or_one_for_each_picture():
    generator = torch.Generator()
    for good in (None, generator, [generator, generator]):
        checks.check_generator(good, 2)
    with pytest.raises(ValueError, match="list of 3, but 2 pictures"):
        checks.check_generator([generator] * 3, 2)
    with pytest.raises(ValueError, match="list of 0"):
        checks.check_generator([], 2)
    for bad in (7, [generator, 7], [None, None]):
        with pytest.raises(TypeError, match=r"torch\.Generator"):
            checks.check_generator(bad, 2)


def test_tensors_have_their_shape_and_finite_values():
    checks.check_tensor("latents", torch.zeros(2, 5), (2, None))
    with pytest.raises(ValueError, match=r"latents must have shape \(2, any\), got \(3, 5\)"):
        checks.check_tensor("latents", torch.zeros(3, 5), (2, None))
    with pytest.raises(ValueError, match="shape"):
        checks.check_tensor("latents", torch.zeros(2), (2, None))
    with pytest.raises(TypeError, match="ndarray"):
        checks.check_tensor("latents", np.zeros((2, 5)), (2, None))
    with pytest.raises(ValueError, match="NaN"):
        checks.check_tensor("latents", torch.tensor([float("nan")]), (1,))
