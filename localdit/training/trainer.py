"""The training loop: the gradient of each step, and the agreement of the processes on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from localdit.training.data.batches import Batch
from localdit.training.processes import loss_divisor
from localdit.training.session import Session
from localdit.training.shutdown import TrainingStopped, deaths_of_workers
from localdit.training.stages import stage_of_step


@dataclass(frozen=True)
class Outcome:
    """The result of a step before the optimizer's update, the same on all processes."""

    loss: float  # mean over the samples
    grad_norm: float  # before the gradient was clipped
    count: int  # sound samples
    broken: int  # broken samples
    finite: bool  # whether losses and gradient are
    flops: int  # operations of the models, forward and backward
    signal: str | None  # the signal that asked one of the processes to stop, or None

    @property
    def usable(self) -> bool:
        """Whether the gradient is finite and comes from at least one sound sample."""
        return self.finite and self.count > 0


@deaths_of_workers("continue with --resume auto")
def train(session: Session) -> None:
    """Train from the current step to the end of the last stage."""
    args, state, reporter = session.args, session.state, session.reporter
    sound, due = True, False
    while state.progress.step < args.stages[-1].end:
        stage = session.begin_stage()
        for step, batches in session.batches(stage):
            rate = session.set_learning_rate(stage)
            outcome = take_step(session, batches)
            with state.metrics.watch("compute"):
                taken = update(session, outcome.usable)

            sound = taken if outcome.count else sound  # unchanged by a step without samples
            state.progress.advance(step, outcome.broken, skipped=not outcome.finite)
            log_step(session, rate, batches, outcome)
            if state.progress.step % args.validation_interval == 0:
                session.validate(stage)
            due = due or state.progress.step % args.save_interval == 0
            if (due and sound) or outcome.signal:  # after a skipped step, a checkpoint waits
                session.save(sound=sound)
                due = False
            if outcome.signal:
                reporter.say(
                    f"{outcome.signal}: saved and stopped after step {state.progress.step}; "
                    "resume with --resume auto."
                )
                reporter.close()
                return
            if state.progress.step == stage.end:
                break
    session.finish(sound=sound)


def take_step(session: Session, batches: list[Batch]) -> Outcome:
    """Compute the gradient of one optimizer step. The loss is the mean over all of its samples.

    Placeholders of broken samples have no weight. Every sample counts the same, however many
    processes and batches the samples are spread over.
    """
    accelerator, method = session.accelerator, session.models.method
    device = accelerator.device
    watch = session.state.metrics.watch
    trained = session.state.modules
    models = trained | method.frozen
    (count,) = session.agreement.total(sum(batch.weights.sum().item() for batch in batches))
    accelerator.gradient_accumulation_steps = len(batches)
    accelerator.step = 0  # Accelerate counts the batches of all steps, which may have had others
    # Accelerate averages over accumulated batches, and over processes.
    scale = loss_divisor(accelerator) * accelerator.num_processes / max(count, 1.0)
    losses, flops = [], 0
    for batch in batches:
        with accelerator.accumulate(*trained.values()):
            with watch("encoding"):
                inputs = session.models.make_inputs(batch)
            with watch("compute"):
                noise, weights = batch.noise.to(device), batch.weights.to(device)
                errors = method.losses(models, inputs, noise, batch.positions.to(device))
                loss = torch.where(weights > 0, errors, 0.0)  # (B,)
                accelerator.backward(loss.sum() * scale)
        losses.append(loss.detach())
        flops += method.step_flops(inputs)
    with watch("compute"):
        norm = accelerator.clip_grad_norm_(session.state.parameters(), session.args.gradient_clip)
    return _agree(session, batches, torch.stack(losses), norm, count, flops)


