import pytest
import torch

from localdit.core.latents import LatentSpace
from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def vae():
    return tiny_components()["vae"]


def test_pictures_are_encoded_to_scaled_modes(vae):
    pixels = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    latents = LatentSpace(vae).encode_pixels(pixels)
    with torch.no_grad():
        mode = vae.encode(pixels / 255 * 2 - 1).latent_dist.mode()
    assert latents.shape == (2, 4, 32 // 8, 8)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, mode * 0.13025, rtol=1e-4, atol=1e-5)
    rough = LatentSpace(vae).encode_pixels(pixels, bf16=True)
    assert rough.dtype == torch.float32
    assert 0 < (rough - latents).abs().max() < 0.1
