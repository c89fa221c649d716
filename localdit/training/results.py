"""The folders that a run leaves: a pipeline with averaged weights, or adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from localdit.checkpoint.reading import few
from localdit.pipelines import LocalDiTPipeline
from localdit.pipelines.saving import TRANSFORMER
from localdit.training.adapters import ADAPTER
from localdit.training.checkpointing import link_or_copy

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from localdit.models import LocalDiTTransformer2DModel

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # Diffusers' name
BASE = "base.json"


class ResultFolder(Protocol):
    """Writes averaged weights into a folder for inference, and reads them again."""

    def write(self, folder: Path, averages: Mapping[str, torch.Tensor]) -> None:
        """Write the averages of the trained parameters, under their names."""

    def averages_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the averages that `write` wrote."""


@dataclass
class PipelineFolder:
    """Write averaged weights as the folder of a pipeline, with the frozen parts linked.

    Attributes:
        transformer: in training; its configuration is used, not its weights.
        scheduler: to sample with.
        encoders: folders of "tokenizer", "text_encoder" and "vae" on this machine.
        classes: library and class of each of them.
    """

    transformer: LocalDiTTransformer2DModel
    scheduler: SchedulerMixin
    encoders: Mapping[str, Path]
    classes: Mapping[str, list[str]]

    def write(self, folder: Path, averages: Mapping[str, torch.Tensor]) -> None:
        """Write a folder that `LocalDiTPipeline.from_pretrained` loads.

        Text encoder, tokenizer and VAE are links to their sources; `cp -rL` makes a copy that
        stands alone.
        """
        with_weights(self.transformer, averages).save_pretrained(folder / "transformer")
        self.scheduler.save_pretrained(folder / "scheduler")
        for name, source in self.encoders.items():
            link_or_copy(source, folder / name)
        index = {
            "_class_name": "LocalDiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", type(self.scheduler).__name__],
            "transformer": TRANSFORMER,
            **self.classes,
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model_index.json").write_text(text, encoding="utf-8")

    def averages_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the averages that `write` wrote, sharded or not."""
        weights: dict[str, torch.Tensor] = {}
        for file in sorted((folder / "transformer").glob("*.safetensors")):
            weights |= load_file(file)
        return weights


def with_weights(
    transformer: LocalDiTTransformer2DModel, weights: Mapping[str, torch.Tensor]
) -> LocalDiTTransformer2DModel:
    """Return a transformer of the same shape and adapters with other weights, for evaluation.

    The weights are shared, not copied, and keep their device.
    """
    # This draws weights and drops them. They must not come from the numbers that training draws.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        second = type(transformer).from_config(transformer.config)
        for name, settings in getattr(transformer, "peft_config", {}).items():
            second.add_adapter(copy.deepcopy(settings), name)
    second.load_state_dict(weights, assign=True)
    second.requires_grad_(False)
    return second.to(next(iter(weights.values())).device).eval()


@dataclass
class AdapterFolder:
    """Write averaged adapters as a folder that `load_lora_weights` reads.

    Attributes:
        transformer: the one in training, with its adapters.
        source: where the frozen base came from.
        fingerprint: SHA-256 of the base's weights.
    """

    transformer: LocalDiTTransformer2DModel
    source: Path
    fingerprint: str

    def write(self, folder: Path, averages: Mapping[str, torch.Tensor]) -> None:
        """Write the adapters and the fingerprint of their base, whose weights are left out."""
        LocalDiTPipeline.save_lora_weights(
            folder,
            {name: averages[parameter].contiguous() for name, parameter in self._names().items()},
            weight_name=LORA_WEIGHTS,
            transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
        )
        base = {"transformer": str(self.source), "sha256": self.fingerprint}
        text = json.dumps(base, indent=2) + "\n"
        (folder / BASE).write_text(text, encoding="utf-8")

    def averages_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the averages that `write` wrote, by the names of the parameters.

        Raises:
            ValueError: if they belong to another base or to other layers.
        """
        base: dict[str, Any] = json.loads((folder / BASE).read_text(encoding="utf-8"))
        if base["sha256"] != self.fingerprint:
            raise ValueError(
                f"{folder} holds adapters of {base['transformer']}, whose weights are not those of "
                f"--transformer {self.source}. Name the same ones."
            )
        tensors = load_file(folder / LORA_WEIGHTS)
        names = {f"transformer.{name}": parameter for name, parameter in self._names().items()}
        if names.keys() != tensors.keys():
            differing = sorted(names.keys() ^ tensors.keys())
            raise ValueError(f"{folder} holds adapters of other layers: {few(differing)} differ.")
        return {names[name]: tensor for name, tensor in tensors.items()}

    def __str__(self) -> str:
        trained, frozen = (
            sum(p.numel() for p in self.transformer.parameters() if p.requires_grad == wanted)
            for wanted in (True, False)
        )
        settings = self.transformer.peft_config[ADAPTER]
        return (
            f"Adapters of rank {settings.r} on {len(self._names()) // 2} layers: {trained:,} "
            f"parameters are trained, {frozen:,} of {self.source} are frozen"
        )

    def _names(self) -> dict[str, str]:
        """Return the parameters of the adapters, by their names in a file."""
        return {
            name.replace(f".{ADAPTER}.", "."): name
            for name, _ in self.transformer.named_parameters()
            if ".lora_" in name
        }
