"""The denoisers that are compared, and the cases they are measured in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["inference", "training"]
Mode = Literal["eager", "compiled"]
Depth = Literal["equal", "own"]

HEADS, HEAD_DIM, TEXT_CHANNELS = 16, 72, 4096
PIXELS_PER_TOKEN = 16  # along a side


@dataclass(frozen=True)
class Denoiser:
    """A model in the comparison."""

    name: str
    own_layers: int  # layers of the released model
    period: int = 1  # blocks until the window shift repeats
    use_global: bool | None = None  # None if it is not a LocalDiT


PIXART = Denoiser("PixArt", own_layers=28)
LOCALDIT = {
    "local": Denoiser("LocalDiT", own_layers=18, period=4, use_global=False),
    "global": Denoiser("LocalDiT with global context", own_layers=18, period=4, use_global=True),
}
DENOISERS = {denoiser.name: denoiser for denoiser in (*LOCALDIT.values(), PIXART)}


@dataclass(frozen=True)
class Case:
    """One setting in which all denoisers are measured, in turns.

    Attributes:
        pixels: side of the square pictures, a multiple of 16.
        dtype: "float32" or "bfloat16". In inference, the dtype of the weights. In training,
            bfloat16 means mixed precision, with weights and AdamW in float32.
        task: one forward pass under `torch.inference_mode`, or one training step: forward pass,
            backward pass and AdamW.
        mode: eager, or with each block compiled.
        depth: "equal" gives every model `layers` blocks, "own" as many as its released model.
        layers: with equal depth, the number of blocks. With own depth, the cost is derived from
            two models that differ by this number of blocks, rounded up so that each kind of block
            occurs equally often; None measures the own depth itself.
        contexts: the LocalDiTs to compare with PixArt, keys of `LOCALDIT`.
        device: "cpu" or "cuda".
        repeats, warm_up: counted runs of each model, and uncounted runs before them.
    """

    pixels: int
    dtype: str = "float32"
    task: Task = "inference"
    mode: Mode = "eager"
    depth: Depth = "equal"
    layers: int | None = 2
    contexts: tuple[str, ...] = ("local",)
    batch_size: int = 1
    text_tokens: int = 120
    device: str = "cpu"
    repeats: int = 5
    warm_up: int = 2

    @property
    def tokens(self) -> int:
        """Image tokens of one image."""
        return (self.pixels // PIXELS_PER_TOKEN) ** 2

    @property
    def derived(self) -> bool:
        """Return True if costs are derived from models of other depths."""
        return self.depth == "own" and self.layers is not None

    @property
    def denoisers(self) -> list[Denoiser]:
        """Models of the case, PixArt last."""
        return [*(LOCALDIT[context] for context in self.contexts), PIXART]

    def target_layers(self, denoiser: Denoiser) -> int:
        """Return the depth whose cost is reported."""
        if self.depth == "own":
            return denoiser.own_layers
        assert self.layers is not None
        return self.layers

    def measured_layers(self, denoiser: Denoiser) -> list[int]:
        """Return the depths to run; if there are two, they differ by blocks of every kind."""
        if not self.derived:
            return [self.target_layers(denoiser)]
        assert self.layers is not None
        more = -(-self.layers // denoiser.period) * denoiser.period
        # With no blocks the text projection would get no gradient, and AdamW would skip it.
        fewer = 1 if self.task == "training" else 0
        return [fewer, fewer + more]
