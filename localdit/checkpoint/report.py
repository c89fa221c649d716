"""What a checkpoint was found to hold, and what was made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds, and what loading makes of it.

    Attributes:
        path: the file.
        kind: "safetensors" or "torch".
        dtype: dtype of its live tensors, e.g. "float32"; the widest, where they differ.
        wrapper: key of the dict in which a `.pt` keeps its state dict, or None.
        prefix: what was stripped from the front of all names, e.g. "module.".
        config: configuration of the model.
        live_values: number of values that the model uses.
        dead_values: number of values that it has no use for: stale copies of projections.
        dead_names: the tensors they are in, as the file names them.
        zeroed_layers: layers whose relative position bias the file lacks: zero.
        folded_layers: layers whose untrained global context was folded to its expectation.
        drawn_layers: layers whose untrained global context was drawn from a seed.
    """

    path: Path
    kind: str
    dtype: str
    wrapper: str | None
    prefix: str
    config: dict[str, Any]
    live_values: int
    dead_values: int
    dead_names: tuple[str, ...]
    zeroed_layers: tuple[int, ...]
    folded_layers: tuple[int, ...]
    drawn_layers: tuple[int, ...]

    def __str__(self) -> str:
        """One line of prose."""
        heads = self.config["num_attention_heads"], self.config["attention_head_dim"]
        origin = f", under {self.wrapper!r}" if self.wrapper else ""
        origin += f", names without {self.prefix!r}" if self.prefix else ""
        parts = [
            f"{self.path} ({self.kind}, {self.dtype}{origin}): "
            f"{self.config['num_layers']} layers of {heads[0]} x {heads[1]} channels, "
            f"windows of {self.config['window_size']}, {self.live_values:,} live values",
        ]
        if self.dead_names:
            parts.append(
                f"{self.dead_values:,} dead values dropped "
                f"({len(self.dead_names):,} tensors, as {self.dead_names[0]})"
            )
        if self.folded_layers:
            parts.append(
                "untrained global context folded to its expectation, half of the local output, in "
                f"{len(self.folded_layers)} layers"
            )
        if self.drawn_layers:
            parts.append(f"global context drawn at random in {len(self.drawn_layers)} layers")
        if self.zeroed_layers:
            parts.append(f"relative position bias zero in {len(self.zeroed_layers)} layers")
        if self.config["use_global"] and not self.drawn_layers:
            parts.append("global context trained")
        return "; ".join(parts) + "."
