"""A run from its first step to its last: everything around the loop of `train.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from localdit.training.agreement import Agreement
from localdit.training.components import attention_kernels
from localdit.training.data.batches import Batch, Draws
from localdit.training.data.order import Step
from localdit.training.data.stage_data import StageData, held_out_batches, stage_batches
from localdit.training.optimizer import learning_rate, set_learning_rate
from localdit.training.outcome import Outcome
from localdit.training.pipeline_folder import with_weights
from localdit.training.reporting import Reporter
from localdit.training.resuming import options_of, resume
from localdit.training.run import RunFolder
from localdit.training.setup import Models, find_data, load_models, make_state, start_processes
from localdit.training.signals import StopRequest
from localdit.training.stages import Stage, stage_of_step
from localdit.training.state import TrainingState
from localdit.training.validation import ValidationBatch, validation_losses


@dataclass
class Session:
    """A run in progress: what `train.py` works with.

    Attributes:
        args: the options.
        accelerator, agreement: the processes, and what they tell each other.
        run: the folder.
        data: of each stage.
        models: the transformer and what surrounds it.
        state: what a step changes.
        reporter: tells how it goes.
        stop: notes the signals that ask for an end.
        kernels: PyTorch's attention kernels to train with.
    """

    args: argparse.Namespace
    accelerator: Accelerator
    agreement: Agreement
    run: RunFolder
    data: list[StageData]
    models: Models
    state: TrainingState
    reporter: Reporter
    stop: StopRequest
    kernels: list[Any]
    saved: int = -1  # step of the newest checkpoint

    def begin_stage(self) -> Stage:
        """Set the model up for the stage that the next step belongs to."""
        progress, stages = self.state.progress, self.args.stages
        stage = stage_of_step(stages, progress.step)
        if progress.step == stage.first_step:
            progress.begin(self.data[stage.index].digest)
        self.models.set_image_size(stage.image_size)
        if len(stages) > 1:
            self.reporter.say(str(stage))
        return stage

    def batches(self, stage: Stage) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps from where the run stands, with this process's batches; without end."""
        data, accelerator = self.data[stage.index], self.accelerator
        processes = accelerator.num_processes
        steps = stage_batches(
            self.models.dataset(data, stage, self.args),
            data.order(stage, stage.global_batch(processes), self.args.seed),
            self.state.progress.position,
            accelerator.process_index,
            processes,
            stage.batch_size,
            self.args.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        while True:
            with self.state.metrics.watch("data"):
                step = next(steps)
            yield step

    def set_learning_rate(self, stage: Stage) -> float:
        """Set the learning rate of the coming step, and return it."""
        rate = learning_rate(
            self.state.progress.step - stage.first_step,
            stage.max_train_steps,
            stage.learning_rate,
            stage.warmup_steps,
            stage.lr_schedule,  # type: ignore[arg-type]  # checked with the other options
        )
        set_learning_rate(self.state.optimizer, rate)
        return rate

    def report(self, rate: float, batches: list[Batch], outcome: Outcome) -> None:
        """Log the step that was taken."""
        step, metrics = self.state.progress.step, self.state.metrics
        # In float16 the scaler skips steps whose gradient overflows: nothing to take a mean of.
        if outcome.finite and math.isfinite(outcome.grad_norm):
            metrics.add(outcome.loss, outcome.grad_norm, rate, outcome.count, outcome.flops)
        if self.args.log_samples:
            ids = [name for batch in batches for name in batch.ids]
            self.reporter.samples(step, ids, outcome.loss if outcome.finite else None)
        self.reporter.advance()
        if step % self.args.log_interval == 0 or step == self.args.stages[-1].end:
            self.reporter.line(metrics.line(step))

    def validate(self, stage: Stage) -> None:
        """Measure losses on what is held out, and draw the validation prompts."""
        if not self.data[stage.index].held_out and self.models.pictures is None:
            return
        transformer = self.models.transformer
        averaged = with_weights(transformer, self.state.averaged_weights())
        averaged = averaged.to(self.accelerator.device)
        if self.data[stage.index].held_out:
            line: dict[str, float] = {"step": self.state.progress.step}
            for name, model in (("model", self.state.model), ("ema", averaged)):
                line |= self._validation_losses(stage, model, name)
            self.reporter.line(line)
        if self.models.pictures is not None:
            drawn = self.models.pictures.draw(
                averaged, self.models.objective.sampling_scheduler(), stage.image_size
            )
            by_prompt = sorted(self.agreement.gathered(drawn), key=lambda pair: pair[0])
            self.reporter.pictures([image for _, image in by_prompt], self.state.progress.step)

    def _validation_losses(
        self, stage: Stage, model: torch.nn.Module, name: str
    ) -> dict[str, float]:
        """The losses of one model on the samples that are held out."""
        data, processes = self.data[stage.index], self.accelerator.num_processes
        batches = held_out_batches(
            self.models.dataset(data, stage, self.args, draws=Draws((self.args.seed,))),
            data,
            self.accelerator.process_index,
            processes,
            stage.batch_size,
            self.args.num_workers,
        )
        return validation_losses(
            model,
            self.models.objective,
            (self._validation_batch(batch) for batch in batches),
            data.sizes,
            name,
            seed=self.args.seed,
            reduce=partial(self.accelerator.reduce, reduction="sum"),
        )

    def _validation_batch(self, batch: Batch) -> ValidationBatch:
        inputs = self.models.make_inputs(batch)
        return ValidationBatch(batch.size, batch.ids, *inputs, batch.weights)

    def save(self) -> None:
        """Write a checkpoint of the run as it stands.

        Raises:
            TrainingStopped: in every process, if it can't be written.
        """
        if self.saved == self.state.progress.step:
            return
        snapshot = self.state.snapshot(self.agreement, options_of(self.args))
        self.agreement.on_main(
            lambda: self.run.save_checkpoint(
                self.models.result, snapshot, self.args.keep_checkpoints
            )
        )
        self.saved = self.state.progress.step

    def finish(self) -> None:
        """Save the end of the run, and its pipeline or adapters."""
        self.save()
        averages = self.state.averaged_weights()
        self.agreement.on_main(lambda: self.run.save_final(self.models.result, averages))
        self.reporter.close()

    def say_stopped(self, signal: str) -> None:
        """Say that a signal ended the run, and how to go on."""
        step = self.state.progress.step
        self.reporter.say(f"{signal}: saved and stopped after step {step}; --resume auto goes on.")
        self.reporter.close()


def set_up(args: argparse.Namespace, stop: StopRequest) -> Session | None:
    """Prepare a run: its data, its models, its folder, its state.

    Returns:
        The session; None if `--dry-run` asked for no more than a report on the data.

    Raises:
        TrainingStopped: in every process, if something is missing or wrong.
    """
    accelerator = start_processes(args)
    agreement = Agreement(accelerator)
    data = agreement.on_main(lambda: find_data(args))
    if args.dry_run:
        from localdit.training.data.dry_run import dry_run_report

        for stage, found in zip(args.stages, data, strict=True):
            batch = stage.global_batch(accelerator.num_processes)
            accelerator.print(dry_run_report(found.found, found.sizes, found.buckets, batch))
    for found in data:
        agreement.on_main(partial(found.require_few_broken, args.max_broken))
    if args.dry_run:
        return None

    run = RunFolder(args.output)
    checkpoint = agreement.on_main(lambda: run.open(args.resume))
    set_seed(args.seed)  # the models start the same in every process
    models = agreement.on_all(lambda: load_models(args, data, accelerator))
    state = agreement.on_all(lambda: make_state(args, models.transformer, accelerator))
    set_seed(args.seed, device_specific=True)
    session = Session(
        args,
        accelerator,
        agreement,
        run,
        data,
        models,
        state,
        Reporter(args, accelerator, run),
        stop,
        attention_kernels(accelerator.device, accelerator.mixed_precision),
    )
    if checkpoint is not None:
        agreement.on_all(partial(resume, session, checkpoint))
    agreement.on_main(lambda: run.save_options(options_of(args)))
    session.reporter.begin(data, state.progress.step)
    if models.frozen:
        session.reporter.say(str(models.result))
    return session
