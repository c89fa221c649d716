"""LoRA adapters (Hu et al., 2022) on the transformer in training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel

# Attention within the picture and to the text, feed-forward, values of the global context.
TARGETS = ("to_qkv", "to_q", "to_k", "to_v", "to_out.0", "to_global_kv",
           "ff.net.0.proj", "ff.net.2")  # fmt: skip
ADAPTER = "default"  # of the adapter, within the transformer


def add_adapters(transformer: LocalDiTTransformer2DModel, args: argparse.Namespace) -> None:
    """Freeze a transformer and add the adapters that the options ask for.

    They start without effect: one half of each is zero.

    Raises:
        ValueError: if a target is no layer that can have an adapter.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    settings = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=_targets(transformer, args.lora_target_modules),
    )
    transformer.add_adapter(settings, ADAPTER)


def _targets(transformer: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Return the layers to adapt, by the ends of their names.

    Raises:
        ValueError: if a name is the end of no linear layer, or also of something else.
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
