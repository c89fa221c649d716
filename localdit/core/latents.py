"""The latent space of an autoencoder: from pictures to latents and back, in bounded memory.

Pipelines, training, encoding ahead of training and previews all go through `LatentSpace`. What
differs between autoencoders is here and in `tiling.py` alone: channels, pixels per latent, scale,
shift or statistics per channel, and whether encoding gives a posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..sizes import pixels_per_latent_of
from .tiling import CROP, in_tiles, is_tiled, tile_settings

# Batches with more pixels pass through the autoencoder one picture at a time, pictures with more
# pixels in tiles.
TILING_THRESHOLD = 2048 * 2048
PREVIEW_PIXELS = 256  # along the longer side of a preview


@dataclass(frozen=True)
class LatentFormat:
    """The numbers that describe a latent space, read from an autoencoder's configuration.

    Latents `z` of the autoencoder are standardised for the denoiser as
    `(z - shift_factor) * scaling_factor`, or per channel, where the configuration has statistics,
    as `(z - latents_mean) * scaling_factor / latents_std`.
    """

    channels: int
    pixels_per_latent: int  # along a side
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None  # one number per channel
    latents_std: tuple[float, ...] | None = None  # one number per channel

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentFormat:
        """Read the format from the configuration of an autoencoder, as its `config.json` has it."""
        mean, std = config.get("latents_mean"), config.get("latents_std")
        return cls(
            channels=config["latent_channels"],
            pixels_per_latent=pixels_per_latent_of(config),
            scaling_factor=config.get("scaling_factor") or 1.0,
            shift_factor=config.get("shift_factor") or 0.0,
            latents_mean=None if mean is None else tuple(mean),
            latents_std=None if std is None else tuple(std),
        )

    def standardize(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents `(B, C, H, W)` of the autoencoder into those of the denoiser."""
        mean, std = self._statistics(latents)
        latents = (latents - mean) * self.scaling_factor
        return latents if std is None else latents / std

    def unstandardize(self, latents: torch.Tensor) -> torch.Tensor:
        """Invert `standardize`."""
        mean, std = self._statistics(latents)
        latents = latents / self.scaling_factor
        return (latents if std is None else latents * std) + mean

    def _statistics(self, like: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """Return the mean and, if there is one, the standard deviation per channel."""

        def per_channel(values: tuple[float, ...]) -> torch.Tensor:
            return torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)

        mean = self.shift_factor if self.latents_mean is None else per_channel(self.latents_mean)
        return mean, None if self.latents_std is None else per_channel(self.latents_std)


class LatentSpace:
    """Encode pictures and decode latents with one autoencoder.

    Args:
        vae: an autoencoder of Diffusers: `AutoencoderKL`, `AutoencoderDC`, `AutoencoderTiny`, or
            another one with such `encode` and `decode`.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.format = LatentFormat.from_config(vae.config)

    def encode(
        self,
        images: torch.Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        repeats: int = 1,
    ) -> torch.Tensor:
        """Encode pictures.

        Each picture passes through the autoencoder once, whatever `repeats` is.

        Args:
            images: `(N, 3, H, W)` in [-1, 1], on the autoencoder's device; H and W multiples of
                `format.pixels_per_latent`.
            sample: draw from the posterior instead of taking its mode. Autoencoders without a
                posterior have nothing to draw.
            generator: one for all rows, or a list with one per row, for `sample`.
            repeats: rows per picture.

        Returns:
            Standardised latents `(N * repeats, C, H / p, W / p)`, float32.
        """
        height, width = images.shape[2:]
        with self._prepared(height, width) as vae:
            encoded = self._in_parts(
                lambda part: _encoded(vae.encode(part)),
                images.to(vae.dtype),
                pixels=height * width,
                scale=self.format.pixels_per_latent,
            )
        encoded = encoded.float()
        if repeats > 1:  # else the memory format stays, which decides how layers round
            encoded = encoded.repeat_interleave(repeats, dim=0)
        if encoded.shape[1] == 2 * self.format.channels:  # mean and log variance
            posterior = DiagonalGaussianDistribution(encoded)
            encoded = posterior.sample(generator) if sample else posterior.mode()
        return self.format.standardize(encoded)

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Encode pictures `(N, 3, H, W)` of uint8 to the posterior's mode, as training does.

        They are mapped to [-1, 1] with the same bits as pipelines map theirs.

        Args:
            pixels: on any device.
            bf16: compute in bfloat16 where that is safe.

        Returns:
            Standardised latents `(N, C, H / p, W / p)`, float32, on the autoencoder's device.
        """
        device = self.vae.device
        images = pixels.to(device).float() / 127.5 - 1.0
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return self.encode(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode standardised latents `(B, C, h, w)` into pictures `(B, 3, p h, p w)`.

        Values lie in about [-1, 1], in the autoencoder's dtype.
        """
        height, width = (self.format.pixels_per_latent * side for side in latents.shape[2:])
        with self._prepared(height, width) as vae:
            return self._in_parts(
                lambda part: vae.decode(part, return_dict=False)[0],
                self.format.unstandardize(latents.to(vae.dtype)),
                pixels=height * width,
            )

    def decode_preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents `(B, C, h, w)` as `decode` does, averaged down to a small picture.

        The longer side has at most `PREVIEW_PIXELS` pixels.
        """
        height, width = latents.shape[2:]
        longest = PREVIEW_PIXELS // self.format.pixels_per_latent
        scale = min(1.0, longest / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return self.decode(F.adaptive_avg_pool2d(latents.float(), size))

    @contextmanager
    def _prepared(self, height: int, width: int) -> Iterator[Any]:
        """Set the autoencoder up for pictures of a size, and restore it afterwards.

        It works in tiles above `TILING_THRESHOLD` pixels. If its user has enabled tiling, its own
        tile sizes hold. A float16 autoencoder whose configuration has `force_upcast` works in
        float32, since it would overflow.
        """
        vae = self.vae
        large = height * width > TILING_THRESHOLD
        upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
        if upcast:
            vae.float()
        try:
            with tile_settings(vae) if large and not vae.use_tiling else nullcontext():
                yield vae
        finally:
            if upcast:
                vae.half()

    def _in_parts(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        batch: torch.Tensor,
        pixels: int,
        scale: int = 1,
    ) -> torch.Tensor:
        """Run a batch at once, one picture at a time, or in tiles, as its size requires.

        Args:
            run: encodes or decodes `(N, C, H, W)`.
            batch: pictures or latents.
            scale: units of `batch` along the side of a latent: pixels per latent, or 1.
        """
        if is_tiled(self.vae, batch.shape[2:], scale):
            return torch.cat([in_tiles(self.vae, run, one, scale * CROP) for one in batch.split(1)])
        if len(batch) * pixels > TILING_THRESHOLD:
            return torch.cat([run(one) for one in batch.split(1)])
        return run(batch)


def _encoded(output: Any) -> torch.Tensor:
    """Return what an autoencoder's `encode` gives: posterior parameters, or the latents."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.parameters
    return output.latents if hasattr(output, "latents") else output.latent
