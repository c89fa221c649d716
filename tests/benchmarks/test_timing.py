import statistics

import pytest

from benchmarks.cases import Case
from benchmarks.timing import (
    Spread,
    at_depth,
    exponent,
    measure_times,
    paired_ratios,
    times_at_depth,
)


def test_the_exponent_is_the_slope_of_a_power_law():
    sizes = [1024, 4096, 16384, 65536]
    assert exponent(sizes, [3e-5 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert exponent(sizes, [0.25] * 4) == pytest.approx(0)


def test_an_exponent_needs_two_sizes():
    assert exponent([1024, 1024], [1.0, 2.0]) is None
    assert exponent([], []) is None


def test_costs_at_a_depth_follow_the_line_through_two_depths():
    costs = {0: 0.5, 4: 2.5}  # 0.5 outside the blocks, 0.5 per block
    assert at_depth(costs, 28) == pytest.approx(0.5 + 28 * 0.5)
    assert at_depth(costs, 4) == pytest.approx(2.5)
    assert at_depth({2: 7.0}, 2) == 7.0


def test_a_single_depth_gives_no_cost_at_another():
    with pytest.raises(AssertionError):
        at_depth({2: 7.0}, 28)


def test_ratios_are_taken_pair_by_pair():
    ratios = paired_ratios([4.0, 9.0, 30.0], [2.0, 3.0, 6.0])
    assert ratios == Spread(median=3.0, lowest=2.0, highest=5.0)


def test_times_are_derived_turn_by_turn():
    runs = [{"layers": 0, "seconds": [1.0, 2.0]}, {"layers": 2, "seconds": [3.0, 8.0]}]
    assert times_at_depth(runs, 10) == pytest.approx([1 + 10 * 1, 2 + 10 * 3])


@pytest.mark.parametrize("task", ["inference", pytest.param("training", marks=pytest.mark.slow)])
def test_all_models_of_a_case_are_timed(task):
    case = Case(pixels=64, dtype="bfloat16", task=task, layers=1, repeats=2, warm_up=1)
    results = measure_times(case)
    assert list(results) == ["LocalDiT", "PixArt"]
    for result in results.values():
        (run,) = result["runs"]
        assert run["layers"] == 1
        assert len(run["seconds"]) == 2 and statistics.median(run["seconds"]) > 0
    assert results["PixArt"]["attention"][0] in results["PixArt"]["attention_choice"]


def test_a_spread_is_a_median_within_its_ends():
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(median=2.0, lowest=1.0, highest=4.0)
