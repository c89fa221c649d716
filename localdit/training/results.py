"""The results of a run: a pipeline with averaged weights, or LoRA adapters (Hu et al., 2022)."""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from localdit.checkpoint.loading import empty_model
from localdit.checkpoint.reading import few, load_finite
from localdit.files import LORA_BASE, LORA_WEIGHTS, read_json, write_json
from localdit.models.configuration import public_arguments, resolve_layer_types
from localdit.pipelines import LocalDiTPipeline
from localdit.pipelines.saving import TRANSFORMER
from localdit.training.checkpointing import read_manifest

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel
    from localdit.training.methods import Sampling

# Attention within the picture and to the text, feed-forward, values of the global context.
TARGETS = ("to_qkv", "to_q", "to_k", "to_v", "to_out.0", "to_global_kv",
           "ff.net.0.proj", "ff.net.2")  # fmt: skip
ADAPTER = "default"  # of the adapter, within the transformer


@dataclass
class PipelineFolder:
    """Writes averaged weights as the folder of a pipeline, with the frozen parts linked."""

    transformer: LocalDiTTransformer2DModel  # in training; only its configuration is used
    sampling: Sampling  # the scheduler, and the steps and guidance that suit the model
    encoders: Mapping[str, Path]  # folders of "tokenizer", "text_encoder" and "vae" on this machine
    classes: Mapping[str, list[str]]  # library and class of each encoder
    source: Path | None  # where the weights that training starts from are; None if they are new
    whole_words: bool = False  # whether the text encoder understands only whole words

    def write(self, folder: Path, averages: Mapping[str, torch.Tensor]) -> None:
        """Write a folder that `LocalDiTPipeline.from_pretrained` loads.

        Text encoder, tokenizer and VAE are links to their sources. `cp -rL` makes a copy without
        links.
        """
        with_weights(self.transformer, averages).save_pretrained(folder / "transformer")
        scheduler = self.sampling.scheduler
        scheduler.save_pretrained(folder / "scheduler")
        for name, source in self.encoders.items():
            link_or_copy(source, folder / name)
        index = {
            "_class_name": "LocalDiTPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", type(scheduler).__name__],
            "transformer": TRANSFORMER,
            **self.classes,
            **asdict(self.sampling.settings),
            "whole_words": self.whole_words,
        }
        write_json(folder / "model_index.json", index)

    def averages_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the averages that `write` wrote, sharded or not; other files are not read."""
        saved = read_json(folder / "transformer/config.json")
        there = shape_of(_without_weights(self.transformer, saved))
        here = shape_of(self.transformer)
        differing = [
            f"{name} is {there[name]} there and {value} here"
            for name, value in here.items()
            if there[name] != value
        ]
        if differing:
            raise ValueError(
                f"{folder} is of a transformer of another shape: {'; '.join(differing)}. Resume "
                "with its shape, or start another run from its weights with --transformer."
            )
        weights: dict[str, torch.Tensor] = {}
        for name in read_manifest(folder).sums:
            if name.startswith("transformer/") and name.endswith(".safetensors"):
                weights |= load_finite(folder / name)
        return weights

    def __str__(self) -> str:
        whole = _without_weights(self.transformer)  # the one in training may be sharded
        count = sum(parameter.numel() for parameter in whole.parameters())
        origin = "all new" if self.source is None else f"from {self.source}"
        return f"{count:,} parameters are trained, {origin}"


def link_or_copy(folder: Path, target: Path) -> None:
    """Make `target` a link to a folder, or a copy where the file system has no links."""
    try:
        target.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, target)


def with_weights(
    transformer: LocalDiTTransformer2DModel, weights: Mapping[str, torch.Tensor]
) -> LocalDiTTransformer2DModel:
    """Return a transformer of the same shape and adapters with other weights, for evaluation.

    The weights are shared, not copied, and keep their device.
    """
    second = _without_weights(transformer)
    second.load_state_dict(weights, assign=True)
    second.requires_grad_(False)
    return second.to(next(iter(weights.values())).device).eval()


def shape_of(transformer: LocalDiTTransformer2DModel) -> dict[str, Any]:
    """Return the settings that tell what the weights compute; stages change the others."""
    config = transformer.config
    kinds = resolve_layer_types(config.layer_types, config.num_layers, config.use_global)
    resolved = {
        "layer_types": kinds,
        "use_additional_conditions": transformer.use_additional_conditions,
    }
    public = public_arguments(config)
    del public["sample_size"]
    return public | resolved


def _without_weights(
    transformer: LocalDiTTransformer2DModel, config: Mapping[str, Any] | None = None
) -> LocalDiTTransformer2DModel:
    """Return a transformer of the same adapters, and the same or another shape, without weights."""

    def make() -> LocalDiTTransformer2DModel:
        second = type(transformer).from_config(config or transformer.config)
        for name, settings in getattr(transformer, "peft_config", {}).items():
            second.add_adapter(copy.deepcopy(settings), name)
        return second

    return empty_model(make)


def add_adapters(transformer: LocalDiTTransformer2DModel, args: argparse.Namespace) -> None:
    """Freeze a transformer and add the adapters that the options ask for.

    They start without effect, because one half of each is zero.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    settings = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_targets(transformer, args.lora_target_modules),
    )
    transformer.add_adapter(settings, ADAPTER)


