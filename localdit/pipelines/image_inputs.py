"""Images as the pipelines take them in: files' pictures, arrays, tensors, or latents."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..images import load_image


def read_images(image: Any, latent_channels: int) -> torch.Tensor:
    """Return images as one float32 tensor `(N, 3, H, W)` in [0, 1], latents as they are.

    Args:
        image: one of these or a list of them: a PIL image of any mode; an array `(H, W, 3)` or
            `(N, H, W, 3)`, or a tensor `(3, H, W)` or `(N, 3, H, W)`, of floats in [0, 1] or of
            uint8; a tensor of latents `(latent_channels, h, w)` or `(N, latent_channels, h, w)`.
        latent_channels: what tells latents from pictures.

    Raises:
        TypeError: it is nothing of the kind.
        ValueError: there are none, their sizes differ, or values are out of range or not finite.
    """
    images = image if isinstance(image, list) else [image]
    if not images:
        raise ValueError("image is an empty list: give at least one image.")
    tensors = [_read(one, latent_channels) for one in images]
    sizes = sorted({(t.shape[3], t.shape[2], t.shape[1]) for t in tensors})
    if len(sizes) > 1:
        raise ValueError(
            "The images differ in (width, height, channels): "
            f"{', '.join(map(str, sizes))}. Scale them to one size."
        )
    return torch.cat(tensors)


def scale_images(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale pictures `(N, 3, H, W)` in [0, 1] to `height` x `width`, not keeping proportions."""
    if images.shape[-2:] == (height, width):
        return images
    scaled = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    return scaled.clamp(0, 1)


def _read(image: Any, latent_channels: int) -> torch.Tensor:
    """Return one input as `(N, C, H, W)`."""
    channels: tuple[int, ...] = (3,)
    if isinstance(image, Image.Image):
        image = np.array(load_image(image))
    if isinstance(image, np.ndarray):
        if image.ndim not in (3, 4):
            raise ValueError(
                f"An image array must have shape (H, W, 3) or (N, H, W, 3), got {image.shape}."
            )
        tensor = torch.from_numpy(np.moveaxis(image, -1, -3))
    elif isinstance(image, torch.Tensor):
        tensor = image
        channels = (3, latent_channels)
    else:
        raise TypeError(
            "image must be a PIL image, a NumPy array, a tensor, or a list of them, got "
            f"{type(image).__name__}."
        )
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim != 4 or tensor.shape[1] not in channels or 0 in tensor.shape:
        raise ValueError(
            f"An image must have {' or '.join(map(str, channels))} channels, as (C, H, W) or "
            f"(N, C, H, W); got the shape {tuple(tensor.shape)}."
        )
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError("image contains NaN or infinite values.")
    if tensor.shape[1] == 3 and (tensor.min() < 0 or tensor.max() > 1):
        raise ValueError(
            "The values of an image must lie in [0, 1], or be uint8; these lie in "
            f"[{tensor.min():g}, {tensor.max():g}]."
        )
    return tensor
