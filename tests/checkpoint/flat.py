"""Flat checkpoints for the tests: tiny random models in all known layouts."""

from __future__ import annotations

import torch

from localdit.checkpoint.layout import flat_name
from localdit.models import LocalDiTTransformer2DModel

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "window_size": 2,
    "caption_channels": 6,
    "sample_size": 128,
}


def tiny_model(seed: int = 0, **overrides) -> LocalDiTTransformer2DModel:
    """A model with every parameter random, position biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    model = LocalDiTTransformer2DModel(**{**TINY, **overrides}).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    return model


def flat_state(model: LocalDiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """The model's state dict with the names of the reference."""
    return {flat_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def released_state(model: LocalDiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """In the released file's layout: with stale projections, without the processors' tensors."""
    state = {n: t for n, t in flat_state(model).items() if ".processor." not in n}
    for name, tensor in list(state.items()):
        attn, _, kind = name.rpartition(".to_qkv.")
        if attn:
            for stale, rows in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                state[f"{attn}.{stale}.{kind}"] = torch.zeros_like(rows)
        attn, _, kind = name.rpartition("attn2.to_k.")
        if attn:
            value = state[f"{attn}attn2.to_v.{kind}"]
            state[f"{attn}attn2.to_kv.{kind}"] = torch.zeros_like(torch.cat([tensor, value]))
    return state


def inputs(model: LocalDiTTransformer2DModel, height: int = 8, width: int = 12) -> dict:
    """Arguments for a call of the model."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(
            2, 5, model.config.caption_channels, generator=generator
        ),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 96.0]] * 2),
            "aspect_ratio": torch.tensor([[1.5]] * 2),
        },
    }


def output(model: LocalDiTTransformer2DModel) -> torch.Tensor:
    """The model's prediction for `inputs`."""
    with torch.no_grad():
        return model(**inputs(model)).sample
