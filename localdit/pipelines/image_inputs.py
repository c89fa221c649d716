"""Images and masks for the pipelines: PIL images, arrays, tensors or latents, read as tensors."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..images import lay_over, load_layer

# A pixel is repainted if its mask has at least this value. Values between 0 and 1 also set how much
# of the new picture is blended into the old one.
REPAINTED = 0.5
LUMINANCE = torch.tensor([19595, 38470, 7471]) / 65536  # Pillow's, of red, green and blue


def read_images(image: Any, latent_channels: int) -> torch.Tensor:
    """Return images as one float32 tensor `(N, 3, H, W)` in [0, 1], and latents unchanged.

    Args:
        image: one of these or a list of them: a PIL image of any mode; an array `(H, W, 3)` or
            `(N, H, W, 3)`, or a tensor `(3, H, W)` or `(N, 3, H, W)`, of floats in [0, 1] or of
            uint8; a tensor of latents `(latent_channels, h, w)` or `(N, latent_channels, h, w)`,
            unless their values are those of a picture with alpha. Arrays may have any strides and
            any order of bytes.
        latent_channels: channels by which latents are recognised.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the list is empty, sizes differ, or values are out of range or not finite.
    """
    images = _read_all("image", image, "RGB", "white", [3], [3, latent_channels])
    if images.shape[1] == 3:
        _check_range("image", images)
    elif _looks_like_a_picture(images):
        raise ValueError(
            f"image has {images.shape[1]} channels, as latents have, but no negative value, so it "
            "seems to be a picture with alpha: give a picture with 3 channels."
        )
    return images


def _looks_like_a_picture(latents: torch.Tensor) -> bool:
    """Return whether values lie in [0, 1], or in [0, 255] far beyond those of latents."""
    if (latents < 0).any() or not (latents > 0).any():
        return False
    return bool(latents.max() <= 1 or latents.max() > 32)


def read_masks(mask_image: Any) -> torch.Tensor:
    """Return masks as one float32 tensor `(N, 1, H, W)` in [0, 1], 1 = repaint.

    Args:
        mask_image: one of these or a list of them: a PIL image of any mode, with transparent pixels
            counted as black; an array `(H, W)`, `(H, W, 1 or 3)` or `(N, H, W, 1 or 3)`, or a
            tensor `(H, W)`, `(1 or 3, H, W)` or `(N, 1 or 3, H, W)`, of floats in [0, 1], of uint8
            or of bool. Of colours, the luminance counts.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the list is empty, sizes differ, values are out of range or not finite, or
            a mask has nothing to repaint.
    """
    masks = _read_all("mask_image", mask_image, "L", "black", [1, 3], [1, 3])
    _check_range("mask_image", masks)
    if masks.shape[1] == 3:
        weights = LUMINANCE.to(masks.device)
        masks = (masks * weights[:, None, None]).sum(dim=1, keepdim=True)
    if (masks.amax(dim=(1, 2, 3)) < REPAINTED).any():
        raise ValueError(
            f"mask_image has no value of {REPAINTED} or more, so nothing would be repainted: make "
            "it white where the picture should change."
        )
    return masks


def scale_images(
    images: torch.Tensor, height: int, width: int, mode: str = "bicubic"
) -> torch.Tensor:
    """Scale pictures or masks `(N, C, H, W)` in [0, 1], without keeping their proportions.

    Masks are scaled with `mode="bilinear"`, because bicubic filters ripple at edges.
    """
    if images.shape[-2:] == (height, width):
        return images
    scaled = F.interpolate(images, (height, width), mode=mode, antialias=True)
    return scaled.clamp(0, 1)


def _read_all(
    name: str,
    given: Any,
    mode: str,
    under: str,
    array_channels: list[int],
    tensor_channels: list[int],
) -> torch.Tensor:
    """Return one input or a list of them as `(N, C, H, W)`; error messages call them `name`.

    Pictures are converted to a mode, those with transparency laid over the colour `under`.
    """
    images = given if isinstance(given, list) else [given]
    if not images:
        raise ValueError(f"{name} is an empty list: give at least one image.")
    tensors = []
    for image in images:
        if isinstance(image, Image.Image):
            flat = lay_over(load_layer(image, name), under).convert(mode)
            tensors.append(_from_array(name, np.array(flat), array_channels))
        elif isinstance(image, np.ndarray):
            tensors.append(_from_array(name, image, array_channels))
        elif isinstance(image, torch.Tensor):
            tensors.append(_from_tensor(name, image, tensor_channels))
        else:
            raise TypeError(
                f"{name} must be a PIL image, a NumPy array, a tensor, or a list of them, got "
                f"{type(image).__name__}."
            )
    sizes = sorted({(t.shape[3], t.shape[2], t.shape[1]) for t in tensors})
    if len(sizes) > 1:
        raise ValueError(
            f"The inputs given as {name} differ in (width, height, channels): "
            f"{', '.join(map(str, sizes))}. Scale them to one size."
        )
    return torch.cat(tensors)


def _from_array(name: str, array: np.ndarray, channels: list[int]) -> torch.Tensor:
    if array.ndim == 2 and 1 in channels:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in channels or 0 in array.shape:
        wanted = " or ".join(map(str, channels))
        raise ValueError(
            f"An array given as {name} must have {wanted} channels, as (H, W, C) or (N, H, W, C); "
            f"got the shape {array.shape}."
        )
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"An array given as {name} must be of floats in [0, 1] or of uint8, got {array.dtype}."
        )
    # PyTorch takes neither negative strides nor foreign orders of bytes.
    dtype = np.uint8 if array.dtype == np.uint8 else np.float32
    values = np.array(array, dtype, order="C")
    return _from_tensor(name, torch.from_numpy(np.moveaxis(values, -1, -3)), channels)


def _from_tensor(name: str, tensor: torch.Tensor, channels: list[int]) -> torch.Tensor:
    if tensor.ndim == 2 and 1 in channels:
        tensor = tensor[None]
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of real numbers, got {tensor.dtype}.")
    if tensor.ndim != 4 or tensor.shape[1] not in channels or 0 in tensor.shape:
        raise ValueError(
            f"{name} must have {' or '.join(map(str, channels))} channels, as (C, H, W) or "
            f"(N, C, H, W); got the shape {tuple(tensor.shape)}."
        )
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} contains NaN or infinite values.")
    return tensor


def _check_range(name: str, images: torch.Tensor) -> None:
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"The values of {name} must lie in [0, 1], or be uint8; these lie in "
            f"[{images.min():g}, {images.max():g}]."
        )
