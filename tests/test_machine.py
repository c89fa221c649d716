"""Turns, spreads and models of random weights."""

import torch
from torch import nn

from localdit.machine import (
    OUT_OF_MEMORY,
    SMALL,
    Spread,
    take_turns,
    with_random_weights,
)


def test_runs_take_turns_and_warm_up_does_not_count():
    calls: list[str] = []
    records = {name: {"seconds": []} for name in "AB"}
    runs = [(lambda name=name: calls.append(name), records[name]) for name in "AB"]
    take_turns(runs, warm_up=1, repeats=3)
    assert "".join(calls) == "ABABABAB"
    assert all(
        len(record["seconds"]) == 3 and "first_call" in record for record in records.values()
    )


def test_what_runs_out_of_memory_leaves_the_others_their_turns():
    calls: list[str] = []

    def too_large() -> None:
        calls.append("A")
        raise torch.OutOfMemoryError

    records = {name: {"seconds": []} for name in "AB"}
    runs = [(too_large, records["A"]), (lambda: calls.append("B"), records["B"])]
    take_turns(runs, warm_up=1, repeats=2)
    assert "".join(calls) == "ABBB"
    assert records["A"]["error"] == OUT_OF_MEMORY
    assert len(records["B"]["seconds"]) == 2


def test_a_spread_is_a_median_within_its_ends():
    assert Spread.of([4.0, 1.0, 2.0]) == Spread(median=2.0, lowest=1.0, highest=4.0)


def test_random_weights_are_small_and_as_asked_for():
    model = with_random_weights(lambda: nn.Linear(64, 64), torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 0.9 * SMALL < model.weight.abs().max() <= SMALL + 1e-3
