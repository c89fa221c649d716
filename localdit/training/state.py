"""Everything that a training step changes, and its files: tensors and JSON, no pickles."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from localdit.checkpoint.reading import load_finite
from localdit.files import read_json, write_json
from localdit.training.data.order import Position, Step
from localdit.training.metrics import Metrics
from localdit.training.optimizer import load_optimizer_state, optimizer_state
from localdit.training.post_hoc_ema import gamma
from localdit.training.processes import Agreement
from localdit.training.sharding import (
    gather_shards,
    load_model_state,
    local,
    model_state,
    named_parameters,
    shard_of,
    trained_parameters,
    whole,
    whole_of,
)
from localdit.training.stages import Stage

Tensors = dict[str, torch.Tensor]
# Name of the model that pipelines sample with. In a checkpoint its averages are the pipeline or the
# adapters, and its files have no name, so that older checkpoints can be read.
TRANSFORMER = "transformer"
VALUES = "state.json"  # everything but tensors


class ExponentialMovingAverage:
    """Averages, in float32, of the parameters of a model in training.

    At update n the decay is `min(decay, (1 + n) / (10 + n))`, so the average forgets the random
    start even in a short run. With a sharded model, each process averages its shards.

    Attributes:
        averages: this process's shard of the average of each parameter, by name.
        updates: number of calls of `update`.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        decay: float,
        device: torch.device | str | None = None,
    ) -> None:
        """Start from the parameters as they are.

        Args:
            parameters: names and parameters, as `named_parameters` yields them.
            decay: share of the average that an update keeps in the long run.
            device: device of the averages; None for that of the parameters.
        """
        self.averages = {
            name: local(parameter).detach().to(device, torch.float32, copy=True)
            for name, parameter in parameters
        }
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Move the averages towards the present parameters."""
        self.updates += 1
        decay = self._decay(self.updates)
        current = dict(parameters)
        weights = [
            local(current[name]).detach().to(average.device, torch.float32)
            for name, average in self.averages.items()
        ]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    def _decay(self, update: int) -> float:
        """Return the share of the averages that an update keeps."""
        return min(self.decay, (1 + update) / (10 + update))

    def load(self, averages: Tensors, updates: int, model: nn.Module) -> None:
        """Set the averages of all parameters, and how many updates they have seen."""
        parameters = dict(named_parameters(model))
        for name, shard in self.averages.items():
            shard.copy_(shard_of(averages[name], parameters[name]))
        self.updates = updates


class PowerFunctionAverage(ExponentialMovingAverage):
    """An average in which update i counts in proportion to `i ** gamma`, for post-hoc EMA.

    At update n the decay is `(1 - 1 / n) ** (gamma + 1)` (Karras et al., 2024, section 3.1), so
    the weights before the first update are forgotten.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        sigma_rel: float,
        device: torch.device | str | None = None,
    ) -> None:
        """Start from the parameters as they are; for `sigma_rel`, see `post_hoc_ema`."""
        super().__init__(parameters, 1.0, device)
        self.gamma = gamma(sigma_rel)

    def _decay(self, update: int) -> float:
        return (1 - 1 / update) ** (self.gamma + 1)


