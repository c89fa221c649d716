"""Fine-tuning: a transformer, or adapters on it, learn the target of the objective."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from localdit.core.diffusion import Objective, denoising_errors
from localdit.models.windows import Route, WindowGrid, rectangle_size, rectangle_tokens
from localdit.training.methods import Inputs, Method, noised_prediction
from localdit.training.methods.repa import (
    FEATURES,
    PROJECTION,
    LatentFeatures,
    Repa,
    make_projection,
)
from localdit.training.state import TRANSFORMER

if TYPE_CHECKING:
    from localdit.models import LocalDiTTransformer2DModel


class Alignment(NamedTuple):
    """A term that pulls the features of a block towards those of a later one."""

    weight: float
    blocks: tuple[int, int]  # indices of the earlier and the later one

    @classmethod
    def from_options(cls, args: argparse.Namespace, num_layers: int) -> Alignment | None:
        """Return what the options ask for; None if they leave the term out.

        Blocks are by default those after 8/28 and 16/28 of all.
        """
        if not args.alignment_weight:
            return None
        if num_layers < 2:
            raise ValueError(
                "--alignment-weight is for a block and a later one, but the transformer has 1 "
                "block: leave it out"
            )
        early = max(1, round(num_layers * 8 / 28))
        late = max(early + 1, round(num_layers * 16 / 28))
        early, late = args.alignment_blocks or (early, late)
        if not 1 <= early < late <= num_layers:
            raise ValueError(
                f"--alignment-blocks is {early} {late}; expected a block and a later one of the "
                f"{num_layers} blocks, which are counted from 1"
            )
        return cls(args.alignment_weight, (early - 1, late - 1))

    def losses(self, early: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """Return minus the mean cosine of the angles between features `(B, N, C)`, `(B,)`.

        This is the term of LayerSync (Haghighi et al., 2025). Only the earlier features are moved.
        """
        cosines = F.cosine_similarity(early.float(), late.detach().float(), dim=-1)
        return -self.weight * cosines.mean(dim=1)


class Routing(NamedTuple):
    """Tokens that skip the middle blocks in training (TREAD, Krause et al., 2025).

    The paper draws tokens one by one. Here, those that stay are a rectangle of windows, at a random
    place in each picture, so that attention finds whole windows.
    """

    share: float  # of the tokens, about
    blocks: range  # indices of those that are skipped

    @classmethod
    def from_options(cls, args: argparse.Namespace, num_layers: int) -> Routing | None:
        """Return what the options ask for; None if all tokens take all blocks.

        By default 2/28 of the blocks come before and 4/28 after, at least one of each.
        """
        if not args.token_routing:
            return None
        if num_layers < 3 and not args.routing_blocks:
            raise ValueError(
                "--token-routing skips the blocks between the first and the last, but the "
                f"transformer has {num_layers} blocks: name those to skip with --routing-blocks, "
                "or leave it out"
            )
        first = max(1, round(num_layers * 2 / 28)) + 1
        last = num_layers - max(1, round(num_layers * 4 / 28))
        first, last = args.routing_blocks or (first, last)
        if not 1 <= first <= last <= num_layers:
            raise ValueError(
                f"--routing-blocks is {first} {last}; expected the first and the last of the "
                f"{num_layers} blocks to skip, which are counted from 1"
            )
        return cls(args.token_routing, range(first - 1, last))

    def rectangle(self, height: int, width: int, window_size: int) -> tuple[int, int]:
        """Return the size of the rectangle that stays, in tokens, in maps of one size."""
        rows, columns = height // window_size, width // window_size
        size = rectangle_size(height, width, window_size, 1 - self.share)
        if min(rows, columns) < 2 or size == (rows * window_size, columns * window_size):
            raise ValueError(
                f"--token-routing is {self.share}, but maps of {height} x {width} tokens have "
                f"{rows} x {columns} whole windows; expected at least 2 x 2, and a share of at "
                "least one window. Raise --image-size or the share, lower --max-aspect-ratio, or "
                "leave out --token-routing"
            )
        return size


class FineTuning(Method):
    """Trains a transformer from noise, from weights, or through adapters.

    Attributes:
        contrastive_weight: weight of the distance from the target of another sample.
        alignment: the term between the features of two blocks, or None.
        routing: the tokens that skip blocks, or None.
        repa: the term between the features of a block and of an image encoder, or None. It adds the
            trained projection, and needs the frozen `LatentFeatures`.
    """

    def __init__(
        self,
        transformer: LocalDiTTransformer2DModel,
        objective: Objective,
        adapters: bool,
        frozen: Mapping[str, nn.Module] | None = None,
        contrastive_weight: float = 0.0,
        alignment: Alignment | None = None,
        routing: Routing | None = None,
        repa: Repa | None = None,
    ) -> None:
        super().__init__(transformer, objective, adapters, frozen)
        if repa:
            features = self.frozen[FEATURES]
            assert isinstance(features, LatentFeatures)
            projection = make_projection(transformer.inner_dim, features.width)
            self.trained[PROJECTION] = projection.to(transformer.device)
        self.contrastive_weight = contrastive_weight
        self.alignment, self.routing, self.repa = alignment, routing, repa

    @classmethod
    def settings(cls, args: argparse.Namespace, num_layers: int) -> dict[str, Any]:
        """Return the terms of the loss that the options ask for."""
        return {
            "contrastive_weight": args.contrastive_weight,
            "alignment": Alignment.from_options(args, num_layers),
            "routing": Routing.from_options(args, num_layers),
            "repa": Repa.from_options(args, num_layers),
        }

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted mean squared error of each sample's prediction.

        Further terms change the gradient and not the value. So runs with and without them show
        losses that can be compared.
        """
        options: dict[str, Any] = {}
        if blocks := self._feature_blocks():
            options["feature_blocks"] = blocks
        route = self.route(inputs)
        if route is not None:
            options["route"] = route
        prediction, target, timesteps, outputs = noised_prediction(
            models[TRANSFORMER], self.objective, inputs, noise, positions, **options
        )
        features = dict(zip(blocks, outputs, strict=True))
        weights = self.objective.weights(timesteps)
        losses = denoising_errors(prediction, target) * weights
        if self.contrastive_weight:
            contrast = self._contrast(prediction, inputs, noise, timesteps) * weights
            losses = losses + without_value(self.contrastive_weight * contrast)
        if self.alignment:
            early, late = (features[block] for block in self.alignment.blocks)
            losses = losses + without_value(self.alignment.losses(early, late))
        if self.repa:
            wanted = models[FEATURES](inputs.latents, *self._map_size(inputs))
            wanted = wanted if route is None else route.take(wanted)
            projected = models[PROJECTION](features[self.repa.block])
            losses = losses + without_value(self.repa.losses(projected, wanted))
        return losses

    def _feature_blocks(self) -> tuple[int, ...]:
        """Return the indices of the blocks whose features the terms need, in order."""
        blocks = set(self.alignment.blocks if self.alignment else ())
        if self.repa:
            blocks.add(self.repa.block)
        return tuple(sorted(blocks))

    def _map_size(self, inputs: Inputs) -> tuple[int, int]:
        """Return height and width of the pictures in tokens."""
        height, width = inputs.latents.shape[2:]
        patch = self.transformer.config.patch_size
        return height // patch, width // patch

    def route(self, inputs: Inputs) -> Route | None:
        """Return the rectangle of windows that takes all blocks, by the places of the inputs."""
        if not self.routing:
            return None
        assert inputs.places is not None
        height, width = self._map_size(inputs)
        window_size = self.transformer.config.window_size
        rectangle = self.routing.rectangle(height, width, window_size)
        grid = WindowGrid(height, width, window_size)
        tokens = rectangle_tokens(inputs.places, grid, rectangle)
        return Route(self.routing.blocks, *rectangle, tokens)

    def _contrast(
        self,
        prediction: torch.Tensor,
        inputs: Inputs,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """Return minus the error of each prediction for the target of another sample, `(B,)`.

        This is the second term of contrastive flow matching (Stoica et al., 2025). The other sample
        has its own latents and noise, at the same timestep. If there is none, the result is 0.
        """
        assert inputs.weights is not None
        other = next_sample(inputs.weights)
        target = self.objective.target(inputs.latents[other], noise[other], timesteps)
        alone = other == torch.arange(len(other), device=other.device)
        return torch.where(alone, 0.0, -denoising_errors(prediction, target))


def next_sample(weights: torch.Tensor) -> torch.Tensor:
    """Return the next sample of the batch for each one, cyclically, `(B,)` int64.

    It is the sample itself if there is no other.

    Args:
        weights: `(B,)`, 0 for placeholders, which are left out.
    """
    index = torch.arange(len(weights), device=weights.device)
    following = (index[:, None] + index) % len(weights)  # (B, B): i, i + 1, ...
    chosen = weights[following] > 0
    chosen[:, 0] = False
    return (index + chosen.int().argmax(dim=1)) % len(weights)


def without_value(term: torch.Tensor) -> torch.Tensor:
    """Return zeros with the gradient of `term`; not a number where it is not finite."""
    return term - term.detach()
