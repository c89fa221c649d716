"""Going on from a checkpoint: what has to be the same, and what a change means."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdit.training.data.order import Position
from localdit.training.stages import Stage, stage_of_step
from localdit.training.state import saved_options

if TYPE_CHECKING:
    from localdit.training.session import Session

# Another one would be another run.
FIXED = ("prediction_type", "seed", "lora_rank", "lora_alpha", "lora_target_modules")
OF_NO_MATTER = ("resume", "output")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON has them."""
    stages = [vars(stage) for stage in args.stages] if len(args.stages) > 1 else None
    plain = vars(args) | {"stages": stages}
    return json.loads(json.dumps(plain, default=str))


def resume(session: Session, checkpoint: Path) -> None:
    """Take over the state of a checkpoint, and say what differs from the run it is of.

    Raises:
        ValueError: if it is of another run, model or optimizer.
    """
    state, stages = session.state, session.args.stages
    before, now = saved_options(checkpoint / "training"), options_of(session.args)
    changes = list(changed_options(before, now))
    for name, old, new in changes:
        if name in FIXED:
            raise ValueError(_another_run(checkpoint, name, old, new, before))
    averages = session.models.result.averages_in(checkpoint)
    state.restore(checkpoint / "training", averages, session.accelerator.process_index)
    session.saved = state.progress.step
    say = session.reporter.say
    say(f"Going on from {checkpoint}, after step {state.progress.step:,}.")
    for name, old, new in changes:
        say(f"Changed since: {name}: {old} -> {new}")
    stage = stage_of_step(stages, state.progress.step)
    if state.progress.step > stage.first_step:
        _resume_data(session, stage)


def _another_run(checkpoint: Path, name: str, old: Any, new: Any, before: Mapping[str, Any]) -> str:
    """What to say of an option that makes a run another one."""
    flag = f"--{name.replace('_', '-')}"
    was, given = (
        f"without {flag}" if value is None else f"with {flag} {value}" for value in (old, new)
    )
    anew = f" from its weights with --transformer {checkpoint}/transformer"
    if before.get("lora_rank") is not None:
        anew = " in another --output"
    return (
        f"{checkpoint} is of a run {was}, not {given}. Resume it {was}, or begin a new run{anew}."
    )


def _resume_data(session: Session, stage: Stage) -> None:
    """Find the position in the data again, and say what a changed batch or data set means."""
    progress, say = session.state.progress, session.reporter.say
    if progress.data != session.data[stage.index].digest:
        say("The data is not what it was: a new epoch of it begins.")
        progress.position = Position(progress.position.epoch + 1)
        progress.data = session.data[stage.index].digest
        return
    taken = progress.position.taken
    batch = stage.global_batch(session.accelerator.num_processes)
    if taken and taken[-1][0] != batch:
        say(
            f"An optimizer step has {batch} samples now, it had {taken[-1][0]}. The rest of the "
            "epoch is cut anew: each of its samples still comes exactly once."
        )


def changed_options(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterable[tuple[str, Any, Any]]:
    """Name, old and new value of each option that differs."""
    for name in sorted((before.keys() | now.keys()) - set(OF_NO_MATTER)):
        if before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)