@dataclass
class TrainedModel:
    """A model in training."""

    module: nn.Module  # as Accelerate prepared it
    optimizer: torch.optim.Optimizer  # as Accelerate prepared it
    average: ExponentialMovingAverage | None = None  # of the trained weights, if it is kept
    # Further averages for post-hoc EMA, by their `sigma_rel`.
    profiles: dict[float, PowerFunctionAverage] = field(default_factory=dict)

    def update_average(self) -> None:
        """Move the averages, if there are any, towards the weights after a step."""
        for average in (self.average, *self.profiles.values()):
            if average is not None:
                average.update(named_parameters(self.module))

    def averaged_weights(self) -> Tensors:
        """Return the averaged weights in full, on every process. Collective.

        Frozen weights, and all weights of a model without an average, are returned as they are.
        Nothing is copied where nothing is sharded.
        """
        averages = self._shards()
        return {
            name: whole_of(averages[name], parameter)
            if name in averages
            else whole(parameter.detach())
            for name, parameter in named_parameters(self.module)
        }

    def gathered_average(self) -> Tensors:
        """Return the averages of the trained weights, in full, on the main process. Collective.

        For a model without an average, these are copies of the weights.
        """
        return gather_shards(self._shards(), self.module)

    def _shards(self) -> Mapping[str, torch.Tensor]:
        if self.average is not None:
            return self.average.averages
        return {
            name: local(parameter).detach() for name, parameter in trained_parameters(self.module)
        }

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Gather weights, the optimizer's tensors, and the other values for JSON. Collective.

        The tensors are complete on the main process only.
        """
        tensors, groups = optimizer_state(self.module, self.optimizer)
        updates = self.average.updates if self.average is not None else None
        return model_state(self.module), tensors, {"ema_updates": updates, "optimizer": groups}

    def load_state(
        self, weights: Tensors, optimizer: Tensors, average: Tensors, notes: Mapping[str, Any]
    ) -> None:
        """Load what `state` and `gathered_average` returned, on any number of processes."""
        load_model_state(self.module, weights)
        load_optimizer_state(self.module, self.optimizer, optimizer, notes["optimizer"])
        if self.average is not None:
            # If the saved run kept no average, one starts from the weights.
            self.average.load(average, notes["ema_updates"] or 0, self.module)


@dataclass
class Progress:
    """The position of a run."""

    step: int = 0  # optimizer steps taken, including those that were skipped
    position: Position = field(default_factory=Position)  # in the data of the current stage
    skipped: int = 0  # steps that were skipped because a loss or gradient was not finite
    broken: int = 0  # samples of the current epoch that turned out to be broken when they were read
    data: str = ""  # fingerprint of the data that `position` refers to
    stage: int | None = None  # index of its stage; None in checkpoints of earlier versions

    def begin(self, data: str, stage: int, epoch: int = 0) -> None:
        """Go to the beginning of an epoch of a stage's data."""
        self.position, self.broken, self.data, self.stage = Position(epoch), 0, data, stage

    def enter(self, stage: Stage, data: str, global_batch: int) -> str | None:
        """Begin a stage, or find the position in its data again.

        Args:
            stage: the stage of the next step.
            data: fingerprint of the present data. If it has changed, a new epoch begins.
            global_batch: samples in an optimizer step now.

        Returns:
            A message if data, stage or batch size have changed. Each stage has an order of its own,
            so a new epoch also begins if the lengths of the stages have changed so that this is
            another one.
        """
        new = self.stage is None or self.stage < stage.index
        if new and self.step == stage.first_step:
            self.begin(data, stage.index)
            return None
        other_stage = self.stage not in (None, stage.index)
        self.stage = stage.index
        if other_stage or self.data != data:
            self.begin(data, stage.index, self.position.epoch + 1)
            if other_stage:
                return "This step is in another stage now: a new epoch of its data begins."
            return "The data has changed: a new epoch of it begins."
        taken = self.position.taken
        if taken and taken[-1][0] != global_batch:
            return (
                f"An optimizer step has {global_batch} samples now, it had {taken[-1][0]}. The "
                "rest of the epoch is divided again: each of its samples still comes exactly once."
            )
        return None

    def advance(self, step: Step, broken: int, skipped: bool) -> None:
        """Count a step. Its samples are used up whether or not it was skipped."""
        self.step += 1
        self.skipped += skipped
        same_epoch = step.position.epoch == self.position.epoch
        self.broken = self.broken + broken if same_epoch else 0
        self.position = step.position

    def to_json(self) -> dict[str, Any]:
        """Return the progress as plain values."""
        return vars(self) | {"position": self.position.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Invert `to_json`."""
        return cls(**values | {"position": Position.from_json(values["position"])})


@dataclass
class Snapshot:
    """A full training state on the CPU, to be written to a checkpoint."""

    tensors: dict[str, Tensors]  # of each file, by its name
    # Averages of the transformer, which a checkpoint stores as a pipeline or adapters.
    averages: Tensors
    values: dict[str, Any]  # everything else, ready for JSON
    # The transformer's averages for post-hoc EMA, by `sigma_rel`.
    profiles: dict[float, Tensors] = field(default_factory=dict)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of all weights and averages."""
        files = [t for name, t in self.tensors.items() if name.startswith(("model", "average"))]
        for tensors in (*files, self.averages, *self.profiles.values()):
            yield from tensors.items()

    def write(self, folder: Path) -> None:
        """Write everything except `averages`."""
        folder.mkdir()
        profiles = {_profile(sigma_rel): kept for sigma_rel, kept in self.profiles.items()}
        for name, tensors in (self.tensors | profiles).items():
            save_file(tensors, folder / f"{name}.safetensors")
        write_json(folder / VALUES, self.values)


@dataclass
class TrainingState:
    """Everything that a training step changes. Frozen models are not part of it.

    A checkpoint holds `model.safetensors` and `optimizer.safetensors` of the transformer, and
    `ema-SIGMA_REL.safetensors` of each of its averages for post-hoc EMA,
    `model-NAME.safetensors`, `optimizer-NAME.safetensors` and `average-NAME.safetensors` of each
    other model, `random.safetensors`, and `state.json`.
    """

    models: dict[str, TrainedModel]  # by name
    scaler: torch.amp.GradScaler | None  # scales float16 gradients; None for other types
    metrics: Metrics  # since the last line was logged
    progress: Progress

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The models as Accelerate prepared them, by name."""
        return {name: model.module for name, model in self.models.items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all models."""
        for model in self.models.values():
            yield from model.module.parameters()

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of all models."""
        for model in self.models.values():
            for group in model.optimizer.param_groups:
                group["lr"] = value

    def snapshot(self, agreement: Agreement, options: dict[str, Any]) -> Snapshot:
        """Gather the state, to store it with the options of the run. Collective.

        The result is complete on the main process only.
        """
        tensors: dict[str, Tensors] = {}
        notes: dict[str, dict[str, Any]] = {}
        averages: dict[str, Tensors] = {}
        profiles: dict[float, Tensors] = {}
        for name, model in self.models.items():
            tensors[_file("model", name)], tensors[_file("optimizer", name)], notes[name] = (
                model.state()
            )
            averages[name] = model.gathered_average()
            if name != TRANSFORMER and model.average is not None:
                tensors[_file("average", name)] = averages[name]
            for sigma_rel, average in model.profiles.items():
                profiles[sigma_rel] = gather_shards(average.averages, model.module)
        ranks = agreement.gathered([random_state()])
        tensors["random"] = {
            f"rank{rank}.{name}": tensor
            for rank, state in enumerate(ranks)
            for name, tensor in state.items()
        }
        values = {
            "progress": self.progress.to_json(),
            "positions": agreement.gathered([self.progress.position.to_json()]),  # per process
            **notes.pop(TRANSFORMER, {}),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "metrics": self.metrics.state_dict(),
            "options": options,
        }
        if notes:
            values["models"] = notes
        return Snapshot(tensors, averages.get(TRANSFORMER, {}), values, profiles)

    def restore(self, folder: Path, averages: Tensors, rank: int) -> None:
        """Load the state of a checkpoint. Every process calls this.

        Args:
            folder: the folder that `Snapshot.write` made.

        Raises:
            ValueError: if it is the state of other models or optimizers.
        """
        values = read_json(folder / VALUES)
        notes = dict(values.get("models", {}))
        if "optimizer" in values:
            notes[TRANSFORMER] = values
        if notes.keys() != self.models.keys():
            raise ValueError(
                f"{folder.parent} holds the training state of {', '.join(sorted(notes))}, but this "
                f"run trains {', '.join(sorted(self.models))}. Resume it with the options it had."
            )
        for name, model in self.models.items():
            average = averages
            if name != TRANSFORMER:
                # If the saved run kept no average, one starts from the weights.
                kept = notes[name]["ema_updates"] is not None
                average = _load(folder, "average" if kept else "model", name)
            model.load_state(
                _load(folder, "model", name),
                _load(folder, "optimizer", name),
                average,
                notes[name],
            )
            for sigma_rel, profile in model.profiles.items():
                tensors = load_file(folder / f"{_profile(sigma_rel)}.safetensors")
                profile.load(tensors, notes[name]["ema_updates"], model.module)
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])
        self.metrics.load_state_dict(values["metrics"])
        self.progress = Progress.from_json(values["progress"])
        set_random_state(
            {
                name.removeprefix(f"rank{rank}."): tensor
                for name, tensor in load_file(folder / "random.safetensors").items()
                if name.startswith(f"rank{rank}.")
            }
        )


def _file(kind: str, model: str) -> str:
    """Return the name of a file of a model's tensors, without its suffix."""
    return kind if model == TRANSFORMER else f"{kind}-{model}"


def _profile(sigma_rel: float) -> str:
    """Return the name of the file of an average for post-hoc EMA, without its suffix."""
    return f"ema-{sigma_rel}"


def _load(folder: Path, kind: str, model: str) -> Tensors:
    path = folder / f"{_file(kind, model)}.safetensors"
    return load_file(path) if kind == "optimizer" else load_finite(path)


def saved_options(folder: Path) -> dict[str, Any]:
    """Return the options of the run that wrote a state."""
    return read_json(folder / VALUES)["options"]


def random_state() -> Tensors:
    """Return the state of the process's global generators: PyTorch's, CUDA's, NumPy's, Python's.

    Data, noise and timesteps do not depend on them; dropout within the model does.
    """
    _, keys, index, has_gauss, gauss = np.random.get_state()
    version, integers, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "numpy_gauss": torch.tensor([index, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor([version, *integers]),
    }
    if gauss_next is not None:
        state["python_gauss"] = torch.tensor([gauss_next], dtype=torch.float64)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Tensors) -> None:
    """Load what `random_state` returned. A process that is new since then has an empty state."""
    if not state:
        return
    torch.set_rng_state(state["torch"])
    index, has_gauss, gauss = state["numpy_gauss"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(index), int(has_gauss), gauss))
    version, *integers = state["python"].tolist()
    gauss_next = state["python_gauss"].item() if "python_gauss" in state else None
    random.setstate((version, tuple(integers), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
