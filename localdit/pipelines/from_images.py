"""What the pipelines that start from images share."""

import logging
import math

import torch

from ..core.diffusion import add_noise
from .base import LocalDiTBasePipeline
from .checks import check_one_each
from .image_inputs import scale_images
from .request import Request

logger = logging.getLogger(__name__)


class FromImagesPipeline(LocalDiTBasePipeline):
    """The stages between given images and latents to start from."""

    def size_of(
        self, images: torch.Tensor, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Height and width of the pictures to make, in pixels: as given, or else the images'."""
        pixels = self.vae_scale_factor if self.are_latents(images) else 1
        return (
            pixels * images.shape[2] if height is None else height,
            pixels * images.shape[3] if width is None else width,
        )

    def are_latents(self, images: torch.Tensor) -> bool:
        """Return whether images `(N, C, H, W)` are latents; what has 3 channels is a picture."""
        return images.shape[1] == self.transformer.config.in_channels != 3

    def check_images(self, images: torch.Tensor, request: Request) -> None:
        """Refuse images of another number than the prompts, and latents of another size.

        Raises:
            ValueError: it is so; the message says what to do.
        """
        check_one_each("image", len(images), request.num_prompts)
        size = (request.height // self.vae_scale_factor, request.width // self.vae_scale_factor)
        if self.are_latents(images) and images.shape[2:] != size:
            raise ValueError(
                f"The latents given as image are {tuple(images.shape[2:])}, but height and width "
                f"need {size}. Latents cannot be scaled: leave height and width out."
            )

    def get_timesteps(self, strength: float) -> torch.Tensor:
        """Return the last `int(steps * strength)` steps of the scheduler's timesteps."""
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        steps = math.ceil(len(timesteps) / order)
        kept = int(steps * strength)
        if strength > 0 and kept == 0:
            logger.warning(
                "Strength %g of %d steps is less than one step: no step is taken.", strength, steps
            )
        first = (steps - kept) * order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps[first:]

    def encode_images(self, images: torch.Tensor, request: Request) -> torch.Tensor:
        """Draw latents `(B, C, height / 8, width / 8)` of images `(N, 3, H, W)` in [0, 1].

        Each image is encoded once; each picture then draws its own sample of the posterior. Latents
        are passed through.
        """
        repeats = request.batch_size // len(images)
        images = images.to(self._execution_device)
        if self.are_latents(images):
            return images.repeat_interleave(repeats, dim=0)
        images = scale_images(images, request.height, request.width)
        if self.image_processor.config.do_normalize:
            images = self.image_processor.normalize(images)
        return self.latent_space.encode(
            images, sample=True, generator=request.generator, repeats=repeats
        )

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noise latents `(B, C, h, w)` as at the first of the timesteps to come, if any is.

        The scheduler has to stand at that timestep: those that compute with sigmas go by where they
        stand, not by the timestep.
        """
        if len(timesteps) == 0:
            return latents
        return add_noise(self.scheduler, latents, noise, timesteps[:1])