def update(session: Session, usable: bool) -> bool:
    """Step the optimizers and move the averages, if the gradient can be used.

    Returns:
        Whether the step was taken.
    """
    models = session.state.models.values()
    assert session.accelerator.sync_gradients  # else the calls of its optimizers do nothing
    taken = usable
    if usable:
        for model in models:
            model.optimizer.step()
        taken = not session.accelerator.optimizer_step_was_skipped
        if taken:
            for model in models:
                model.update_average()
    for model in models:
        model.optimizer.zero_grad()
    return taken


def log_step(session: Session, rate: float, batches: list[Batch], outcome: Outcome) -> None:
    """Log the step that was taken or skipped."""
    step, metrics = session.state.progress.step, session.state.metrics
    # In float16 the scaler skips steps whose gradient overflows: they have no norm to average.
    if not (outcome.finite and math.isfinite(outcome.grad_norm)):
        metrics.skip()
    elif outcome.count:
        metrics.add(outcome.loss, outcome.grad_norm, rate, outcome.count, outcome.flops)
    if session.args.log_samples:
        ids = [name for batch in batches for name in batch.ids]
        session.reporter.samples(step, ids, outcome.loss if outcome.usable else None)
    session.reporter.advance()
    if step % session.args.log_interval == 0 or step == session.args.stages[-1].end:
        session.reporter.line(metrics.line(step))


def _agree(
    session: Session,
    batches: list[Batch],
    losses: torch.Tensor,
    norm: torch.Tensor,
    count: float,
    flops: int,
) -> Outcome:
    """Combine the results of all processes: of their losses (accumulations, B) and operations."""
    grad_norm = float(norm)
    # With scaled gradients (float16) an overflow is expected: the scaler skips the step.
    sound = math.isfinite(grad_norm) or session.accelerator.scaler is not None
    bad = not (sound and bool(torch.isfinite(losses).all()))
    faults = [fault for batch in batches for fault in batch.faults]
    loss, bad_ranks, stops, broken, operations = session.agreement.total(
        losses.double().sum().item(), bad, session.stop.signal is not None, len(faults), flops
    )
    if broken:
        for fault in session.agreement.gathered(faults):
            session.reporter.broken(fault, session.state.progress.step + 1)
        _require_few_broken(session, int(broken))
    if not count:
        step = session.state.progress.step + 1
        session.reporter.say(f"Step {step}: all of its samples are broken, so nothing is learned.")
    if bad_ranks:
        _report_skip(session, batches, losses, grad_norm)
    signals = session.agreement.gathered([session.stop.signal]) if stops else []
    return Outcome(
        loss=loss / max(count, 1),
        grad_norm=grad_norm,
        count=int(count),
        broken=int(broken),
        finite=not bad_ranks,
        flops=int(operations),
        signal=next((name for name in signals if name), None),
    )


def _require_few_broken(session: Session, broken: int) -> None:
    """Stop if too large a share of the epoch's samples is broken."""
    progress = session.state.progress
    found = session.data[stage_of_step(session.args.stages, progress.step).index].found
    total = len(found.samples) + found.faults.total
    now = found.faults.total + progress.broken + broken
    if now > session.args.max_broken * total:
        raise TrainingStopped(
            f"{now:,} of {total:,} samples are broken, more than the "
            f"{session.args.max_broken:.0%} that --max-broken allows. {session.run.path}"
            "/broken.jsonl lists those that were found during training. Repair or remove them, or "
            "raise --max-broken, and continue with --resume auto."
        )


def _report_skip(session: Session, batches: list[Batch], losses: torch.Tensor, norm: float) -> None:
    """Report a step whose loss or gradient is not finite, and stop if it is one too many."""
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
    message = f"Step {progress.step + 1}: the {what} is not finite, for {names}."
    if progress.skipped + 1 > session.args.max_skipped_steps:
        raise TrainingStopped(
            f"{message} {progress.skipped} steps were skipped for this reason before, and "
            f"--max-skipped-steps is {session.args.max_skipped_steps}. The checkpoints precede "
            "this step. Try a lower --learning-rate, or --mixed-precision bf16 or no."
        )
    session.reporter.say(f"{message} The step is skipped.")
