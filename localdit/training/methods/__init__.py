"""Training methods: which models are trained, beside which frozen ones, on which loss.

Loop, state, checkpoints and processes know a method by `Method` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from localdit.core.diffusion import Objective
from localdit.training.inputs import Inputs


class Method(ABC):
    """Models by name, and the loss of a batch.

    Attributes:
        trained: bare models whose weights are trained, as far as they require a gradient.
        frozen: models that the loss needs and no step changes, on the training device. They are
            not part of the training state.
    """

    def __init__(
        self, trained: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.trained = dict(trained)
        self.frozen = dict(frozen or {})
        for model in self.frozen.values():
            model.requires_grad_(False).eval()

    @abstractmethod
    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of each sample, `(B,)` float32.

        Args:
            models: the trained models as Accelerate prepared them, and the frozen ones, by name.
            inputs: latents, text and conditions of the batch.
            noise: (B, C, h, w) float32.
            positions: (B,) in [0, 1), from the latents to the noise: see `Objective.timesteps`.
        """

    @abstractmethod
    def step_flops(self, inputs: Inputs) -> int:
        """Return the floating-point operations of all models for a batch, forward and backward."""

    @abstractmethod
    def set_sample_size(self, size: int) -> None:
        """Adapt the models to square pictures of `size` x `size` latents."""


class NoisedPrediction(NamedTuple):
    """A model's prediction for noised latents, beside what it should have predicted.

    Attributes:
        prediction, target: (B, C, h, w).
        timesteps: (B,).
    """

    prediction: torch.Tensor
    target: torch.Tensor
    timesteps: torch.Tensor


def noised_prediction(
    model: nn.Module,
    objective: Objective,
    inputs: Inputs,
    noise: torch.Tensor,
    positions: torch.Tensor,
) -> NoisedPrediction:
    """Add noise to the latents and let a model predict. Training and validation share this.

    Args:
        model: called as the transformer is.
        objective: gives timesteps, noised latents and target.
        inputs: latents, text and conditions, on the model's device.
        noise: (B, C, h, w) float32.
        positions: (B,) in [0, 1).
    """
    timesteps = objective.timesteps(positions)
    prediction = model(
        objective.add_noise(inputs.latents, noise, timesteps),
        encoder_hidden_states=inputs.text,
        encoder_attention_mask=inputs.text_mask,
        timestep=timesteps,
        added_cond_kwargs=inputs.conditions,
        return_dict=False,
    )[0]
    return NoisedPrediction(
        prediction, objective.target(inputs.latents, noise, timesteps), timesteps
    )
