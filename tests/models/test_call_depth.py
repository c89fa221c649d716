"""The number of our own Python calls between a caller of the transformer and window attention."""

import sys
from pathlib import Path

import pytest
import torch

import localdit
from localdit.models import backends, clear_caches, layers, window_attention, windows
from tests.models.test_transformer import inputs, make, run

PACKAGE = str(Path(localdit.__file__).parent)


@pytest.fixture
def stacks(monkeypatch):
    """The stack of our own functions inside each call of window attention, outermost first."""
    real, found = window_attention.window_layout, []

    def recorded(*args):
        frame, stack = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                stack.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            frame = frame.f_back
        found.append(stack[::-1])
        return real(*args)

    monkeypatch.setattr(window_attention, "window_layout", recorded)
    return found


WAY = [
    "transformer.forward",
    "block.forward",
    "attention.forward",
    "attention.__call__",
    "backends.attend_within_windows",
    "window_attention.window_attention",
]


@pytest.mark.parametrize("use_global", [False, True])
def test_six_calls_from_the_transformer_to_window_attention(stacks, use_global):
    run(make(use_global=use_global, num_layers=2), **inputs())
    assert stacks
    assert all(stack[: len(WAY)] == WAY for stack in stacks)
    # What follows are helpers inside window attention.
    assert {stack[-1] for stack in stacks} <= {
        "window_attention._head_rows",
        "window_attention.window_bias",
    }


def test_clearing_caches_frees_the_tensors_and_keeps_the_result():
    model, given = make(use_global=True, num_layers=2), inputs()
    before = run(model, **given)
    caches = (windows.window_layout, windows.relative_position_index, layers.rope_angles)
    assert all(cache.cache_info().currsize for cache in caches)
    clear_caches()
    assert not any(cache.cache_info().currsize for cache in caches)
    assert not window_attention._head_rows.cache_info().currsize
    assert torch.equal(run(model, **given), before)


def test_caches_are_bounded():
    from localdit.models import _CACHES

    bounds = {
        cache.cache_info().maxsize for cache in _CACHES if cache is not backends._triton_version
    }
    assert None not in bounds
