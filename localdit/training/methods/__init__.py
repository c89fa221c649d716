"""Training methods: the models that are trained, the frozen ones beside them, and the loss.

The loop, the state, checkpoints and processes know a method only by `Method`.
"""

from __future__ import annotations

import argparse
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import nn

from localdit.core.conditions import size_conditions
from localdit.core.diffusion import Objective, denoising_errors
from localdit.core.encoders import Encoders
from localdit.core.samplers import SamplingSettings, read_settings
from localdit.core.text import pad_states
from localdit.models.flops import forward_flops
from localdit.models.windows import Route
from localdit.sizes import pipeline_around
from localdit.training.data.batches import Batch
from localdit.training.parser import METHODS
from localdit.training.state import TRANSFORMER

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel


class Inputs(NamedTuple):
    """Latents, text and conditions of a batch, on the training device."""

    latents: torch.Tensor  # (B, C, h, w) float32, without noise
    text: torch.Tensor  # (B, L, channels) float32
    text_mask: torch.Tensor  # (B, L), 1 = token
    # The transformer's `added_cond_kwargs`; see `size_conditions`
    conditions: dict[str, torch.Tensor | None]
    # (L, channels) float32, the empty caption; None if the method does not need it
    empty_text: torch.Tensor | None = None
    weights: torch.Tensor | None = None  # (B,) 1 for samples, 0 for placeholders
    places: torch.Tensor | None = None  # (B, 2) in [0, 1), places of a part of each picture

    def repeated(self, times: int) -> Inputs:
        """Return the inputs with the whole batch repeated, `times * B` rows."""
        names = ("latents", "text", "text_mask", "weights", "places")
        rows = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        repeated: Any = {name: torch.cat([row] * times) for name, row in rows.items()}
        return self._replace(**repeated)

    def without_captions(self) -> Inputs:
        """Return the inputs with the empty caption in all rows, for classifier-free guidance."""
        assert self.empty_text is not None
        text, mask = pad_states([self.empty_text] * len(self.latents))
        return self._replace(text=text, text_mask=mask)


class InputMaker:
    """Encodes batches of pictures, and passes on batches of encoded data.

    Args:
        encoders: encoders of pictures and captions; None for encoded data.
        max_caption_length: number of text tokens after which captions are cut.
        models: models that take the inputs, conditioned on picture sizes or not.
        bf16: encode pictures in bfloat16.
        guided: also give the empty caption.
        empty_text: its states (L, channels) in encoded data.
    """

    def __init__(
        self,
        device: torch.device,
        encoders: Encoders | None,
        max_caption_length: int,
        models: Iterable[torch.nn.Module | None],
        bf16: bool = False,
        guided: bool = False,
        empty_text: torch.Tensor | None = None,
    ) -> None:
        self.device = device
        self.encoders = encoders
        self.max_caption_length = max_caption_length
        # A model that is not conditioned on sizes ignores them.
        self.conditioned = any(
            getattr(model, "use_additional_conditions", False) for model in models
        )
        self.bf16 = bf16
        self.empty_text = None
        if guided:
            if encoders is not None:
                empty_text = encoders.text.encode_unpadded([""], max_caption_length)[""]
            assert empty_text is not None
            self.empty_text = empty_text.to(device, torch.float32)

    def __call__(self, batch: Batch) -> Inputs:
        """Return the transformer's inputs for a batch, without noise."""
        if batch.pixels is not None:
            assert self.encoders is not None
            latents = self.encoders.latents.encode_pixels(batch.pixels, self.bf16)
            text, mask = self.encoders.text.encode_batch(batch.captions, self.max_caption_length)
        else:
            assert batch.latents is not None
            latents = batch.latents
            text, mask = pad_states(batch.text)
        return Inputs(
            latents.to(self.device, torch.float32, non_blocking=True),
            text.to(self.device, torch.float32, non_blocking=True),
            mask.to(self.device, non_blocking=True),
            size_conditions(self.conditioned, *batch.size, self.device),
            self.empty_text,
            batch.weights.to(self.device, non_blocking=True),
            batch.places.to(self.device, non_blocking=True),
        )


@dataclass(frozen=True)
class Sampling:
    """The way to sample from the trained transformer."""

    scheduler: SchedulerMixin
    settings: SamplingSettings  # the steps and guidance that suit the model


