"""Everything that a training step changes, and how it is kept: tensors and JSON, no pickles."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from localdit.training import sharding
from localdit.training.data.order import Position, Step
from localdit.training.ema import ExponentialMovingAverage
from localdit.training.metrics import Metrics
from localdit.training.optimizer_state import load_optimizer_state, optimizer_state

if TYPE_CHECKING:
    from localdit.training.agreement import Agreement

Tensors = dict[str, torch.Tensor]
FILES = ("model", "optimizer", "random")  # .safetensors, beside state.json


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps taken, those that were skipped included.
        position: in the data of the current stage.
        skipped: steps that were skipped because a loss or gradient was not finite.
        broken: samples of the current epoch that turned out to be broken when they were read.
        data: fingerprint of the data that `position` is in.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    skipped: int = 0
    broken: int = 0
    data: str = ""

    def begin(self, data: str) -> None:
        """Stand at the beginning of a stage's data."""
        self.position, self.broken, self.data = Position(), 0, data

    def advance(self, step: Step, broken: int, skipped: bool) -> None:
        """Count a step, whose samples are behind us whether or not it was skipped."""
        self.step += 1
        self.skipped += skipped
        same_epoch = step.position.epoch == self.position.epoch
        self.broken = self.broken + broken if same_epoch else 0
        self.position = step.position

    def to_json(self) -> dict[str, Any]:
        """The progress in plain values."""
        return vars(self) | {"position": self.position.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """The inverse of `to_json`."""
        return cls(**values | {"position": Position.from_json(values["position"])})


@dataclass
class Snapshot:
    """A training state in full, on the CPU: what is written to a checkpoint."""

    tensors: dict[str, Tensors]  # by the name of the file
    averages: Tensors
    values: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write all but the averages, which have a place of their own in a checkpoint."""
        folder.mkdir()
        for name, tensors in self.tensors.items():
            save_file(tensors, folder / f"{name}.safetensors")
        text = json.dumps(self.values, indent=2) + "\n"
        (folder / "state.json").write_text(text, encoding="utf-8")


@dataclass
class TrainingState:
    """Everything that a training step changes.

    Attributes:
        model: the transformer as Accelerate prepared it.
        optimizer: as Accelerate prepared it.
        ema: averages of the transformer's weights, as far as they are trained.
        scaler: of gradients in float16, if there is one.
        metrics: what was measured since the last line was logged.
        progress: how far the run has come.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: ExponentialMovingAverage
    scaler: torch.amp.GradScaler | None
    metrics: Metrics
    progress: Progress

    def averaged_weights(self) -> Tensors:
        """The averaged weights in full, in every process; a call for all of them.

        Frozen ones are what they were. Nothing is copied where nothing is sharded.
        """
        averages = self.ema.averages
        return {
            name: sharding.whole_of(averages[name], parameter)
            if name in averages
            else sharding.whole(parameter.detach())
            for name, parameter in sharding.named_parameters(self.model)
        }

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and parameters of the transformer, sharded as they are."""
        return sharding.named_parameters(self.model)

    def snapshot(self, agreement: Agreement, options: dict[str, Any]) -> Snapshot:
        """Gather the state; a call for all processes, whose result is complete in the main one.

        The options of the run are kept with it.
        """
        optimizer, groups = optimizer_state(self.model, self.optimizer)
        ranks = agreement.gathered([random_state()])
        randomness = {
            f"rank{rank}.{name}": tensor
            for rank, tensors in enumerate(ranks)
            for name, tensor in tensors.items()
        }
        positions = agreement.gathered([self.progress.position.to_json()])
        values = {
            "progress": self.progress.to_json(),
            "positions": positions,  # of each process in the data
            "ema_updates": self.ema.updates,
            "optimizer": groups,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "metrics": self.metrics.state_dict(),
            "options": options,
        }
        tensors = {
            "model": sharding.model_state(self.model),
            "optimizer": optimizer,
            "random": randomness,
        }
        averages = sharding.gather_shards(self.ema.averages, self.model)
        return Snapshot(tensors, averages, values)

    def restore(self, folder: Path, averages: Tensors, rank: int) -> None:
        """Take over the state of a checkpoint; a call for all processes.

        Raises:
            ValueError: if it is the state of another model or optimizer.
        """
        values = _values(folder)
        files = {name: load_file(folder / f"{name}.safetensors") for name in FILES}
        sharding.load_model_state(self.model, files["model"])
        load_optimizer_state(self.model, self.optimizer, files["optimizer"], values["optimizer"])
        parameters = dict(sharding.named_parameters(self.model))
        for name, average in self.ema.averages.items():
            average.copy_(sharding.shard_of(averages[name], parameters[name]))
        self.ema.updates = values["ema_updates"]
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])
        self.metrics.load_state_dict(values["metrics"])
        self.progress = Progress.from_json(values["progress"])
        set_random_state(
            {
                name.removeprefix(f"rank{rank}."): tensor
                for name, tensor in files["random"].items()
                if name.startswith(f"rank{rank}.")
            }
        )


def saved_options(folder: Path) -> dict[str, Any]:
    """The options of the run that a state was saved in."""
    return _values(folder)["options"]


def _values(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def random_state() -> Tensors:
    """The state of the process's global generators: PyTorch's, CUDA's, NumPy's and Python's.

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
    """The inverse of `random_state`; nothing happens for an empty one, of a process added since."""
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
