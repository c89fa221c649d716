"""Build a denoiser with random weights, and run it in a case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from localdit.machine import with_random_weights

from .attention_kernels import kernels
from .cases import HEAD_DIM, HEADS, SANA, Case, Denoiser


def make_model(denoiser: Denoiser, layers: int, case: Case) -> Any:
    """Return a model with small random weights, without size conditions."""
    import torch

    training = case.task == "training"
    model = with_random_weights(
        lambda: build(denoiser, layers, case.pixels),
        torch.float32 if training else getattr(torch, case.dtype),
        case.device,
    )
    return model.train(training)


def build(denoiser: Denoiser, layers: int, pixels: int) -> Any:
    """Return a new model for pictures of a side; its other sizes are those of the released one."""
    latents = denoiser.latents
    shape: dict[str, Any] = {
        "in_channels": latents.channels,
        "out_channels": latents.channels,
        "patch_size": latents.patch_size,
        "caption_channels": latents.text_channels,
        "cross_attention_dim": HEADS * HEAD_DIM,
        "num_layers": layers,
        "sample_size": pixels // latents.pixels,
    }
    if denoiser == SANA:
        from diffusers import SanaTransformer2DModel

        # Sana_600M_1024px: heads of linear self-attention, then of cross-attention.
        heads = {"num_attention_heads": 36, "attention_head_dim": 32}
        heads |= {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM}
        return SanaTransformer2DModel(**shape, **heads, mlp_ratio=2.5)
    shape = shape | {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "use_additional_conditions": False,
    }
    if denoiser.use_global is None:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(**shape)
    from localdit.models import LocalDiTTransformer2DModel

    shape |= {"use_global": denoiser.use_global, "layer_types": denoiser.layer_types}
    return LocalDiTTransformer2DModel(**shape)


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )


def compile_blocks(model: Any) -> None:
    """Set up each block to be compiled at its first call."""
    if not len(model.transformer_blocks):
        return
    if model._repeated_blocks:
        model.compile_repeated_blocks()
    else:
        for block in model.transformer_blocks:
            block.compile()


def make_run(
    model: Any, denoiser: Denoiser, case: Case, attention: list[str]
) -> Callable[[], None]:
    """Return a function that runs one forward pass or one training step.

    Args:
        model: the denoiser's model.
        attention: names of PyTorch's attention kernels in order of preference; empty for
            PyTorch's own choice.
    """
    import torch

    if case.mode == "compiled":
        compile_blocks(model)
    inputs = make_inputs(denoiser, case)
    run = _training_step if case.task == "training" else _forward_pass
    once = run(model, inputs, case)

    def measured() -> None:
        with kernels(attention, case.device) if attention else contextlib.nullcontext():
            once()
        if case.device == "cuda":
            torch.cuda.synchronize()

    return measured


def make_inputs(denoiser: Denoiser, case: Case) -> dict[str, Any]:
    """Return a denoiser's inputs: random latents, a caption without padding, and a timestep."""
    import torch

    dtype = torch.float32 if case.task == "training" else getattr(torch, case.dtype)
    on_device: dict[str, Any] = {"device": case.device, "dtype": dtype}
    latents = denoiser.latents
    size = (case.batch_size, latents.channels, *2 * [case.pixels // latents.pixels])
    text = (case.batch_size, case.text_tokens)
    conditions = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return {
        "hidden_states": torch.randn(*size, **on_device),
        "encoder_hidden_states": torch.randn(*text, latents.text_channels, **on_device),
        "encoder_attention_mask": torch.ones(*text, **on_device),
        "timestep": torch.randint(1000, (case.batch_size,), device=case.device),
        "return_dict": False,
        **({} if denoiser == SANA else conditions),  # Sana knows no picture sizes
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
