"""Everything that a training step changes, and its files: tensors and JSON, no pickles."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from localdit.training.data.order import Position, Step
from localdit.training.metrics import Metrics
from localdit.training.processes import Agreement
from localdit.training.trained_model import Tensors, TrainedModel

# The model that pipelines sample with. Its files bear no name, as those of a run that trains no
# other model always did; its averages are the pipeline or the adapters in a checkpoint.
TRANSFORMER = "transformer"


@dataclass
class Progress:
    """The position of a run.

    Attributes:
        step: optimizer steps taken, including those that were skipped.
        position: position in the data of the current stage.
        skipped: steps that were skipped because a loss or gradient was not finite.
        broken: samples of the current epoch that turned out to be broken when they were read.
        data: fingerprint of the data that `position` refers to.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    skipped: int = 0
    broken: int = 0
    data: str = ""

    def begin(self, data: str) -> None:
        """Go to the beginning of a stage's data."""
        self.position, self.broken, self.data = Position(), 0, data

    def advance(self, step: Step, broken: int, skipped: bool) -> None:
        """Count a step. Its samples are used up whether or not it was skipped."""
        self.step += 1
        self.skipped += skipped
        same_epoch = step.position.epoch == self.position.epoch
        self.broken = self.broken + broken if same_epoch else 0
        self.position = step.position

    def to_json(self) -> dict[str, Any]:
        """Return the progress in plain values."""
        return vars(self) | {"position": self.position.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Return the progress that `to_json` described."""
        return cls(**values | {"position": Position.from_json(values["position"])})


@dataclass
class Snapshot:
    """A full training state on the CPU: what is written to a checkpoint.

    Attributes:
        tensors: by the name of their file.
        averages: of the transformer, which the checkpoint stores as a pipeline or as adapters.
        values: everything else, ready for JSON.
    """

    tensors: dict[str, Tensors]
    averages: Tensors
    values: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write everything except `averages`."""
        folder.mkdir()
        for name, tensors in self.tensors.items():
            save_file(tensors, folder / f"{name}.safetensors")
        text = json.dumps(self.values, indent=2) + "\n"
        (folder / "state.json").write_text(text, encoding="utf-8")


@dataclass
class TrainingState:
    """Everything that a training step changes; frozen models are not part of it.

    A checkpoint holds `model.safetensors` and `optimizer.safetensors` of the transformer,
    `model-NAME.safetensors`, `optimizer-NAME.safetensors` and `average-NAME.safetensors` of each
    other model, `random.safetensors`, and `state.json`.

    Attributes:
        models: the models in training, by name.
        scaler: of float16 gradients, if there is one.
        metrics: measurements since the last line was logged.
        progress: the position of the run.
    """

    models: dict[str, TrainedModel]
    scaler: torch.amp.GradScaler | None
    metrics: Metrics
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
        """Use this learning rate for the coming steps of all models."""
        for model in self.models.values():
            for group in model.optimizer.param_groups:
                group["lr"] = value

    def snapshot(self, agreement: Agreement, options: dict[str, Any]) -> Snapshot:
        """Gather the state. Collective; the result is complete on the main process.

        The options of the run are stored with it.
        """
        tensors: dict[str, Tensors] = {}
        notes: dict[str, dict[str, Any]] = {}
        averages: dict[str, Tensors] = {}
        for name, model in self.models.items():
            tensors[_file("model", name)], tensors[_file("optimizer", name)], notes[name] = (
                model.state()
            )
            averages[name] = model.gathered_average()
            if name != TRANSFORMER and model.average is not None:
                tensors[_file("average", name)] = averages[name]
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
        return Snapshot(tensors, averages.get(TRANSFORMER, {}), values)

    def restore(self, folder: Path, averages: Tensors, rank: int) -> None:
        """Load the state of a checkpoint. Every process calls this.

        Args:
            folder: the one that `Snapshot.write` made.
            averages: of the transformer.
            rank: number of this process.

        Raises:
            ValueError: if it is the state of other models or optimizers.
        """
        values = _values(folder)
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
                # A model that had no average before starts one from its weights.
                kept = notes[name]["ema_updates"] is not None
                average = _load(folder, "average" if kept else "model", name)
            model.load_state(
                _load(folder, "model", name),
                _load(folder, "optimizer", name),
                average,
                notes[name],
            )
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
    """Return the name, without its ending, of a file of tensors of a model."""
    return kind if model == TRANSFORMER else f"{kind}-{model}"


def _load(folder: Path, kind: str, model: str) -> Tensors:
    return load_file(folder / f"{_file(kind, model)}.safetensors")


def saved_options(folder: Path) -> dict[str, Any]:
    """Return the options of the run that wrote a state."""
    return _values(folder)["options"]


def _values(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


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
    """Set what `random_state` returned. An empty state, of a process added since, does nothing."""
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
