"""Large pictures through the autoencoder in tiles, without seams.

Diffusers cuts the picture into overlapping tiles and fades one into the next. What stays visible
comes from the group norms: each tile is normalised by its own mean and variance, so a tile of sky
and a tile of grass are decoded by different functions. Here the statistics of every norm are taken
once, from crops spread over the whole picture, and hold for all of its tiles. Autoencoders without
group norms need no such statistics. AutoencoderTiny encodes in tiles for latents of 4 channels
alone, so its tiles are encoded here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import nn
from torch.overrides import TorchFunctionMode

# Lengths in latents. A tile is 1024 pixels wide where a latent has 8. The overlap exceeds the 17
# latents or so that the decoder of the SDXL autoencoder sees to each side, so that a tile fades out
# before its border shows. The crops together are as large as a tile, so they need no more memory.
TILE, OVERLAP = 128, 0.25
CROP, CROPS_A_SIDE = 32, 4

Statistics = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def tile_settings(vae: Any) -> Iterator[None]:
    """Let an autoencoder work in tiles of about 1024 x 1024 pixels; restore it afterwards."""
    settings = {"use_tiling": True, **_tile_sizes(vae)}
    before = {name: getattr(vae, name) for name in settings}
    _set(vae, settings)
    try:
        yield
    finally:
        _set(vae, before)


def _tile_sizes(vae: Any) -> dict[str, Any]:
    """Return the attributes that set the tiles of an autoencoder's class."""
    if hasattr(vae, "tile_sample_stride_height"):  # AutoencoderDC
        tile = TILE * 8
        stride = int(tile * (1 - OVERLAP))
        return {
            "tile_sample_min_height": tile,
            "tile_sample_min_width": tile,
            "tile_latent_min_height": tile // vae.spatial_compression_ratio,
            "tile_latent_min_width": tile // vae.spatial_compression_ratio,
            "tile_sample_stride_height": stride,
            "tile_sample_stride_width": stride,
        }
    blocks = vae.config.block_out_channels
    return {
        "tile_latent_min_size": TILE,
        "tile_sample_min_size": TILE * 2 ** (len(blocks) - 1),
        "tile_overlap_factor": OVERLAP,
    }