def layers_called(transformer: nn.Module, target: str) -> dict[str, nn.Module]:
    """Return the layers whose names end with a target of adapters, by their names."""
    layers: dict[str, nn.Module] = dict(transformer.named_modules())
    return {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}


def in_any_block(name: str) -> str:
    """Return the name of a layer without the number of its block."""
    return name.split(".", 2)[-1] if name.startswith("transformer_blocks.") else name


def _targets(transformer: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Return the ends of the names of the layers to adapt."""
    ends = {target: layers_called(transformer, target) for target in names or TARGETS}
    if names is None:
        return [target for target, found in ends.items() if found]
    for target, found in ends.items():
        if not found or not all(isinstance(module, nn.Linear) for module in found.values()):
            linear = {
                in_any_block(name): None
                for name, module in transformer.named_modules()
                if isinstance(module, nn.Linear)
            }
            raise ValueError(
                f"--lora-target-modules {target} is not the end of the names of linear layers; "
                f"those of this transformer are {', '.join(linear)}."
            )
    return list(names)


@dataclass
class AdapterFolder:
    """Writes averaged adapters as a folder that `load_lora_weights` reads."""

    transformer: LocalDiTTransformer2DModel  # in training, with its adapters
    source: Path  # the frozen base
    fingerprint: str  # SHA-256 of the base's weights
    sampling: Sampling  # the steps and guidance that suit the result, and the scheduler for them

    def write(self, folder: Path, averages: Mapping[str, torch.Tensor]) -> None:
        """Write the adapters and the fingerprint of their base, without the weights of the base.

        Few-step adapters come with the scheduler for them.
        """
        LocalDiTPipeline.save_lora_weights(
            folder,
            {name: averages[parameter].contiguous() for name, parameter in self._names().items()},
            weight_name=LORA_WEIGHTS,
            transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
        )
        base: dict[str, Any] = {"transformer": str(self.source), "sha256": self.fingerprint}
        if self.sampling.settings.few_steps:
            base |= asdict(self.sampling.settings)
            self.sampling.scheduler.save_pretrained(folder / "scheduler")
        write_json(folder / LORA_BASE, base)

    def averages_in(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the averages that `write` wrote, by the names of the parameters."""
        base = read_json(folder / LORA_BASE)
        if base["sha256"] != self.fingerprint:
            raise ValueError(
                f"{folder} holds adapters of {base['transformer']}, whose weights are not those of "
                f"--transformer {self.source}. Name the same base."
            )
        tensors = load_finite(folder / LORA_WEIGHTS)
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
        """Return the names of the adapters' parameters by their names in a file."""
        return {
            name.replace(f".{ADAPTER}.", "."): name
            for name, _ in self.transformer.named_parameters()
            if ".lora_" in name
        }


ResultFolder = PipelineFolder | AdapterFolder
