"""Representation alignment: a block learns the features of a frozen image encoder.

This is REPA (Yu et al., 2025, "Representation alignment for generation: training diffusion
transformers is easier than you think"). Training has latents, so the encoder sees the pictures that
the autoencoder decodes from them.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from localdit.core.latents import LatentSpace
from localdit.core.parts import load_whole, require_sound_config
from localdit.files import read_json

PROJECTION = "repa-projection"  # the trained model
FEATURES = "image encoder"  # the frozen one
MAX_HIDDEN = 2048  # channels inside the projection, as in the paper
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Repa(NamedTuple):
    """A term that pulls the projected features of a block towards those of an image encoder."""

    weight: float
    block: int  # index

    @classmethod
    def from_options(cls, args: argparse.Namespace, num_layers: int) -> Repa | None:
        """Return what the options ask for; None if they leave the term out.

        The block is by default the one after 8/28 of all.
        """
        if not args.repa_weight:
            return None
        block = max(1, round(num_layers * 8 / 28)) if args.repa_block is None else args.repa_block
        if not 1 <= block <= num_layers:
            raise ValueError(
                f"--repa-block is {block}; expected one of the {num_layers} blocks, which are "
                "counted from 1"
            )
        return cls(args.repa_weight, block - 1)

    def losses(self, projected: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return minus the mean cosine of the angles between features `(B, N, C)`, `(B,)`."""
        cosines = F.cosine_similarity(projected.float(), wanted.float(), dim=-1)
        return -self.weight * cosines.mean(dim=1)


def make_projection(width: int, wanted: int) -> nn.Sequential:
    """Return the network from a block's features, of `width` channels, to `wanted` channels.

    It has the paper's three layers, and its 2048 hidden channels unless `4 * width` is less.
    """
    hidden = min(MAX_HIDDEN, 4 * width)
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.SiLU(),
        nn.Linear(hidden, hidden),
        nn.SiLU(),
        nn.Linear(hidden, wanted),
    )


class LatentFeatures(nn.Module):
    """The features that an image encoder has of latents, which an autoencoder decodes for it.

    Args:
        vae: an autoencoder; see `LatentSpace`.
        encoder: a vision transformer of Transformers.
        mean, std: those of each channel of its pixels, in [0, 1].
        bf16: compute in bfloat16.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        vae: Any,
        encoder: Any,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.vae, self.encoder, self.bf16 = vae, encoder, bf16
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @property
    def width(self) -> int:
        """Channels of the features."""
        return self.encoder.config.hidden_size

    @torch.no_grad()
    def forward(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return the features `(B, height * width, C)` of standardised latents `(B, c, h, w)`.

        Args:
            latents: without noise.
            height, width: the map of the features, one for each token.
        """
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.bf16):
            pictures = LatentSpace(self.vae).decode(latents).float().clamp(-1, 1)
            return self.of_pictures(pictures, height, width)

    def of_pictures(self, pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return the features `(B, height * width, C)` of pictures `(B, 3, H, W)` in [-1, 1].

        They are resized so that each patch of the encoder is a token. The tokens of its class and
        its registers, which come first, are left out.
        """
        patch = self.encoder.config.patch_size
        size = (height * patch, width * patch)
        pixels = F.interpolate(pictures / 2 + 0.5, size, mode="bicubic", antialias=True)
        pixels = (pixels - self.mean) / self.std
        options = {}
        if "interpolate_pos_encoding" in inspect.signature(self.encoder.forward).parameters:
            options["interpolate_pos_encoding"] = True
        states = self.encoder(pixel_values=pixels, **options).last_hidden_state
        return states[:, -height * width :]


def image_encoder_config(folder: Path) -> Any:
    """Return the configuration of the image encoder in a folder; no weights are read."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--repa-encoder {folder} has no config.json; expected the folder of an image encoder "
            "of Transformers, such as DINOv2"
        )
    require_sound_config(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    names = ("hidden_size", "patch_size")
    if not all(isinstance(getattr(config, name, None), int) for name in names):
        raise _no_patches(folder, config)
    return config


def load_latent_features(folder: Path, vae: Any, bf16: bool = False) -> LatentFeatures:
    """Return the features of the image encoder in a folder, for latents of an autoencoder."""
    from transformers import AutoModel

    config, statistics = image_encoder_config(folder), _mean_and_std(folder)
    encoder = load_whole(
        AutoModel,
        pretrained_model_name_or_path=folder,
        local_files_only=True,
        trust_remote_code=False,
    )
    encoder = getattr(encoder.float(), "vision_model", encoder)  # of CLIP and its like
    features = LatentFeatures(vae, encoder, *statistics, bf16)
    try:
        with torch.no_grad():
            found = features.of_pictures(torch.zeros(1, 3, 8, 8), 2, 3)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _no_patches(folder, config) from error
    if found.shape != (1, 6, features.width):
        raise _no_patches(folder, config)
    return features


def _no_patches(folder: Path, config: Any) -> ValueError:
    return ValueError(
        f"--repa-encoder {folder} is of the type {config.model_type!r}, which does not give a "
        "feature for each patch of a picture; expected a vision transformer, such as DINOv2"
    )


def _mean_and_std(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Return what the folder's preprocessor subtracts from pixels and divides them by."""
    path = folder / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    mean = settings.get("image_mean", IMAGENET_MEAN)
    std = settings.get("image_std", IMAGENET_STD)
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(values, (list, tuple)) and len(values) == 3
        if not numbers or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise ValueError(f"{path}: {name} is {values!r}; expected three numbers")
    if min(std) <= 0:
        raise ValueError(f"{path}: image_std is {std!r}; expected numbers above 0")
    return mean, std
