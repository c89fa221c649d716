"""Training: one loop. `train.py` and `localdit train` run `main`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from localdit.training.options import make_parser, parse_args
from localdit.training.signals import StopRequest

if TYPE_CHECKING:
    from localdit.training.data.loading import Batch
    from localdit.training.outcome import Outcome
    from localdit.training.session import Session


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Set the run up, train, and say in one line what went wrong if something did.

    Args:
        argv: the options, by default those of the process.
        prog: what messages about them call the program, by default the script's name.
    """
    parser = make_parser(prog)
    args = parse_args(argv, parser)
    stop = StopRequest()
    stop.listen()

    from localdit.machine import hide_loading_bars
    from localdit.training.agreement import TrainingStopped
    from localdit.training.session import set_up

    hide_loading_bars()
    try:
        session = set_up(args, stop)
        if session is not None:
            train(session)
    except TrainingStopped as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def train(session: Session) -> None:
    """Take the steps of all stages, from where the run stands."""
    args, state, optimizer = session.args, session.state, session.state.optimizer
    while state.progress.step < args.stages[-1].end:
        stage = session.begin_stage()
        for step, batches in session.batches(stage):
            rate = session.set_learning_rate(stage)
            outcome = take_step(session, batches)
            with state.metrics.watch("compute"):
                if outcome.finite:
                    optimizer.step()
                    if not session.accelerator.optimizer_step_was_skipped:
                        state.ema.update(state.parameters())
                optimizer.zero_grad()

            state.progress.advance(step, outcome.broken, skipped=not outcome.finite)
            session.report(rate, batches, outcome)
            if state.progress.step % args.validation_interval == 0:
                session.validate(stage)
            if state.progress.step % args.save_interval == 0 or outcome.signal:
                session.save()
            if outcome.signal:
                session.say_stopped(outcome.signal)
                return
            if state.progress.step == stage.end:
                break
    session.finish()


def take_step(session: Session, batches: list[Batch]) -> Outcome:
    """Gather the gradient of one optimizer step; the loss is the mean over all of its samples.

    Placeholders of broken samples weigh nothing, wherever they are: each of the samples counts the
    same, however many processes and batches they are spread over.
    """
    import torch
    from torch.nn.attention import sdpa_kernel

    from localdit.training.distributed import loss_divisor
    from localdit.training.objective import denoising_errors
    from localdit.training.outcome import agree_on

    accelerator, model = session.accelerator, session.state.model
    watch = session.state.metrics.watch
    objective, device = session.models.objective, session.accelerator.device
    (count,) = session.agreement.total(sum(batch.weights.sum().item() for batch in batches))
    accelerator.gradient_accumulation_steps = len(batches)
    # Accelerate averages over accumulated batches, and over processes.
    scale = loss_divisor(accelerator) * accelerator.num_processes / max(count, 1.0)
    losses, flops = [], 0
    for batch in batches:
        with accelerator.accumulate(model):
            with watch("encoding"):
                inputs = session.models.make_inputs(batch)
            with watch("compute"), sdpa_kernel(session.kernels):
                noise, weights = batch.noise.to(device), batch.weights.to(device)
                timesteps = objective.timesteps(batch.positions.to(device))
                prediction = model(
                    objective.add_noise(inputs.latents, noise, timesteps),
                    encoder_hidden_states=inputs.text,
                    encoder_attention_mask=inputs.text_mask,
                    timestep=timesteps,
                    added_cond_kwargs=inputs.conditions,
                    return_dict=False,
                )[0]
                target = objective.target(inputs.latents, noise, timesteps)
                errors = denoising_errors(prediction, target) * objective.weights(timesteps)
                loss = torch.where(weights > 0, errors, 0.0)  # (B,)
                accelerator.backward(loss.sum() * scale)
        losses.append(loss.detach())
        flops += session.models.step_flops(inputs)
    with watch("compute"):
        norm = accelerator.clip_grad_norm_(model.parameters(), session.args.gradient_clip)
    return agree_on(session, batches, torch.stack(losses), norm, count, flops)