class Method(ABC):
    """The models of a training method, and the loss of a batch.

    Attributes:
        transformer: the transformer in training, bare.
        objective: defines noised latents and targets.
        adapters: whether adapters are trained and the transformer's own weights are frozen.
        trained: bare models by name. Their weights are trained if they require a gradient.
        frozen: models by name, on the training device, that the loss needs and no step changes.
            They are not part of the training state.
        guided: whether the loss needs the empty caption.
    """

    guided = False

    def __init__(
        self,
        transformer: LocalDiTTransformer2DModel,
        objective: Objective,
        adapters: bool,
        frozen: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.transformer, self.objective, self.adapters = transformer, objective, adapters
        self.trained: dict[str, nn.Module] = {TRANSFORMER: transformer}
        self.frozen = dict(frozen or {})
        for model in self.frozen.values():
            model.requires_grad_(False).eval()
        self._flops: dict[tuple[str, int, int, int], int] = {}

    @classmethod
    def settings(cls, args: argparse.Namespace, num_layers: int) -> dict[str, Any]:
        """Return the arguments beside the models and the objective that the options give."""
        return {}

    @classmethod
    def frozen_models(
        cls, args: argparse.Namespace, transformer: LocalDiTTransformer2DModel
    ) -> dict[str, nn.Module]:
        """Load the other transformers that the loss needs, by name."""
        return {}

    @classmethod
    def sampling(
        cls, args: argparse.Namespace, objective: Objective, start: Path | None
    ) -> Sampling:
        """Return the way to sample from the result: steps and guidance are those of the start.

        A few-step model does not stay one.

        Args:
            start: where the weights that training starts from are; None if they are new.
        """
        start = start or args.teacher
        settings = read_settings(pipeline_around(start)) if start else SamplingSettings()
        if settings.few_steps:
            settings = SamplingSettings()
        return Sampling(objective.sampling_scheduler(), settings)

    @property
    def repeats(self) -> int:
        """The number of times that the pass with a gradient has the batch."""
        return 1

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
            noise: (B, C, h, w) float32.
            positions: (B,) in [0, 1), from the latents to the noise; see `Objective.timesteps`.
        """

    def validation_errors(
        self, model: nn.Module, inputs: Inputs, noise: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the unweighted errors of held-out samples, `(B,)`: those of the predictions.

        Args:
            model: the transformer in training, or its average.
            inputs, noise, positions: as in `losses`.
        """
        found = noised_prediction(model, self.objective, inputs, noise, positions)
        return denoising_errors(found.prediction, found.target)

    def step_flops(self, inputs: Inputs) -> int:
        """Return the floating-point operations of all models for a batch, forward and backward.

        Frozen weights need no gradient, which saves a third. Adapters hardly count.
        """
        passes = (2 if self.adapters else 3) * self.repeats
        return passes * len(inputs.latents) * self.forward_flops(TRANSFORMER, inputs)

    def forward_flops(self, name: str, inputs: Inputs) -> int:
        """Return the operations of a transformer's forward pass for one picture of a batch."""
        height, width = inputs.latents.shape[2:]
        key = (name, height, width, inputs.text.shape[1])
        if key not in self._flops:  # counting takes a moment
            model: Any = (self.trained | self.frozen)[name]
            self._flops[key] = forward_flops(model.config, *key[1:], self.route(inputs))
        return self._flops[key]

    def route(self, inputs: Inputs) -> Route | None:
        """Return the tokens of each picture that take all blocks; None if all do."""
        return None

    def set_sample_size(self, size: int) -> None:
        """Scale the positions to square pictures of `size` x `size` latents.

        Those of a frozen transformer stay: adapters are later used with it unchanged, at any size
        of the pictures.
        """
        if not self.adapters:
            self.transformer.set_sample_size(size)


def method_class(args: argparse.Namespace) -> type[Method]:
    """Return the class of the method that the options name."""
    module, name = METHODS[args.distillation or args.method].split(".")
    return getattr(importlib.import_module(f"localdit.training.methods.{module}"), name)


class NoisedPrediction(NamedTuple):
    """A model's prediction for noised latents, and its target."""

    prediction: torch.Tensor  # (B, C, h, w)
    target: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,)
    # (B, N, channels) outputs of the blocks that were asked for
    features: tuple[torch.Tensor, ...] = ()


def noised_prediction(
    model: nn.Module,
    objective: Objective,
    inputs: Inputs,
    noise: torch.Tensor,
    positions: torch.Tensor,
    **options: Any,
) -> NoisedPrediction:
    """Add noise to latents and predict the target, for training and validation.

    Args:
        model: a model with the transformer's arguments.
        objective: defines timesteps, noised latents and target.
        inputs: latents, text and conditions, on the model's device.
        noise: (B, C, h, w) float32.
        positions: (B,) in [0, 1).
        **options: further arguments of the transformer.
    """
    timesteps = objective.timesteps(positions)
    noised = objective.add_noise(inputs.latents, noise, timesteps)
    prediction, *features = _outputs(model, noised, inputs, timesteps, **options)
    target = objective.target(inputs.latents, noise, timesteps)
    return NoisedPrediction(prediction, target, timesteps, tuple(features))


def predict(
    model: nn.Module, noised: torch.Tensor, inputs: Inputs, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return a model's prediction `(B, C, h, w)` for noised latents at timesteps `(B,)`."""
    return _outputs(model, noised, inputs, timesteps)[0]


def _outputs(
    model: nn.Module,
    noised: torch.Tensor,
    inputs: Inputs,
    timesteps: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return a model's prediction, and the features that `options` ask for."""
    return model(
        noised,
        encoder_hidden_states=inputs.text,
        encoder_attention_mask=inputs.text_mask,
        timestep=timesteps,
        added_cond_kwargs=inputs.conditions,
        return_dict=False,
        **options,
    )