def _set(vae: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(vae, name, value)


def is_tiled(vae: Any, size: Sequence[int], scale: int) -> bool:
    """Return whether an autoencoder cuts `size` into tiles.

    Args:
        size: height and width, in latents times `scale`.
        scale: units of `size` along the side of a latent.
    """
    if not getattr(vae, "use_tiling", False):
        return False
    if isinstance(vae, AutoencoderTiny):  # as soon as tiling is enabled, for any size
        return True
    if hasattr(vae, "tile_latent_min_height"):
        tiles = vae.tile_latent_min_height, vae.tile_latent_min_width
    else:
        tiles = vae.tile_latent_min_size, vae.tile_latent_min_size
    return any(side > scale * tile for side, tile in zip(size, tiles, strict=True))


def in_tiles(
    vae: Any, run: Callable[[torch.Tensor], torch.Tensor], picture: torch.Tensor, crop: int
) -> torch.Tensor:
    """Encode or decode one picture in the tiles that `vae` is set to.

    Args:
        vae: the autoencoder that `run` calls, with tiling enabled.
        run: maps `(N, C, H, W)`, pixels or latents, to latents or pixels.
        picture: `(1, C, H, W)`.
        crop: side of the crops that the statistics are taken from, in the picture's own unit.
    """
    if isinstance(vae, AutoencoderTiny) and picture.shape[1] == vae.config.in_channels:
        return _encode_tiny(vae, run, picture)
    if not any(isinstance(module, nn.GroupNorm) for module in vae.modules()):
        return run(picture)
    vae.use_tiling = False
    try:
        with RecordedGroupNorms() as norms:
            run(spread_crops(picture, crop))
    finally:
        vae.use_tiling = True
    with FixedGroupNorms(norms.statistics):
        return run(picture)


def _encode_tiny(
    vae: AutoencoderTiny, run: Callable[[torch.Tensor], torch.Tensor], picture: torch.Tensor
) -> torch.Tensor:
    """Encode `(1, 3, H, W)` with the tiles of AutoencoderTiny, with any number of channels."""
    tile, pixels = vae.tile_sample_min_size, vae.spatial_scale_factor
    overlap = int(tile * vae.tile_overlap_factor)
    fade = torch.arange(tile // pixels, device=picture.device) / (overlap / pixels - 1)
    fade = fade.clamp(0, 1)
    height, width = (side // pixels for side in picture.shape[2:])
    latents = torch.zeros(1, vae.config.latent_channels, height, width, device=picture.device)
    vae.use_tiling = False
    try:
        for y in range(0, picture.shape[2], tile - overlap):
            for x in range(0, picture.shape[3], tile - overlap):
                part = run(picture[..., y : y + tile, x : x + tile])
                rows, columns = part.shape[2:]
                weights = (fade if y else torch.ones_like(fade))[:rows, None]
                weights = weights * (fade if x else torch.ones_like(fade))[:columns]
                there = latents[..., y // pixels :, x // pixels :][..., :rows, :columns]
                there.copy_(weights * part + (1 - weights) * there)
    finally:
        vae.use_tiling = True
    return latents


def spread_crops(picture: torch.Tensor, size: int) -> torch.Tensor:
    """Cut square crops of `(1, C, H, W)`, each from the middle of its cell of an even grid.

    Returns:
        `(CROPS_A_SIDE**2, C, size, size)`; smaller where the cells are.
    """
    n = CROPS_A_SIDE
    height, width = (max(1, min(size, length // n)) for length in picture.shape[2:])
    tops, lefts = (
        [int((i + 0.5) * length / n - part / 2) for i in range(n)]
        for length, part in zip(picture.shape[2:], (height, width), strict=True)
    )
    return torch.cat([picture[..., y : y + height, x : x + width] for y in tops for x in lefts])


class _GroupNorms(TorchFunctionMode, ABC):
    """Replace `F.group_norm` while active; modules and their hooks stay untouched."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.group_norm:
            return self.normalise(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @abstractmethod
    def statistics_of(self, grouped: torch.Tensor) -> Statistics:
        """Mean and variance, each `(groups,)`, of `(N, groups, values)`."""

    def normalise(
        self,
        input: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        """`F.group_norm` with the statistics of `statistics_of`, computed in float32 at least."""
        mean, variance = self.statistics_of(input.reshape(len(input), num_groups, -1))
        channels = input.shape[1]
        scale = torch.rsqrt(variance + eps).repeat_interleave(channels // num_groups)
        shift = -mean.repeat_interleave(channels // num_groups) * scale
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        if bias is not None:
            shift = shift + bias
        ends = [1] * (input.ndim - 2)
        result = torch.addcmul(shift.view(-1, *ends), input, scale.view(-1, *ends))
        return result.to(input.dtype)


class RecordedGroupNorms(_GroupNorms):
    """Normalise a batch as if it were one picture, and record each norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: list[Statistics] = []

    def statistics_of(self, grouped: torch.Tensor) -> Statistics:
        grouped = grouped.to(torch.promote_types(grouped.dtype, torch.float32))
        variance, mean = torch.var_mean(grouped, dim=(0, 2), correction=0)
        self.statistics.append((mean, variance))
        return mean, variance


class FixedGroupNorms(_GroupNorms):
    """Normalise by recorded statistics, again and again in the order of recording."""

    def __init__(self, statistics: list[Statistics]) -> None:
        super().__init__()
        self.statistics = statistics
        self.calls = 0

    def statistics_of(self, grouped: torch.Tensor) -> Statistics:
        statistics = self.statistics[self.calls % len(self.statistics)]
        self.calls += 1
        return statistics
