"""Turns, and models with random weights."""

import torch
from torch import nn

from localdit.machine import (
    OUT_OF_MEMORY,
    SMALL,
    take_turns,
    with_random_weights,
)


def test_runs_alternate_and_the_warm_up_is_not_counted():
    calls: list[str] = []
    records = {name: {"seconds": []} for name in "AB"}
    runs = [(lambda name=name: calls.append(name), records[name]) for name in "AB"]
    take_turns(runs, warm_up=1, repeats=3)
    assert "".join(calls) == "ABABABAB"
    assert all(
        len(record["seconds"]) == 3 and "first_call" in record for record in records.values()
    )


def test_a_run_without_memory_is_not_repeated():
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


def test_random_weights_are_small_and_have_the_given_dtype():
    model = with_random_weights(lambda: nn.Linear(64, 64), torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 0.9 * SMALL < model.weight.abs().max() <= SMALL + 1e-3
