"""Fine-tuning: a transformer, or adapters on it, learn the target of the objective."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from localdit.core.diffusion import Objective, denoising_errors
from localdit.core.settings import SamplingSettings, read_settings
from localdit.models.flops import forward_flops
from localdit.training.methods import Inputs, Method, Sampling, noised_prediction
from localdit.training.options import METHODS
from localdit.training.state import TRANSFORMER

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel


class FineTuning(Method):
    """Trains a transformer from noise, from weights, or through adapters.

    Attributes:
        transformer: the transformer in training, bare.
        objective: defines the target.
        adapters: whether adapters are trained and the transformer's own weights are frozen.
    """

    def __init__(
        self,
        transformer: LocalDiTTransformer2DModel,
        objective: Objective,
        adapters: bool,
        frozen: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__({TRANSFORMER: transformer}, frozen)
        self.transformer, self.objective, self.adapters = transformer, objective, adapters
        self._forward_flops: dict[tuple[int, int, int], int] = {}

    @classmethod
    def from_options(
        cls,
        args: argparse.Namespace,
        transformer: LocalDiTTransformer2DModel,
        objective: Objective,
        device: torch.device,
    ) -> FineTuning:
        """Make the method that the options ask for; load the frozen models that it needs.

        Args:
            args: the options.
            transformer: the transformer in training, with its adapters.
            objective: defines the target.
            device: for frozen models.

        Raises:
            ValueError, OSError: if a frozen model is missing or does not fit.
        """
        models = cls.frozen_models(args, transformer)
        frozen = {name: model.to(device) for name, model in models.items()}
        adapters = args.lora_rank is not None
        return cls(transformer, objective, adapters, frozen, **cls.settings(args))

    @classmethod
    def settings(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Return the arguments of a derived class that the options give."""
        return {}

    @classmethod
    def sampling(cls, args: argparse.Namespace, objective: Objective) -> Sampling:
        """Return the way to sample from the result: steps and guidance are those of the start.

        A few-step model does not stay one.
        """
        start = args.transformer or args.teacher
        settings = read_settings(start.parent) if start else SamplingSettings()
        if settings.few_steps:
            settings = SamplingSettings()
        return Sampling(objective.sampling_scheduler(), settings)

    @classmethod
    def frozen_models(
        cls, args: argparse.Namespace, transformer: LocalDiTTransformer2DModel
    ) -> dict[str, nn.Module]:
        """Load the frozen models that the loss needs beside the transformer, by name."""
        return {}

    @property
    def repeats(self) -> int:
        """The number of times that the pass with a gradient has the batch."""
        return 1

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted mean squared error of each sample's prediction."""
        prediction, target, timesteps = noised_prediction(
            models[TRANSFORMER], self.objective, inputs, noise, positions
        )
        return denoising_errors(prediction, target) * self.objective.weights(timesteps)

    def validation_errors(
        self, model: nn.Module, inputs: Inputs, noise: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean squared error of each sample's prediction, `(B,)`."""
        prediction, target, _ = noised_prediction(model, self.objective, inputs, noise, positions)
        return denoising_errors(prediction, target)

    def step_flops(self, inputs: Inputs) -> int:
        """Return the operations of the transformer.

        Frozen weights need no gradient, which saves a third. Adapters hardly count.
        """
        rows, _, height, width = inputs.latents.shape
        sizes = (height, width, inputs.text.shape[1])
        if sizes not in self._forward_flops:
            self._forward_flops[sizes] = forward_flops(self.transformer.config, *sizes)
        return (2 if self.adapters else 3) * rows * self._forward_flops[sizes]

    def set_sample_size(self, size: int) -> None:
        """Scale the transformer's positions to the size, unless its own weights are frozen.

        Adapters are later used with the unchanged transformer, at any size of the pictures.
        """
        if not self.adapters:
            self.transformer.set_sample_size(size)


def method_class(args: argparse.Namespace) -> type[FineTuning]:
    """Return the class of the method that the options name."""
    module, name = METHODS[args.distillation or args.method].split(".")
    return getattr(importlib.import_module(f"localdit.training.methods.{module}"), name)
