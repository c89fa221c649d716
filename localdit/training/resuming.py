"""Resuming a run: the options that must be the same, and the consequences of changing others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localdit.training.data.order import Position
from localdit.training.state import Progress

# With another value of these it would be another run.
FIXED = (
    "method", "teacher", "prediction_type", "seed", "lora_rank", "lora_alpha",
    "lora_target_modules",
)  # fmt: skip
IGNORED = ("resume", "output")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON holds them."""
    stages = [vars(stage) for stage in args.stages] if len(args.stages) > 1 else None
    plain = vars(args) | {"stages": stages}
    return json.loads(json.dumps(plain, default=str))


def changed_options(
    checkpoint: Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
    """Return name, old and new value of each option that differs from the saved run's.

    Raises:
        ValueError: if one of `FIXED` differs.
    """
    before = {"method": "fine-tuning", **before}  # runs from before there were methods
    names = sorted((before.keys() | now.keys()) - set(IGNORED))
    changes = [
        (name, before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name)
    ]
    for name, old, new in changes:
        if name in FIXED:
            raise ValueError(_another_run(checkpoint, name, old, new, before))
    return changes


def _another_run(checkpoint: Path, name: str, old: Any, new: Any, before: Mapping[str, Any]) -> str:
    """Return the message for an option that would make it another run."""
    flag = f"--{name.replace('_', '-')}"
    was, given = (
        f"without {flag}" if value is None else f"with {flag} {value}" for value in (old, new)
    )
    new_run = f" from its weights with --transformer {checkpoint}/transformer"
    if before.get("lora_rank") is not None:
        new_run = " in another --output"
    return (
        f"{checkpoint} is of a run {was}, not {given}. Resume it {was}, or start a new run"
        f"{new_run}."
    )


def resume_data(progress: Progress, digest: str, global_batch: int) -> str | None:
    """Find the position in the data again.

    Args:
        progress: of the saved run; begins a new epoch if the data has changed.
        digest: fingerprint of the present data.
        global_batch: samples per optimizer step now.

    Returns:
        A message if data or batch size have changed.
    """
    if progress.data != digest:
        progress.position = Position(progress.position.epoch + 1)
        progress.data = digest
        return "The data has changed: a new epoch of it begins."
    taken = progress.position.taken
    if taken and taken[-1][0] != global_batch:
        return (
            f"An optimizer step has {global_batch} samples now, it had {taken[-1][0]}. The rest of "
            "the epoch is divided again: each of its samples still comes exactly once."
        )
    return None
