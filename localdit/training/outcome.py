"""What the processes agree on about a step before the optimizer takes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from localdit.training.agreement import TrainingStopped
from localdit.training.data.batches import Batch
from localdit.training.stages import stage_of_step

if TYPE_CHECKING:
    from localdit.training.session import Session


@dataclass(frozen=True)
class Outcome:
    """What the processes agree on about a step.

    Attributes:
        loss: mean over its samples.
        grad_norm: of the gradient, before it was clipped.
        count: samples that were sound.
        broken: samples that were not.
        finite: whether the gradient may be used.
        flops: operations of the model, forward and backward.
        signal: the signal that asked one of the processes to stop, if one did.
    """

    loss: float
    grad_norm: float
    count: int
    broken: int
    finite: bool
    flops: int
    signal: str | None


def agree_on(
    session: Session,
    batches: list[Batch],
    losses: torch.Tensor,
    norm: torch.Tensor,
    count: float,
    flops: int,
) -> Outcome:
    """Find out over all processes how a step went.

    Args:
        session: the run.
        batches: this process's.
        losses: (accumulations, B) of their samples.
        norm: of the whole gradient.
        count: sound samples of all processes.
        flops: operations of this process.

    Raises:
        TrainingStopped: if too many steps were not finite, or too many samples are broken.
    """
    grad_norm = float(norm)
    # With scaled gradients (float16) an overflow is part of the scheme: the scaler skips it.
    sound = math.isfinite(grad_norm) or session.accelerator.scaler is not None
    bad = not (sound and bool(torch.isfinite(losses).all()))
    faults = [fault for batch in batches for fault in batch.faults]
    loss, bad_ranks, stops, broken, operations = session.agreement.total(
        losses.double().sum().item(), bad, session.stop.signal is not None, len(faults), flops
    )
    if broken:
        for fault in session.agreement.gathered(faults):
            session.reporter.broken(fault)
    _require_few_broken(session, int(broken))
    if bad_ranks:
        _skip(session, batches, losses, grad_norm)
    signals = session.agreement.gathered([session.stop.signal]) if stops else []
    signal = next((name for name in signals if name), None)
    finite = not bad_ranks and count > 0
    return Outcome(
        loss / max(count, 1),
        grad_norm,
        int(count),
        int(broken),
        finite,
        int(operations),
        signal,
    )


def _require_few_broken(session: Session, broken: int) -> None:
    """Stop once too large a share of the epoch's samples is broken."""
    if not broken:
        return
    progress = session.state.progress
    found = session.data[stage_of_step(session.args.stages, progress.step).index].found
    total = len(found.samples) + found.faults.total
    now = found.faults.total + progress.broken + broken
    if now > session.args.max_broken * total:
        raise TrainingStopped(
            f"{now:,} of {total:,} samples are broken, more than the "
            f"{session.args.max_broken:.0%} that --max-broken allows; broken.jsonl in "
            f"{session.run.path} lists those that only reading showed. Mend or remove them, or "
            "raise --max-broken, and go on with --resume auto."
        )


def _skip(session: Session, batches: list[Batch], losses: torch.Tensor, norm: float) -> None:
    """Report a step whose loss or gradient is not finite, and stop where it is one too many."""
    ids = [sample for batch in batches for sample in batch.ids]
    suspects = [
        name
        for name, loss in zip(ids, losses.flatten().tolist(), strict=True)
        if name and not math.isfinite(loss)
    ]
    suspects = session.agreement.gathered(suspects)
    everyone = [name for name in session.agreement.gathered(ids) if name]
    progress = session.state.progress
    what = "loss" if suspects else f"gradient (its norm is {norm:g})"
    names = ", ".join(suspects or everyone)
    message = f"Step {progress.step + 1}: the {what} is not finite, of {names}."
    if progress.skipped + 1 > session.args.max_skipped_steps:
        raise TrainingStopped(
            f"{message} {progress.skipped} steps were skipped for this before, and "
            f"--max-skipped-steps is {session.args.max_skipped_steps}. The checkpoints are from "
            "before. Try a lower --learning-rate, or --mixed-precision bf16 or no."
        )
    session.reporter.say(f"{message} The step is skipped.")
