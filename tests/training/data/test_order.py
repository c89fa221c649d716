from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdit.training.data.order import NOTHING, Order, Position, Visit, epoch_batches, hold_out

buckets = st.lists(st.integers(-1, 3), min_size=1, max_size=40).map(np.array)
buckets = buckets.filter(lambda values: (values >= 0).any())


def visited(steps):
    return Counter(int(i) for step in steps for i in step.samples if i != NOTHING)


def epoch(order, position=None):
    """Return the remaining steps of the epoch of a position."""
    position = position or Position()
    steps = []
    for step in order.steps(position):
        if step.epoch != position.epoch:
            return steps
        steps.append(step)


@given(buckets, st.integers(1, 6), st.integers(0, 3))
def test_each_epoch_visits_every_sample_once_and_one_bucket_at_a_time(buckets, size, number):
    order = Order(buckets, size, [0])
    steps = epoch(order, Position(number))
    assert visited(steps) == Counter(np.flatnonzero(buckets >= 0).tolist())
    assert len(steps) == (-(-np.bincount(buckets[buckets >= 0]) // size)).sum()
    for step in steps:
        assert len(step.samples) == size
        assert {int(buckets[i]) for i in step.samples if i != NOTHING} == {step.bucket}


@given(buckets, st.integers(1, 6), st.integers(0, 30))
def test_any_position_continues_the_same_order(buckets, size, taken):
    order = Order(buckets, size, [7])
    whole = list(islice(order.steps(Position()), taken + 20))
    position = whole[taken - 1].position if taken else Position()
    position = Position.from_json(position.to_json())
    rest = list(islice(Order(buckets, size, [7]).steps(position), 20))
    for expected, step in zip(whole[taken:], rest, strict=True):
        assert np.array_equal(expected.samples, step.samples)
        assert expected[1:] == step[1:]


@given(buckets, st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=4))
def test_a_change_of_batch_size_within_an_epoch_loses_and_repeats_nothing(buckets, parts):
    position, steps = Position(), []
    for size, count in parts:
        for step in islice(Order(buckets, size, [1]).steps(position), count):
            if step.epoch > 0:
                break
            steps.append(step)
            position = step.position
    if position.epoch == 0:
        steps += epoch(Order(buckets, 3, [1]), position)
    assert visited(steps) == Counter(np.flatnonzero(buckets >= 0).tolist())


def test_epochs_seeds_and_stages_differ():
    everything = np.zeros(50, dtype=int)

    def first(seed, epoch):
        return next(Order(everything, 50, seed).steps(Position(epoch))).samples.tolist()

    orders = [first([0, 0], 0), first([0, 0], 1), first([0, 1], 0), first([1, 0], 0)]
    assert len({tuple(order) for order in orders}) == 4
    assert first([0, 0], 1) == orders[1]


def test_batches_of_different_buckets_are_mixed():
    buckets = np.repeat([0, 1], 500)
    steps = epoch(Order(buckets, 10, [0]))
    changes = sum(a.bucket != b.bucket for a, b in pairwise(steps))
    assert 30 < changes < 70  # of 99; 1 if they came one after another


@pytest.mark.parametrize(("processes", "batch", "accumulated"), [(1, 12, 1), (2, 3, 2), (3, 4, 1)])
def test_processes_divide_the_same_step(processes, batch, accumulated):
    order = Order(np.zeros(30, dtype=int), 12, [5])
    for step in islice(order.steps(Position()), 5):
        shares = [list(step.share(rank, processes, batch)) for rank in range(processes)]
        assert all(len(share) == accumulated for share in shares)
        seen = [visit for turn in zip(*shares, strict=True) for part in turn for visit in part]
        assert seen == [Visit(int(i), step.epoch, 0) for i in step.samples]


def test_only_given_samples_are_cut_into_batches():
    rows = epoch_batches(np.array([0, 1, 0, 1, 0]), np.array([0, 1, 2]), 2, [0])
    assert sorted(map(sorted, rows.tolist())) == [[NOTHING, 1], [0, 2]]


def test_the_choice_of_samples_depends_only_on_their_ids():
    ids = [f"folder/{n}.png" for n in range(1000)]
    chosen = hold_out(ids, 50)
    assert len(set(chosen)) == 50
    assert list(chosen) == sorted(chosen)
    backwards = hold_out(ids[::-1], 50)
    assert {ids[::-1][n] for n in backwards} == {ids[n] for n in chosen}
    more = [*ids, *(f"new/{n}.png" for n in range(100))]
    kept = {more[n] for n in hold_out(more, 50)} & {ids[n] for n in chosen}
    assert len(kept) > 35
    assert set(hold_out(ids, 20)) < set(chosen)
    assert len(hold_out(ids, 0)) == 0


def test_something_must_be_left_to_train_on():
    assert len(hold_out([], 0)) == 0
    for count in (3, -1):
        with pytest.raises(ValueError, match="Hold out fewer"):
            hold_out(["a", "b", "c"], count)
