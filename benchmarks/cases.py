"""What is measured: denoisers, cases, and one run of a denoiser in a case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from localdit.machine import with_random_weights

Task = Literal["inference", "training"]
Mode = Literal["eager", "compiled"]
Depth = Literal["equal", "own"]

HEADS, HEAD_DIM, TEXT_CHANNELS = 16, 72, 4096
PIXELS_PER_TOKEN = 16  # along a side


@dataclass(frozen=True)
class Denoiser:
    """One of the models that are compared."""

    name: str
    own_layers: int  # of the released model
    period: int = 1  # blocks after which they are all alike again: LocalDiT's windows shift
    use_global: bool | None = None  # None: not a LocalDiT


PIXART = Denoiser("PixArt", own_layers=28)
LOCALDIT = {
    "local": Denoiser("LocalDiT", own_layers=18, period=4, use_global=False),
    "global": Denoiser("LocalDiT with global context", own_layers=18, period=4, use_global=True),
}
DENOISERS = {denoiser.name: denoiser for denoiser in (*LOCALDIT.values(), PIXART)}


@dataclass(frozen=True)
class Case:
    """What the denoisers are measured at, in turns.

    Attributes:
        pixels: side of the square pictures, a multiple of 16.
        dtype: "float32" or "bfloat16": in inference that of the weights; in training bfloat16 is
            mixed, with weights and AdamW in float32.
        task: one forward pass under `torch.inference_mode`, or a step of training: forward and
            backward pass and AdamW.
        mode: as it is, or with each block compiled.
        depth: all with `layers` blocks, or each with as many as its released model.
        layers: with equal depth, the blocks of each. With own depth, how many blocks two models
            differ by that are measured in its place and from which its cost is derived, rounded up
            so that each kind of block is among them as often; None measures the own depth itself.
        contexts: the LocalDiTs beside PixArt, keys of `LOCALDIT`.
        device: "cpu" or "cuda".
        repeats, warm_up: runs of each that count, and runs before them that do not.
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
        """Image tokens of one picture."""
        return (self.pixels // PIXELS_PER_TOKEN) ** 2

    @property
    def derived(self) -> bool:
        """Whether the costs are derived from models of other depths."""
        return self.depth == "own" and self.layers is not None

    @property
    def denoisers(self) -> list[Denoiser]:
        """The models of the case, PixArt last."""
        return [*(LOCALDIT[context] for context in self.contexts), PIXART]

    def target_layers(self, denoiser: Denoiser) -> int:
        """The depth whose cost is told."""
        if self.depth == "own":
            return denoiser.own_layers
        assert self.layers is not None
        return self.layers

    def measured_layers(self, denoiser: Denoiser) -> list[int]:
        """The depths that are run for it, of which two differ by blocks of every kind."""
        if not self.derived:
            return [self.target_layers(denoiser)]
        assert self.layers is not None
        more = -(-self.layers // denoiser.period) * denoiser.period
        # Without blocks nothing leads back to what projects the text: no gradients, no AdamW.
        fewer = 1 if self.task == "training" else 0
        return [fewer, fewer + more]


def make_model(denoiser: Denoiser, layers: int, case: Case) -> Any:
    """A model of small random weights, without size conditions."""
    import torch

    training = case.task == "training"
    model = with_random_weights(
        lambda: _model_class(denoiser)(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            cross_attention_dim=HEADS * HEAD_DIM,
            caption_channels=TEXT_CHANNELS,
            out_channels=4,
            num_layers=layers,
            sample_size=case.pixels // 8,
            use_additional_conditions=False,
            **({} if denoiser.use_global is None else {"use_global": denoiser.use_global}),
        ),
        torch.float32 if training else getattr(torch, case.dtype),
        case.device,
    )
    return model.train(training)


def _model_class(denoiser: Denoiser) -> Any:
    if denoiser.use_global is None:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel
    from localdit.models import LocalDiTTransformer2DModel

    return LocalDiTTransformer2DModel


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )


def compile_blocks(model: Any) -> None:
    """Have each block compiled at its first call."""
    if not len(model.transformer_blocks):
        return
    if model._repeated_blocks:
        model.compile_repeated_blocks()
    else:
        for block in model.transformer_blocks:
            block.compile()


def make_run(model: Any, case: Case, attention: list[str]) -> Callable[[], None]:
    """One forward pass or one step of training, to be called again and again.

    Args:
        attention: PyTorch's attention kernels to choose from, the first before the others; none for
            PyTorch's own choice.
    """
    import torch

    from .backends import kernels

    if case.mode == "compiled":
        compile_blocks(model)
    inputs = make_inputs(case)
    run = _training_step if case.task == "training" else _forward_pass
    once = run(model, inputs, case)

    def measured() -> None:
        with kernels(attention, case.device) if attention else contextlib.nullcontext():
            once()
        if case.device == "cuda":
            torch.cuda.synchronize()

    return measured


def make_inputs(case: Case) -> dict[str, Any]:
    """Random latents, text of which every token is attended to, and a timestep."""
    import torch

    dtype = torch.float32 if case.task == "training" else getattr(torch, case.dtype)
    on_device: dict[str, Any] = {"device": case.device, "dtype": dtype}
    side = case.pixels // 8
    text = (case.batch_size, case.text_tokens)
    return {
        "hidden_states": torch.randn(case.batch_size, 4, side, side, **on_device),
        "encoder_hidden_states": torch.randn(*text, TEXT_CHANNELS, **on_device),
        "encoder_attention_mask": torch.ones(*text, **on_device),
        "timestep": torch.randint(1000, (case.batch_size,), device=case.device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _forward_pass(model: Any, inputs: dict[str, Any], case: Case) -> Callable[[], None]:
    import torch

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    return forward


def _training_step(model: Any, inputs: dict[str, Any], case: Case) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.randn_like(inputs["hidden_states"])

    def step() -> None:
        with torch.autocast(case.device, torch.bfloat16, case.dtype == "bfloat16"):
            prediction = model(**inputs)[0]
            loss = (prediction.float() - target).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
