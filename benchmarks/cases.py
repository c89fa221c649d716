"""The denoisers that are compared, and the cases they are measured in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["inference", "training"]
Mode = Literal["eager", "compiled"]
Depth = Literal["equal", "own"]

HEADS, HEAD_DIM = 16, 72
PIXELS_PER_TOKEN = 16  # along a side, of the released LocalDiT and of PixArt


@dataclass(frozen=True)
class Latents:
    """The inputs of a denoiser.

    Attributes:
        channels: channels of the latents.
        pixels: pixels along the side of a latent.
        patch_size: side of the square of latents that becomes a token.
        text_channels: channels of the text encoder's states.
    """

    channels: int
    pixels: int
    patch_size: int
    text_channels: int

    @property
    def pixels_per_token(self) -> int:
        """Pixels along the side of a token."""
        return self.pixels * self.patch_size


SDXL = Latents(channels=4, pixels=8, patch_size=2, text_channels=4096)  # and T5-XXL
COMPACT = Latents(channels=32, pixels=32, patch_size=1, text_channels=2304)  # and Gemma 2, 2B


@dataclass(frozen=True)
class Denoiser:
    """A model in the comparison."""

    name: str
    own_layers: int  # layers of the released model, or of the preset
    period: int = 1  # blocks until the window shift repeats
    use_global: bool | None = None  # None if it is not a LocalDiT
    latents: Latents = SDXL
    layer_types: str | None = None


PIXART = Denoiser("PixArt", own_layers=28)
SANA = Denoiser("Sana-0.6B", own_layers=28, latents=COMPACT)
RIVALS = {"pixart": PIXART, "sana": SANA}
LOCALDIT = {
    "local": Denoiser("LocalDiT", own_layers=18, period=4, use_global=False),
    "global": Denoiser("LocalDiT with global context", own_layers=18, period=4, use_global=True),
    "f32": Denoiser("LocalDiT f32", 18, period=4, use_global=False, latents=COMPACT),
    "pooled": Denoiser(
        "LocalDiT with pooled keys", 18, period=4, use_global=False, layer_types="local_pooled"
    ),
}
DENOISERS = {denoiser.name: denoiser for denoiser in (*LOCALDIT.values(), *RIVALS.values())}


@dataclass(frozen=True)
class Case:
    """One setting in which all denoisers are measured, in turns.

    Attributes:
        pixels: side of the square pictures, a multiple of each denoiser's pixels per token.
        dtype: "float32" or "bfloat16". In inference, the dtype of the weights. In training,
            bfloat16 means mixed precision, with weights and AdamW in float32.
        task: one forward pass under `torch.inference_mode`, or one training step: forward pass,
            backward pass and AdamW.
        mode: eager, or with each block compiled.
        depth: "equal" gives every model `layers` blocks, "own" as many as its released model.
        layers: with equal depth, the number of blocks. With own depth, the cost is derived from
            two models that differ by this number of blocks, rounded up so that each kind of block
            occurs equally often; None measures the own depth itself.
        against: the model to compare with, a key of `RIVALS`.
        contexts: the LocalDiTs to compare with it, keys of `LOCALDIT`.
        device: "cpu" or "cuda".
        repeats, warm_up: counted runs of each model, and uncounted runs before them.
    """

    pixels: int
    dtype: str = "float32"
    task: Task = "inference"
    mode: Mode = "eager"
    depth: Depth = "equal"
    layers: int | None = 2
    against: str = "pixart"
    contexts: tuple[str, ...] = ("local",)
    batch_size: int = 1
    text_tokens: int = 120
    device: str = "cpu"
    repeats: int = 5
    warm_up: int = 2

    @property
    def tokens(self) -> int:
        """Image tokens of one image, of 16 x 16 pixels each."""
        return (self.pixels // PIXELS_PER_TOKEN) ** 2

    @property
    def derived(self) -> bool:
        """Return True if costs are derived from models of other depths."""
        return self.depth == "own" and self.layers is not None

    @property
    def rival(self) -> Denoiser:
        """The model that the LocalDiTs are compared with."""
        return RIVALS[self.against]

    @property
    def denoisers(self) -> list[Denoiser]:
        """Models of the case, the rival last."""
        return [*(LOCALDIT[context] for context in self.contexts), self.rival]

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
