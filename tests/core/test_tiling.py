"""Tiles leave no seams: in pictures of sky over grass, which group norms see differently."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from localdit.core import latents as autoencoding
from localdit.core import tiling
from localdit.core.tiling import FixedGroupNorms, RecordedGroupNorms, in_tiles, spread_crops
from tests.tiny import tiny_components, tiny_pipeline

HEIGHT, WIDTH, TILE = 384, 768, 48


@pytest.fixture(scope="module")
def vae():
    """An autoencoder with group norms, trained on scenes, in tiles of 48 x 48 latents."""
    vae = AutoencoderKL.from_pretrained(Path(__file__).parents[1] / "data/autoencoder").eval()
    vae.tile_latent_min_size, vae.tile_sample_min_size = TILE, 8 * TILE
    vae.tile_overlap_factor = 1 / 3
    return vae


@pytest.fixture(scope="module")
def landscape():
    """A smooth sky, with rough ground under its right half, `(1, 3, HEIGHT, WIDTH)`."""
    y, x = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j]
    sky = np.stack([0.5 + 0.3 * np.sin(2 * x + 2 * y), 0.2 + 0.6 * y, 0.3 + 0.4 * x * y])
    ground = 0.4 * sky + 0.5 * np.random.default_rng(0).random((1, HEIGHT, WIDTH))
    picture = np.where((y > 0.5) & (x > 0.5), ground, sky)
    return torch.from_numpy(picture).float()[None] * 2 - 1


@pytest.fixture(scope="module")
def latents(vae, landscape):
    with torch.no_grad():
        return vae.encode(landscape).latent_dist.mode()


@torch.no_grad()
def decode(vae, latents):
    return vae.decode(latents, return_dict=False)[0]


@pytest.fixture(scope="module")
def reference(vae, latents):
    """The landscape, decoded at once."""
    return decode(vae, latents)


@torch.no_grad()
def tiled(vae, run, values, crop):
    vae.use_tiling = True
    try:
        with torch.no_grad():
            return in_tiles(vae, run, values, crop)
    finally:
        vae.use_tiling = False


def seams(picture, reference):
    """In 255ths: how far the error of the sky drifts from tile to tile, and the mean error."""
    error = (picture.clamp(-1, 1) - reference.clamp(-1, 1))[0] * 255 / 2
    sky = error[:, 8 : int(0.4 * HEIGHT)].mean(1)  # (3, WIDTH): of columns
    drift = sky.amax(1) - sky.amin(1)
    return float(drift.max()), float(error.abs().mean())


def test_no_seam_is_left_and_diffusers_own_tiles_leave_some(vae, latents, reference):
    """Measured: a drift of 5 with shared statistics and of 48 without, a mean error of 1 and 7."""
    drift, error = seams(tiled(vae, lambda z: decode(vae, z), latents, 32), reference)
    own_drift, own_error = seams(vae_tiles(vae, latents), reference)
    assert error < 3 < own_error
    assert drift < 12 < own_drift


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        pytest.param(
            {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.0, 2.0, 0.25]},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_seam_is_left_with_a_shift_or_statistics(vae, latents, reference, settings, monkeypatch):
    monkeypatch.setattr(vae, "_internal_dict", vae.config)
    vae.register_to_config(**settings)
    space = autoencoding.LatentSpace(vae)
    monkeypatch.setattr(vae, "use_tiling", True)
    with torch.no_grad():
        picture = space.decode(space.format.standardize(latents))
    drift, error = seams(picture, reference)
    assert error < 3
    assert drift < 12


@torch.no_grad()
def vae_tiles(vae, latents):
    vae.use_tiling = True
    try:
        return vae.decode(latents, return_dict=False)[0]
    finally:
        vae.use_tiling = False


def test_encoding_in_tiles_agrees_with_encoding_at_once(vae, landscape, latents):
    def encode(pixels):
        return vae.encode(pixels).latent_dist.mode()

    with torch.no_grad():
        vae.use_tiling = True
        own = encode(landscape)
        vae.use_tiling = False
    error = (tiled(vae, encode, landscape, 256) - latents).abs().mean()
    assert error < 0.3 * (own - latents).abs().mean()


# The norms


@pytest.mark.parametrize("shape", [(1, 6, 5, 7), (1, 6, 11)])
def test_recorded_statistics_give_back_group_norm(shape):
    norm = torch.nn.GroupNorm(3, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 * torch.randn(shape) + 2
    with RecordedGroupNorms() as norms:
        recorded = norm(x)
    torch.testing.assert_close(recorded, norm(x))
    with FixedGroupNorms(norms.statistics):
        torch.testing.assert_close(norm(x), recorded)
        scaled = norm(2 * x)  # is not brought back to where it was
    assert (scaled - recorded).abs().max() > 0.5
    torch.testing.assert_close(norm(2 * x), norm(x), atol=1e-4, rtol=0)


def test_half_precision_keeps_its_dtype_and_computes_in_float32():
    norm = torch.nn.GroupNorm(2, 4).to(torch.bfloat16)
    x = (100 + torch.randn(1, 4, 8, 8)).to(torch.bfloat16)
    with RecordedGroupNorms() as norms:
        assert norm(x).dtype == torch.bfloat16
    assert norms.statistics[0][0].dtype == torch.float32
    with FixedGroupNorms(norms.statistics):
        torch.testing.assert_close(norm(x), norm.float()(x.float()).to(x.dtype))


def test_a_batch_is_recorded_as_one_picture():
    norm, x = torch.nn.GroupNorm(1, 2), torch.randn(3, 2, 4, 4)
    with RecordedGroupNorms():
        together = norm(x)
    assert torch.allclose(together.mean(), torch.zeros(()), atol=1e-5)
    assert together.mean((1, 2, 3)).abs().max() > 0.01


def test_crops_are_spread_evenly_over_a_picture():
    picture = torch.arange(100.0).view(1, 1, 10, 10)
    crops = spread_crops(picture, 2)
    assert crops.shape == (16, 1, 2, 2)
    assert crops[0, 0].tolist() == [[0, 1], [10, 11]]
    assert crops[-1, 0, -1, -1] == 88
    assert len({int(crop[0, 0, 0]) for crop in crops}) == 16
    assert spread_crops(picture, 5).shape == (16, 1, 2, 2)  # no wider than their parts
    assert spread_crops(picture[:, :, :3], 2).shape == (16, 1, 1, 2)


# In the pipeline


def decoded_sizes(pipe, monkeypatch):
    sizes = []
    decoder = pipe.vae.decoder.forward
    monkeypatch.setattr(
        pipe.vae.decoder,
        "forward",
        lambda z, *rest: (sizes.append(tuple(z.shape[i] for i in (0, 2, 3))), decoder(z, *rest))[1],
    )
    return sizes


def test_a_large_batch_is_decoded_one_picture_after_the_other(monkeypatch, seeded):
    pipe = tiny_pipeline()
    generators = [[seeded(i) for i in range(3)] for _ in range(2)]
    arguments = {"num_inference_steps": 1, "output_type": "pt"}
    together = pipe(["a", "b", "c"], generator=generators[0], **arguments).images
    monkeypatch.setattr(autoencoding, "TILING_THRESHOLD", 2 * 64 * 64)
    sizes = decoded_sizes(pipe, monkeypatch)
    one_by_one = pipe(["a", "b", "c"], generator=generators[1], **arguments).images
    assert sizes == [(1, 8, 8)] * 3
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=0)


def test_no_part_of_a_large_picture_exceeds_a_tile(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(autoencoding, "TILING_THRESHOLD", 64 * 64)
    monkeypatch.setattr(tiling, "TILE", 8)
    monkeypatch.setattr(autoencoding, "CROP", 2)
    sizes = decoded_sizes(pipe, monkeypatch)
    pipe("a", height=160, width=160, num_inference_steps=1)
    assert sizes[0] == (16, 2, 2)
    assert len(sizes) == 1 + 16
    assert max(n * h * w for n, h, w in sizes) == 8 * 8


def test_tiles_that_a_user_switched_on_keep_their_size(monkeypatch):
    pipe = tiny_pipeline()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
    sizes = decoded_sizes(pipe, monkeypatch)
    pipe("a", num_inference_steps=1)
    assert set(sizes[1:]) <= {(1, h, w) for h in (2, 4) for w in (2, 4)}
    assert pipe.vae.tile_latent_min_size == 4


def test_an_offloaded_autoencoder_decodes_in_tiles(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(autoencoding, "TILING_THRESHOLD", 64 * 64)
    monkeypatch.setattr(tiling, "TILE", 8)
    arguments = {"height": 96, "width": 96, "num_inference_steps": 1, "output_type": "pt"}
    expected = pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(offloaded, expected)
    pipe.remove_all_hooks()
    from accelerate import cpu_offload

    cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    layerwise = pipe("a", generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(layerwise, expected)


def test_other_autoencoders_without_group_norms_are_left_alone():
    components = tiny_components()
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    picture = torch.randn(1, 4, 16, 16)
    assert torch.equal(in_tiles(components["vae"], conv, picture, 4), conv(picture))


@torch.no_grad()
def test_the_tiny_autoencoder_encodes_in_the_same_tiles_as_diffusers():
    torch.manual_seed(0)
    vae = AutoencoderTiny(num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).eval()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_overlap_factor = 64, 0.25
    picture = torch.rand(1, 3, 128, 160)
    own = in_tiles(vae, lambda part: vae.encode(part).latents, picture, 8 * tiling.CROP)
    assert torch.equal(own, vae.encode(picture).latents)
    assert vae.use_tiling
