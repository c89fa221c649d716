"""A run apart from its steps: its setup, stages, data, validation and checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from localdit.parsing import say
from localdit.training.cost import cost_report
from localdit.training.data.batches import Batch, Draws
from localdit.training.data.buckets import Size
from localdit.training.data.order import Step
from localdit.training.data.samples import Fault, Faults, require_few
from localdit.training.data.stage_data import (
    StageData,
    dry_run_report,
    held_out_batches,
    stage_batches,
)
from localdit.training.initialization import settle_objective
from localdit.training.methods import Inputs
from localdit.training.optimizer import learning_rate
from localdit.training.options import set_defaults
from localdit.training.processes import Agreement, add_autocast
from localdit.training.reporting import Reporter
from localdit.training.results import with_weights
from localdit.training.run_folder import RunFolder, changed_options, options_of
from localdit.training.setup import (
    Models,
    find_data,
    latents_of,
    load_models,
    local_tokenizer,
    make_state,
    start_processes,
    text_width_of,
)
from localdit.training.shutdown import StopRequest, keep_until_exit
from localdit.training.stages import Stage, stage_of_step
from localdit.training.state import TRANSFORMER, TrainingState, saved_options
from localdit.training.validation import validation_losses


@dataclass
class Session:
    """A run in progress."""

    args: argparse.Namespace
    accelerator: Accelerator
    agreement: Agreement
    run: RunFolder
    data: list[StageData]  # of each stage
    models: Models
    state: TrainingState  # everything that a step changes
    reporter: Reporter
    stop: StopRequest
    saved: int = -1  # step of the newest checkpoint
    broken_held_out: set[Fault] = field(default_factory=set)  # those that are in broken.jsonl

    @property
    def options(self) -> dict[str, Any]:
        """The options of the run as they take effect, with what identifies frozen models."""
        return options_of(self.args, self.models.fingerprints, self.models.settings)

    def resume(self, checkpoint: Path) -> None:
        """Load a checkpoint, and print the options that differ from those it was saved with."""
        folder = checkpoint / "training"
        changes = changed_options(checkpoint, saved_options(folder), self.options)
        averages = self.models.result.averages_in(checkpoint)
        self.state.restore(folder, averages, self.accelerator.process_index)
        progress, end = self.state.progress, self.args.stages[-1].end
        if progress.step > end:
            raise ValueError(
                f"{checkpoint} is after step {progress.step:,}, but the run is to end at step "
                f"{end:,}. Give at least {progress.step:,} --max-train-steps in all stages "
                "together, or resume from an earlier checkpoint."
            )
        if self.run.holds(checkpoint):
            self.saved = progress.step
        self.present_stage()
        self.reporter.say(f"Resuming from {checkpoint}, after step {progress.step:,}.")
        for name, old, new in changes:
            text = f"Changed since: {name}: {old} -> {new}"
            if name == "transformer" and self.args.lora_rank is None:
                text += ", without effect: weights and settings are those of the checkpoint"
            self.reporter.say(text)

    def present_stage(self) -> Stage:
        """Give the transformer the size of the stage of the next step, or of the last one."""
        stage = stage_of_step(self.args.stages, self.state.progress.step)
        models = self.models
        models.method.set_sample_size(stage.image_size // models.latents.pixels_per_latent)
        return stage

    def begin_stage(self) -> Stage:
        """Prepare for the stage of the next step, and return it."""
        stage = self.present_stage()
        data = self.data[stage.index].digest
        global_batch = stage.global_batch(self.accelerator.num_processes)
        if message := self.state.progress.enter(stage, data, global_batch):
            self.reporter.say(message)
        if len(self.args.stages) > 1:
            self.reporter.say(str(stage))
        return stage

    def batches(self, stage: Stage) -> Iterator[tuple[Step, list[Batch]]]:
        """Yield steps without end, each with the batches of this process."""
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
        """Set the learning rate of the next step, and return it."""
        rate = learning_rate(
            self.state.progress.step - stage.first_step,
            stage.max_train_steps,
            stage.learning_rate,
            stage.warmup_steps,
            stage.lr_schedule,
        )
        self.state.set_learning_rate(rate)
        return rate

    def validate(self, stage: Stage) -> None:
        """Measure the losses of held-out samples, and draw the validation prompts."""
        held_out, pictures = self.data[stage.index].held_out, self.models.pictures
        if not held_out and pictures is None:
            return
        trained = self.state.models[TRANSFORMER]
        averaged = with_weights(self.models.method.transformer, trained.averaged_weights())
        averaged = averaged.to(self.accelerator.device)
        if pictures is not None:  # in float32, as pipelines draw
            drawn = pictures.draw(averaged, stage.image_size)
            by_prompt = sorted(self.agreement.gathered(drawn), key=lambda pair: pair[0])
            self.reporter.pictures([image for _, image in by_prompt], self.state.progress.step)
        if held_out:
            add_autocast(self.accelerator, averaged)  # as the trained model computes
            losses: dict[str, float] = {}
            faults: list[Fault] = []
            for name, model in (("model", trained.module), ("ema", averaged)):
                losses |= self._validation_losses(stage, model, name, faults)
            self._report_held_out(len(held_out), faults)
            if losses:
                self.reporter.line({"step": self.state.progress.step, **losses})

    def _validation_losses(
        self, stage: Stage, model: torch.nn.Module, name: str, faults: list[Fault]
    ) -> dict[str, float]:
        """Return the losses of one model for the held-out samples; add the broken to `faults`."""
        data, processes = self.data[stage.index], self.accelerator.num_processes
        batches = held_out_batches(
            self.models.dataset(data, stage, self.args, draws=Draws((self.args.seed,))),
            data,
            self.accelerator.process_index,
            processes,
            stage.batch_size,
            self.args.num_workers,
        )

        def encoded() -> Iterator[tuple[Size, list[str], Inputs]]:
            for batch in batches:
                faults.extend(batch.faults)
                yield batch.size, batch.ids, self.models.make_inputs(batch)

        return validation_losses(
            model,
            self.models.method.validation_errors,
            encoded(),
            data.sizes,
            name,
            seed=self.args.seed,
            reduce=partial(self.accelerator.reduce, reduction="sum"),
        )

    def _report_held_out(self, count: int, faults: list[Fault]) -> None:
        """Log and print which of the held-out samples are broken, each of them once in a run."""
        broken = dict.fromkeys(self.agreement.gathered(faults))
        if not broken.keys() - self.broken_held_out:
            return
        for fault in broken:
            if fault not in self.broken_held_out:
                self.reporter.broken(fault, self.state.progress.step)
        self.broken_held_out.update(broken)
        left = "" if len(broken) < count else ": no sample is left to measure the loss on"
        self.reporter.say(
            f"{len(broken):,} of {count:,} held-out samples are broken{left}.\n{Faults(broken)}"
        )

    def save(self, sound: bool) -> None:
        """Write a checkpoint of the current step, unless it exists.

        Args:
            sound: whether the last step was taken. If it was skipped, training may have diverged,
                so no older checkpoint is deleted.

        Raises:
            TrainingStopped: in every process, if it can't be written, or weights are not finite.
        """
        if self.saved == self.state.progress.step:
            return
        snapshot = self.state.snapshot(self.agreement, self.options)
        keep = self.args.keep_checkpoints if sound else None
        self.agreement.on_main(lambda: self.run.save_checkpoint(self.models.result, snapshot, keep))
        self.saved = self.state.progress.step

    def finish(self, sound: bool) -> None:
        """Save the last step as `save` does, and the finished pipeline or adapters."""
        self.save(sound)
        averages, step = self.state.models[TRANSFORMER].averaged_weights(), self.saved
        self.agreement.on_main(lambda: self.run.save_final(self.models.result, averages, step))
        self.reporter.close()


def _dry_run(args: argparse.Namespace, data: list[StageData], accelerator: Accelerator) -> None:
    """Print what the data of each stage contains, and what the stage costs."""
    tokenizer = local_tokenizer(args)
    for stage, stage_data in zip(args.stages, data, strict=True):
        batch = stage.global_batch(accelerator.num_processes)
        say(dry_run_report(stage_data, batch, tokenizer))
        if stage_data.found.samples:
            say(_cost(args, stage, stage_data, accelerator))


def _cost(args: argparse.Namespace, stage: Stage, data: StageData, accelerator: Accelerator) -> str:
    """Describe the cost of a stage; its largest pictures decide on the memory."""
    largest = max(data.sizes, key=lambda size: size.height * size.width)
    return cost_report(
        args,
        stage,
        largest,
        text_width_of(args, data.found),
        latents_of(args, data.found),
        accelerator.num_processes,
        accelerator.distributed_type == "FSDP",
        accelerator.mixed_precision,
    )


def set_up(args: argparse.Namespace, stop: StopRequest) -> Session | None:
    """Prepare a run: its data, models, folder and state.

    Returns:
        The session; None after the report of `--dry-run`.

    Raises:
        TrainingStopped: in every process, if something is missing or wrong.
    """
    accelerator = start_processes(args)
    args.mixed_precision = accelerator.mixed_precision  # by default, that of its configuration
    agreement = Agreement(accelerator)
    if accelerator.is_main_process:
        for warning in filter(None, (stage.warning() for stage in args.stages)):
            say(warning, "stderr")

    def settle(checkpoint: Path | None) -> None:
        message = agreement.on_all(partial(settle_objective, args, checkpoint))
        if message and accelerator.is_local_main_process:
            say(message)

    if not args.resume:
        settle(None)
    data = agreement.on_main(lambda: find_data(args))
    set_defaults(args)
    if args.dry_run:
        agreement.on_main(lambda: _dry_run(args, data, accelerator))
    for found in (stage_data.found for stage_data in data):
        faults, healthy = found.faults, len(found.samples)
        agreement.on_main(partial(require_few, faults, healthy, args.max_broken))
    if args.dry_run:
        return None

    run = RunFolder(args.output)
    checkpoint = agreement.on_main(lambda: run.open(args.resume))
    if args.resume:
        settle(checkpoint)
    set_seed(args.seed)  # the models start the same in every process
    models = agreement.on_all(lambda: load_models(args, data, accelerator, checkpoint))
    state = agreement.on_all(lambda: make_state(args, models.method, accelerator))
    if accelerator.num_processes > 1:
        keep_until_exit(state)
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
    )
    if checkpoint is not None:
        agreement.on_all(partial(session.resume, checkpoint))
        session.save(sound=True)  # a run that branches off begins with a checkpoint of its own
    agreement.on_main(lambda: run.begin(session.options, state.progress.step))
    session.broken_held_out = agreement.on_main(run.broken)
    encoders = models.make_inputs.encoders
    session.reporter.begin(data, state.progress.step, encoders and encoders.tokenizer)
    session.reporter.say(str(models.result))
    return session
