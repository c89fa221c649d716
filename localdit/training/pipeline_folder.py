"""What a run leaves: a pipeline's folder with averaged weights, its frozen parts linked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from localdit.pipelines.saving import TRANSFORMER
from localdit.training.run_folder import link_or_copy

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from localdit.models import LocalDiTTransformer2DModel


@dataclass
class PipelineFolder:
    """What makes a pipeline of averaged weights.

    Attributes:
        transformer: the one in training; its configuration is used, not its weights.
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

        Text encoder, tokenizer and VAE are links to where they came from; `cp -rL` makes a copy
        that stands alone.
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
        """The averages that `write` wrote: the transformer's weights, sharded or not."""
        weights: dict[str, torch.Tensor] = {}
        for file in sorted((folder / "transformer").glob("*.safetensors")):
            weights |= load_file(file)
        return weights


def with_weights(
    transformer: LocalDiTTransformer2DModel, weights: Mapping[str, torch.Tensor]
) -> LocalDiTTransformer2DModel:
    """A second transformer of the same shape and adapters around other weights, in evaluation mode.

    The weights are shared, not copied; they bring their device.
    """
    # Weights are drawn on the way, and thrown away: not from the numbers that training will draw.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        second = type(transformer).from_config(transformer.config)
        for name, settings in getattr(transformer, "peft_config", {}).items():
            second.add_adapter(copy.deepcopy(settings), name)
    second.load_state_dict(weights, assign=True)
    second.requires_grad_(False)
    return second.to(next(iter(weights.values())).device).eval()
