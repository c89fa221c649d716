"""Between pictures and latents, in bounded memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .request import Request
from .tiling import CROP, in_tiles, tile_settings

# The most pixels that pass through the autoencoder at once: batches of more do so one picture after
# the other, pictures of more in tiles.
TILING_THRESHOLD = 2048 * 2048


class Sized(Protocol):
    """What has a size in pixels, such as a request."""

    height: int
    width: int


class AutoencodingMixin:
    """Encoding and decoding for a pipeline with an autoencoder."""

    vae: AutoencoderKL
    vae_scale_factor: int
    image_processor: VaeImageProcessor
    maybe_free_model_hooks: Callable[[], None]

    def decode(self, latents: torch.Tensor, request: Request) -> torch.Tensor:
        """Decode latents `(B, C, h, w)` into pictures `(B, 3, 8 h, 8 w)` in [0, 1].

        Where latents are asked for, they are returned as they are.
        """
        if request.output_type == "latent":
            return latents
        with self.vae_for(request) as vae:
            latents = latents.to(vae.dtype) / vae.config.scaling_factor
            latents = latents + (vae.config.shift_factor or 0)
            decoded = self._in_parts(
                lambda part: vae.decode(part, return_dict=False)[0],
                latents,
                request,
            )
        return self.image_processor.postprocess(decoded, output_type="pt")

    def output(self, pictures: torch.Tensor, request: Request) -> ImagePipelineOutput | tuple[Any]:
        """Return what `decode` gave in the form asked for; free offloaded models."""
        images: Any = pictures
        if request.output_type in ("np", "pil"):
            images = self.image_processor.pt_to_numpy(pictures)
        if request.output_type == "pil":
            images = self.image_processor.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if request.return_dict else (images,)

    def posterior_parameters(self, images: torch.Tensor, request: Request) -> torch.Tensor:
        """Encode images `(N, 3, H, W)` in [-1, 1]: mean and log variance `(N, 2 C, H / 8, W / 8)`,
        in float32."""
        with self.vae_for(request) as vae:
            parameters = self._in_parts(
                lambda part: vae.encode(part).latent_dist.parameters,
                images.to(vae.dtype),
                request,
                scale=self.vae_scale_factor,
            )
        return parameters.float()

    @contextmanager
    def vae_for(self, size: Sized) -> Iterator[AutoencoderKL]:
        """Lend the autoencoder as a picture's size needs it, and restore it afterwards.

        It works in tiles above `TILING_THRESHOLD` pixels, and where its user has switched tiling
        on, then with its own sizes of tiles. A float16 one whose configuration has `force_upcast`
        works in float32, because it would overflow.
        """
        vae = self.vae
        large = size.height * size.width > TILING_THRESHOLD
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
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
        request: Request,
        scale: int = 1,
    ) -> torch.Tensor:
        """`run` a batch at once, picture by picture or in tiles, as its size needs it.

        Args:
            scale: how many of its pixels or latents, along a side, make a latent.
        """
        tile = scale * self.vae.tile_latent_min_size
        if self.vae.use_tiling and max(batch.shape[2:]) > tile:
            crop = scale * CROP
            return torch.cat([in_tiles(self.vae, run, one, crop) for one in batch.split(1)])
        if len(batch) * request.height * request.width > TILING_THRESHOLD:
            return torch.cat([run(one) for one in batch.split(1)])
        return run(batch)
