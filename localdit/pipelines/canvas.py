"""Pictures of which a part is repainted: what is cut out, and how it is put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from .image_inputs import REPAINTED, scale_images, scale_masks

Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels, the latter two exclusive


@dataclass(frozen=True)
class Canvas:
    """Pictures and masks, one of each for all pictures to be made, or one for each prompt.

    Attributes:
        images: `(N, 3, H, W)` in [0, 1].
        masks: `(M, 1, H, W)` in [0, 1], 1 = to be repainted.
        boxes: for each of the max(N, M) pairs, the part that is worked on; None: all of it.
    """

    images: torch.Tensor
    masks: torch.Tensor
    boxes: list[Box] | None = None

    @classmethod
    def scaled(cls, images: torch.Tensor, masks: torch.Tensor, height: int, width: int) -> Canvas:
        """Work on all of the pictures, in the size given."""
        return cls(scale_images(images, height, width), scale_masks(masks, height, width))

    @classmethod
    def around_masks(
        cls, images: torch.Tensor, masks: torch.Tensor, height: int, width: int, padding: int
    ) -> Canvas:
        """Work on what the masks need and `padding` pixels around it, in proportions of
        `height` to `width` where the picture is large enough."""
        regions = [
            VaeImageProcessor.get_crop_region(mask, width, height, padding)
            for mask in VaeImageProcessor.numpy_to_pil(
                (masks >= REPAINTED).float().permute(0, 2, 3, 1).cpu().numpy()
            )
        ]
        count = max(len(images), len(masks))
        return cls(images, masks, [regions[i % len(regions)] for i in range(count)])

    def part(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures and masks to work on, in the size given."""
        if self.boxes is None:
            return self.images, self.masks
        count = len(self.boxes)
        images, masks = [], []
        for box, image, mask in zip(
            self.boxes, _rows(self.images, count), _rows(self.masks, count), strict=True
        ):
            left, top, right, bottom = box
            images.append(scale_images(image[None, :, top:bottom, left:right], height, width))
            masks.append(scale_masks(mask[None, :, top:bottom, left:right], height, width))
        return torch.cat(images), torch.cat(masks)

    def put_back(self, pictures: torch.Tensor) -> torch.Tensor:
        """Lay repainted parts over the pictures, by the masks; where these are 0, nothing changes.

        Args:
            pictures: `(B, 3, height, width)` in [0, 1], what became of the parts.

        Returns:
            `(B, 3, H, W)` in [0, 1], float32.
        """
        images, masks = (
            _rows(whole, len(pictures)).to(pictures.device) for whole in (self.images, self.masks)
        )
        if self.boxes is None:
            return torch.lerp(images, pictures.float(), masks)
        painted = images.clone()
        repeats = len(pictures) // len(self.boxes)
        for row, picture in enumerate(pictures.float()):
            left, top, right, bottom = self.boxes[row // repeats]
            size = bottom - top, right - left
            painted[row, :, top:bottom, left:right] = scale_images(picture[None], *size)[0]
        return torch.lerp(images, painted, masks)


def latents_to_repaint(masks: torch.Tensor, scale: int, rows: int) -> torch.Tensor:
    """Which latents are made anew: those with any pixel that is repainted.

    Args:
        masks: `(M, 1, H, W)` in [0, 1].
        scale: pixels of a latent's side.
        rows: B, the number of pictures.

    Returns:
        `(B, 1, H / scale, W / scale)`, bool.
    """
    return _rows(F.max_pool2d(masks, scale) >= REPAINTED, rows)


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat each row so that there are `count` of them, those of one row together."""
    return tensor.repeat_interleave(count // len(tensor), dim=0)
