"""Large pictures through the autoencoder in tiles, without seams.

Diffusers cuts the picture into overlapping tiles and fades one into the next. What stays visible
comes from the group norms: each tile is normalised by its own mean and variance, so that a tile of
sky and a tile of grass are decoded by different functions. Here the statistics of every norm are
taken once, from crops spread over the whole picture, and hold for all of its tiles. Where the
autoencoder has attention, a tile sees the crops too, for the rest of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.overrides import TorchFunctionMode

# Lengths in latents. A tile is 1024 pixels wide. The overlap exceeds the 17 latents or so that the
# decoder of the SDXL autoencoder sees to each side, so that a tile fades out before its border
# shows. The crops are together as large as a tile, and so need no more memory; below 16 latents a
# crop would be mostly border, and tell little of the picture.
TILE, OVERLAP = 128, 0.25
CROPS_A_SIDE, SMALLEST_CROP = 4, 16

Statistics = tuple[torch.Tensor, torch.Tensor]
Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # keys, values, bias of the logits


@contextmanager
def tile_settings(vae: AutoencoderKL) -> Iterator[None]:
    """Let an autoencoder work in tiles of `TILE` x `TILE` latents; restore it afterwards."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    settings = {
        "use_tiling": True,
        "tile_latent_min_size": TILE,
        "tile_sample_min_size": TILE * scale,
        "tile_overlap_factor": OVERLAP,
    }
    before = {name: getattr(vae, name) for name in settings}
    for name, value in settings.items():
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def in_tiles(
    vae: AutoencoderKL,
    run: Callable[[torch.Tensor], torch.Tensor],
    picture: torch.Tensor,
    scale: int = 1,
) -> torch.Tensor:
    """Encode or decode one picture in the tiles that `vae` is set to.

    Args:
        vae: the autoencoder that `run` calls, tiling switched on.
        run: from `(N, C, H, W)`, pixels or latents, to what it makes of them.
        picture: `(1, C, H, W)`.
        scale: how many of the picture's pixels or latents, along a side, make a latent.
    """
    crop = scale * max(vae.tile_latent_min_size // CROPS_A_SIDE, SMALLEST_CROP)
    vae.use_tiling = False
    try:
        crops = spread_crops(picture, crop)
        with Recording() as recorded:
            run(crops)
    finally:
        vae.use_tiling = True
    with Replay(recorded, picture[0, 0].numel() / crops[:, 0].numel()):
        return run(picture)


def spread_crops(picture: torch.Tensor, size: int) -> torch.Tensor:
    """Square crops of `(1, C, H, W)`, each from the middle of its part of an even grid.

    Returns:
        `(CROPS_A_SIDE**2, C, size, size)`; smaller where the parts of the grid are.
    """
    n = CROPS_A_SIDE
    height, width = (max(1, min(size, length // n)) for length in picture.shape[2:])
    tops, lefts = (
        [int((i + 0.5) * length / n - part / 2) for i in range(n)]
        for length, part in zip(picture.shape[2:], (height, width), strict=True)
    )
    return torch.cat([picture[..., y : y + height, x : x + width] for y in tops for x in lefts])


class _WholePicture(TorchFunctionMode):
    """Stands in for group norms and attention while it is active; modules and their hooks stay
    untouched."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.group_norm:
            return self.normalise(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            key, value, bias = self.seen(*args[1:3])
            return func(args[0], key, value, **kwargs | {"attn_mask": bias})
        return func(*args, **kwargs)

    def statistics_of(self, grouped: torch.Tensor) -> Statistics:
        """Mean and variance, each `(groups,)`, of `(N, groups, values)`."""
        raise NotImplementedError

    def seen(self, key: torch.Tensor, value: torch.Tensor) -> Seen:
        """The keys and values that queries attend to, instead of these, `(N, heads, L, C)`."""
        raise NotImplementedError

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


class Recording(_WholePicture):
    """Treats a batch of crops as one picture, and keeps what `Replay` needs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: list[Statistics] = []
        self.attended: list[tuple[torch.Tensor, torch.Tensor]] = []

    def statistics_of(self, grouped: torch.Tensor) -> Statistics:
        grouped = grouped.to(torch.promote_types(grouped.dtype, torch.float32))
        variance, mean = torch.var_mean(grouped, dim=(0, 2), correction=0)
        self.statistics.append((mean, variance))
        return mean, variance

    def seen(self, key: torch.Tensor, value: torch.Tensor) -> Seen:
        # (N, heads, L, C) -> (1, heads, N L, C), the same for every crop
        together = [x.transpose(0, 1).flatten(1, 2)[None] for x in (key, value)]
        self.attended.append((together[0], together[1]))
        key, value = (x.expand(len(key), -1, -1, -1) for x in together)
        return key, value, None


class Replay(_WholePicture):
    """Treats a tile as a part of the picture that was recorded, over and over in the same order.

    Args:
        recorded: of the picture's crops.
        ratio: the picture's area, in areas of all its crops.
    """

    def __init__(self, recorded: Recording, ratio: float) -> None:
        super().__init__()
        self.recorded, self.ratio = recorded, ratio
        self.norms = self.attentions = 0

    def statistics_of(self, grouped: torch.Tensor) -> Statistics:
        statistics = self.recorded.statistics[self.norms % len(self.recorded.statistics)]
        self.norms += 1
        return statistics

    def seen(self, key: torch.Tensor, value: torch.Tensor) -> Seen:
        others = self.recorded.attended[self.attentions % len(self.recorded.attended)]
        self.attentions += 1
        own, sampled = key.shape[2], others[0].shape[2]
        unseen = self.ratio * sampled - own
        if unseen <= 0:
            return key, value, None
        # Each token of the crops stands for as many that lie outside of the tile.
        bias = key.new_zeros(1, 1, 1, own + sampled)
        bias[..., own:] = math.log(unseen / sampled)
        return torch.cat([key, others[0]], 2), torch.cat([value, others[1]], 2), bias
