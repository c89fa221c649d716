"""Latent spaces: what is encoded, what is decoded, large pictures, half precision, previews."""

import json

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from localdit.core import latents as latents_module
from localdit.core import tiling
from localdit.core.latents import LatentFormat, LatentSpace
from localdit.pipelines import LocalDiTImg2ImgPipeline
from tests.tiny import request_of, tiny_components, tiny_vae

KINDS = ("sdxl", "sd3", "dc", "tiny", "statistics")
POSTERIOR = ("sdxl", "sd3", "statistics")
PIXELS_PER_LATENT = {kind: 32 if kind == "dc" else 8 for kind in KINDS}
CHANNELS = {"sdxl": 4, "sd3": 16, "dc": 32, "tiny": 16, "statistics": 4}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def vae(kind):
    return made(kind)


def made(kind):
    """An autoencoder with weights from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_vae(kind)


@torch.no_grad()
def raw_latents(vae, pictures):
    """The autoencoder's own latents of pictures in [-1, 1], without any scale or shift."""
    output = vae.encode(pictures, return_dict=False)[0]
    return output.mode() if isinstance(output, DiagonalGaussianDistribution) else output


def random_pixels(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def smooth_pictures(height, width):
    """One picture `(1, 3, height, width)` of soft gradients in [-1, 1]."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    picture = np.stack([np.sin(3 * x + 2 * y), 2 * y - 1, x * y])
    return torch.from_numpy(picture).float()[None]


# Formats


def test_the_format_follows_from_the_configuration_alone(kind, vae, tmp_path):
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert LatentFormat.from_config(config) == LatentSpace(vae).format
    assert LatentFormat.from_config(config).channels == CHANNELS[kind]
    assert LatentFormat.from_config(config).pixels_per_latent == PIXELS_PER_LATENT[kind]


def test_latents_are_standardised_as_each_autoencoder_asks(kind, vae):
    """The formulas, written out by hand for each kind, in float64."""
    pixels = random_pixels(2, 3, 64, 128)
    raw = raw_latents(vae, pixels / 255 * 2 - 1).double()
    if kind == "statistics":
        mean = torch.tensor([0.1, -0.2, 0.3, -0.4]).double().view(1, 4, 1, 1)
        std = torch.tensor([0.5, 1.0, 2.0, 0.25]).double().view(1, 4, 1, 1)
        expected = (raw - mean) * 0.5 / std
    else:
        expected = {
            "sdxl": raw * 0.13025,
            "sd3": (raw - 0.1159) * 0.3611,
            "dc": raw * 0.41407,
            "tiny": raw,
        }[kind]
    latents = LatentSpace(vae).encode_pixels(pixels)
    pixels_per_latent = PIXELS_PER_LATENT[kind]
    assert latents.shape == (2, CHANNELS[kind], 64 // pixels_per_latent, 128 // pixels_per_latent)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_inverts_the_standardisation(kind, vae):
    pictures = smooth_pictures(64, 128)
    space = LatentSpace(vae)
    raw = raw_latents(vae, pictures)
    expected = vae.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(space.decode(space.encode(pictures)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_shift_of_one_half_and_a_scale_of_three_tenths():
    vae = made("sd3")
    vae.register_to_config(shift_factor=0.5, scaling_factor=0.3)
    raw = torch.randn(1, 16, 4, 6)
    space = LatentSpace(vae)
    expected = vae.decode(raw, return_dict=False)[0]
    torch.testing.assert_close(space.decode((raw - 0.5) * 0.3), expected, rtol=1e-4, atol=1e-5)
    assert (space.decode(raw * 0.3) - expected).abs().max() > 0.01  # the shift matters
    pixels = random_pixels(1, 3, 32, 32)
    latents = (raw_latents(vae, pixels / 255 * 2 - 1) - 0.5) * 0.3
    torch.testing.assert_close(space.encode_pixels(pixels), latents, rtol=1e-4, atol=1e-5)


# Training and pipelines


def test_pipelines_encode_to_the_same_bits_as_training(kind, monkeypatch):
    """Training encodes uint8 pictures to the mode; so does image to image, with the mode."""
    pipe = LocalDiTImg2ImgPipeline(**tiny_components(vae=kind))
    pixels = random_pixels(2, 3, 64, 128)
    request = request_of(prompt=["a", "b"], width=128)
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    with torch.no_grad():
        encoded = pipe.encode_images(pixels.float() / 255, request)
    assert torch.equal(encoded, LatentSpace(pipe.vae).encode_pixels(pixels))


@torch.no_grad()
def test_only_a_posterior_is_drawn_from(kind, vae):
    def encode(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        space = LatentSpace(vae)
        return space.encode(smooth_pictures(64, 64), sample=True, generator=generator, **more)

    assert torch.equal(encode(0), encode(1)) == (kind not in POSTERIOR)
    rows = encode(0, repeats=2)
    assert torch.equal(rows[0], rows[1]) == (kind not in POSTERIOR)


def test_bfloat16_is_close_and_gives_float32(kind, vae):
    pixels = random_pixels(1, 3, 64, 64)
    exact, rough = (LatentSpace(vae).encode_pixels(pixels, bf16=bf16) for bf16 in (False, True))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * max(1, exact.abs().max())


# Half precision


@pytest.mark.parametrize(
    ("kind", "force_upcast", "expected"),
    [
        ("sdxl", True, torch.float32),
        ("sdxl", False, torch.float16),
        ("sd3", True, torch.float32),
        ("sd3", False, torch.float16),
        ("statistics", False, torch.float16),
        ("dc", None, torch.float16),
        ("tiny", None, torch.float16),
    ],
)
@torch.no_grad()
def test_float16_is_raised_to_float32_where_the_configuration_asks_for_it(
    kind, force_upcast, expected
):
    vae = made(kind)
    latents = LatentSpace(vae).encode(smooth_pictures(64, 64))
    pictures = LatentSpace(vae).decode(latents)
    if force_upcast is not None:
        vae.register_to_config(force_upcast=force_upcast)
    space = LatentSpace(vae.half())
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    decoded, encoded = space.decode(latents), space.encode(smooth_pictures(64, 64))
    assert (decoded.dtype, encoded.dtype) == (expected, torch.float32)
    torch.testing.assert_close(decoded.float(), pictures, rtol=0, atol=0.05)
    torch.testing.assert_close(encoded, latents, rtol=0.02, atol=0.02)
    after = vae.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert vae.dtype == torch.float16


# Large pictures

TILE = 16  # in latents of 8 pixels


@pytest.fixture
def small_tiles(monkeypatch):
    """Work in tiles of 128 x 128 pixels above 128 x 128 pixels."""
    monkeypatch.setattr(latents_module, "TILING_THRESHOLD", (8 * TILE) ** 2)
    monkeypatch.setattr(tiling, "TILE", TILE)
    monkeypatch.setattr(latents_module, "CROP", 4)


def recorded(vae, part, monkeypatch):
    """The sizes `(H, W)` of what passes through the encoder or the decoder."""
    sizes, module = [], getattr(vae, part)
    forward = module.forward

    def spy(sample, *rest):
        sizes.append(tuple(sample.shape[2:]))
        return forward(sample, *rest)

    monkeypatch.setattr(module, "forward", spy)
    return sizes


@torch.no_grad()
def test_large_pictures_pass_in_tiles_and_leave_the_settings_as_they_were(
    kind, vae, small_tiles, monkeypatch
):
    space = LatentSpace(vae)
    before = {name: value for name, value in vars(vae).items() if "til" in name}
    encoder, decoder = (recorded(vae, part, monkeypatch) for part in ("encoder", "decoder"))
    pictures = smooth_pictures(192, 320)
    latents = space.encode(pictures)
    decoded = space.decode(latents)
    pixels = PIXELS_PER_LATENT[kind]
    assert latents.shape == (1, CHANNELS[kind], 192 // pixels, 320 // pixels)
    assert decoded.shape == pictures.shape
    assert len(encoder) > 4 and len(decoder) > 4
    assert max(max(size) for size in encoder) <= 8 * TILE
    assert max(max(size) for size in decoder) <= 8 * TILE // pixels
    assert {name: value for name, value in vars(vae).items() if "til" in name} == before


@pytest.mark.parametrize("kind", ["dc", "tiny"])
@torch.no_grad()
def test_tiles_leave_no_seams(kind, vae, request):
    """Where tiles meet, neighbouring pixels differ no more than when decoded at once.

    `test_tiling.py` has the test for AutoencoderKL, on trained weights.
    """
    space = LatentSpace(vae)
    latents = space.encode(smooth_pictures(192, 320))
    whole = space.decode(latents)
    request.getfixturevalue("small_tiles")
    tiled = space.decode(latents)
    edges = [*range(95, 130), *range(191, 226)]  # a tile begins at 96 and fades in up to 128

    def steps(picture):
        return (picture[..., 1:] - picture[..., :-1]).abs().mean(dim=(0, 1, 2))[edges].mean()

    assert steps(tiled) < 1.1 * steps(whole) + 0.01
    if kind == "tiny":  # it looks at near pixels alone, so its tiles agree
        torch.testing.assert_close(tiled, whole, rtol=0, atol=0.05)


@torch.no_grad()
def test_tiling_that_a_user_enabled_keeps_its_sizes(kind, vae, monkeypatch):
    space = LatentSpace(vae)
    pictures = smooth_pictures(96, 192)
    latents = space.encode(pictures)
    vae.enable_tiling()
    if kind == "dc":
        vae.enable_tiling(64, 64, 32, 32)
    else:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
        vae.tile_overlap_factor = 0.25
    encoder, decoder = (recorded(vae, part, monkeypatch) for part in ("encoder", "decoder"))
    encoded = space.encode(pictures)
    assert encoded.shape == latents.shape
    assert space.decode(latents).shape == pictures.shape
    assert max(max(size) for size in encoder) <= 64
    assert max(max(size) for size in decoder) <= 64 // PIXELS_PER_LATENT[kind]
    assert vae.use_tiling


@torch.no_grad()
def test_small_pictures_are_not_changed_by_tiling(kind, vae):
    space = LatentSpace(vae)
    pictures = smooth_pictures(64, 64)
    latents = space.encode(pictures)
    decoded = space.decode(latents)
    vae.enable_tiling()
    assert torch.equal(space.encode(pictures), latents)
    assert torch.equal(space.decode(latents), decoded)


# Previews


@torch.no_grad()
def test_previews_have_256_pixels_along_their_longer_side_at_most(kind, vae):
    space, channels = LatentSpace(vae), CHANNELS[kind]
    pixels = PIXELS_PER_LATENT[kind]
    large = space.decode_preview(torch.randn(1, channels, 512 // pixels, 1024 // pixels))
    assert large.shape == (1, 3, 128, 256)
    latents = torch.randn(1, channels, 64 // pixels, 128 // pixels)
    assert torch.equal(space.decode_preview(latents), space.decode(latents))
