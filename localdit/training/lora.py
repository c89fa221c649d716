"""Training adapters on a frozen model: LoRA (Hu et al., 2022)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn

from localdit.checkpoint.reading import few
from localdit.core.diffusion import prediction_type_of

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel

# Attention within the picture and to the text, feed-forward, values of the global context.
TARGETS = ("to_qkv", "to_q", "to_k", "to_v", "to_out.0", "to_global_kv",
           "ff.net.0.proj", "ff.net.2")  # fmt: skip
NAME = "default"  # of the adapter, within the transformer
WEIGHTS = "pytorch_lora_weights.safetensors"  # as Diffusers calls them
BASE = "base.json"


def add_adapters(transformer: LocalDiTTransformer2DModel, args: argparse.Namespace) -> None:
    """Freeze a transformer and put the adapters in that `--lora-rank` and its like ask for.

    They start without effect: one half of each is zero.

    Raises:
        ValueError: if a target is no layer that can have an adapter, or the base was trained to
            predict something else.
    """
    from peft import LoraConfig

    _require_same_prediction(args.transformer, args.prediction_type)
    transformer.requires_grad_(False)
    settings = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_targets(transformer, args.lora_target_modules),
    )
    transformer.add_adapter(settings, NAME)


def _targets(transformer: nn.Module, names: Sequence[str] | None) -> list[str]:
    """The layers to adapt, by the ends of their names.

    Raises:
        ValueError: if a name is the end of none, or that of something else as well.
    """
    layers: dict[str, nn.Module] = dict(transformer.named_modules())
    ends = {
        target: [m for name, m in layers.items() if f".{name}".endswith(f".{target}")]
        for target in names or TARGETS
    }
    if names is None:
        return [target for target, found in ends.items() if found]
    for target, found in ends.items():
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            linear = {
                name.split(".", 2)[-1] if name.startswith("transformer_blocks.") else name: None
                for name, module in layers.items()
                if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"--lora-target-modules {target} is not the end of the names of linear layers; "
                f"those of this transformer are {', '.join(linear)}."
            )
    return list(names)


def _require_same_prediction(source: Path, prediction_type: str) -> None:
    """Raise ValueError where the scheduler beside a transformer tells that it predicts otherwise.

    Adapters change what a model draws; they don't teach it to predict something else.
    """
    file = source / "../scheduler/scheduler_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    given = prediction_type_of({"prediction_type": prediction_type, **config})
    if given != prediction_type:
        raise ValueError(
            f"--prediction-type is {prediction_type}, but {source} comes with a scheduler for "
            f"{given}: give --prediction-type {given}."
        )


@dataclass
class AdapterFolder:
    """What makes a folder of averaged adapters that `load_lora_weights` reads.

    Attributes:
        transformer: the one in training, with its adapters.
        source: where the frozen base came from.
        fingerprint: SHA-256 of the base's weights.
    """

    transformer: LocalDiTTransformer2DModel
    source: Path
    fingerprint: str

    def write(self, folder: Path, averages: Mapping[str, torch.Tensor]) -> None:
        """Write the adapters, and whose they are; weights of the base are left out."""
        from localdit.pipelines import LocalDiTPipeline

        LocalDiTPipeline.save_lora_weights(
            folder,
            {name: averages[parameter].contiguous() for name, parameter in self._names().items()},
            weight_name=WEIGHTS,
            transformer_lora_adapter_metadata=self.transformer.peft_config[NAME].to_dict(),
        )
        base = {"transformer": str(self.source), "sha256": self.fingerprint}
        text = json.dumps(base, indent=2) + "\n"
        (folder / BASE).write_text(text, encoding="utf-8")

    def averages_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """The averages that `write` wrote, by the names of the parameters.

        Raises:
            ValueError: if they are of another base, or of adapters of other layers.
        """
        base: dict[str, Any] = json.loads((folder / BASE).read_text(encoding="utf-8"))
        if base["sha256"] != self.fingerprint:
            raise ValueError(
                f"{folder} holds adapters of {base['transformer']}, whose weights are not those of "
                f"--transformer {self.source}. Name the same ones."
            )
        tensors = load_file(folder / WEIGHTS)
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
        settings = self.transformer.peft_config[NAME]
        return (
            f"Adapters of rank {settings.r} on {len(self._names()) // 2} layers: {trained:,} "
            f"parameters are trained, {frozen:,} of {self.source} are frozen"
        )

    def _names(self) -> dict[str, str]:
        """The parameters of the adapters, by their names in a file."""
        return {
            name.replace(f".{NAME}.", "."): name
            for name, _ in self.transformer.named_parameters()
            if ".lora_" in name
        }
