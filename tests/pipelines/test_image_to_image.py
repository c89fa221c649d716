import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image

from localdit.pipelines import LocalDiTImg2ImgPipeline
from tests.tiny import request_of


@pytest.fixture
def image(seeded):
    return torch.rand(3, 64, 64, generator=seeded(9))


def change(img2img, image, prompt="a cat", seed=0, **arguments):
    arguments = {"num_inference_steps": 5, "output_type": "latent", **arguments}
    generator = arguments.pop("generator", torch.Generator().manual_seed(seed))
    return img2img(prompt, image=image, generator=generator, **arguments).images


def encoded(img2img, image, generator):
    with torch.no_grad():
        return 0.13025 * img2img.vae.encode(2 * image[None] - 1).latent_dist.sample(generator)


def test_sampling_follows_the_algorithm(img2img, image, seeded):
    """Encode, add the noise of the first remaining timestep, then sample as in text to image."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(5)
    kept = scheduler.timesteps[-3:]
    scheduler.set_begin_index(2)
    generator = seeded()
    latents = encoded(img2img, image, generator)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    alpha = scheduler.alphas_cumprod[kept[0]]
    latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    text, mask, negative, negative_mask = img2img.encode_prompt("a cat")
    conditions = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        for t in kept:
            uncond, cond = img2img.transformer(
                torch.cat([latents, latents]),
                encoder_hidden_states=torch.cat([negative, text]),
                encoder_attention_mask=torch.cat([negative_mask, mask]),
                timestep=t.expand(2),
                added_cond_kwargs=conditions,
            ).sample.chunk(2)
            latents = scheduler.step(uncond + 7 * (cond - uncond), t, latents).prev_sample
    made = change(img2img, image, strength=0.6)
    torch.testing.assert_close(made, latents, atol=1e-4, rtol=0)


def test_the_autoencoders_shift_is_subtracted(img2img, image, seeded):
    img2img.vae.register_to_config(shift_factor=0.5)
    shifted = change(img2img, image, strength=0)
    img2img.vae.register_to_config(shift_factor=None)
    torch.testing.assert_close(shifted, encoded(img2img, image, seeded()) - 0.5 * 0.13025)


def test_more_strength_changes_more(img2img, image, seeded):
    start = encoded(img2img, image, seeded())
    distances = [
        (change(img2img, image, strength=s, num_inference_steps=20) - start).norm().item()
        for s in (0.05, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * distances[-1]


def test_at_strength_0_the_encoded_image_comes_back(img2img, image, calls, seeded):
    latents = change(img2img, image, strength=0)
    torch.testing.assert_close(latents, encoded(img2img, image, seeded()))
    assert not calls
    assert img2img.num_timesteps == 0
    picture = change(img2img, image, strength=0, output_type="pt")
    with torch.no_grad():
        decoded = img2img.vae.decode(latents / 0.13025).sample
    torch.testing.assert_close(picture, (decoded / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), None, "0.5"])
def test_a_strength_outside_of_0_and_1_is_refused(img2img, image, strength, calls):
    with pytest.raises(ValueError, match="strength must be a number from 0 to 1"):
        change(img2img, image, strength=strength)
    assert not calls


def test_a_batch_gives_the_same_pictures_as_single_calls(img2img, seeded):
    images = list(torch.rand(2, 3, 48, 64, generator=seeded()))
    batch = change(
        img2img, images, ["a cat", "a dog"], generator=[seeded(0), seeded(1)], output_type="pt"
    )
    for i, prompt in enumerate(["a cat", "a dog"]):
        alone = change(img2img, images[i], prompt, seed=i, output_type="pt")
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=0)


def test_one_image_is_used_for_all_prompts_with_different_noise(img2img, image, seeded):
    batch = change(
        img2img,
        image,
        ["a cat", "a dog"],
        num_images_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
    )
    alone = change(img2img, image, "a dog", seed=3)
    torch.testing.assert_close(batch[3:], alone, atol=1e-4, rtol=0)
    assert (batch[0] - batch[1]).abs().max() > 1e-3


def test_the_default_size_is_that_of_the_image(img2img):
    picture = Image.new("RGB", (96, 48), "red")
    assert change(img2img, picture, output_type="pil")[0].size == (96, 48)
    assert change(img2img, picture, height=64, width=32).shape == (1, 4, 8, 4)
    assert change(img2img, Image.new("RGB", (50, 33)), height=64, width=32).shape == (1, 4, 8, 4)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_kinds_of_image_agree(img2img, image, kind):
    image = (image * 255).round() / 255
    given = {
        "pt": image,
        "np": image.permute(1, 2, 0).numpy(),
        "pil": Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()),
    }[kind]
    torch.testing.assert_close(change(img2img, given), change(img2img, image))


def test_latents_of_one_pipeline_feed_the_next(pipe, img2img, seeded):
    latents = pipe("a cat", num_inference_steps=2, generator=seeded(), output_type="latent").images
    assert torch.equal(change(img2img, latents, strength=0), latents)
    assert change(img2img, latents, output_type="np").shape == (1, 64, 64, 3)


def test_given_noise_replaces_drawn_noise(img2img, image, seeded):
    generator = seeded()
    encoded(img2img, image, generator)  # what is drawn before the noise
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    torch.testing.assert_close(change(img2img, image, latents=noise), change(img2img, image))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": None}, TypeError, "image must be a PIL image"),
        ({"image": []}, ValueError, "image is an empty list"),
        ({"image": Image.new("RGB", (50, 64))}, ValueError, "width .* got 50; .* 48 or 64"),
        ({"image": np.zeros((64, 64, 4))}, ValueError, "3 channels"),
        ({"image": torch.zeros(2, 3, 64, 64)}, ValueError, "2 images but 1 prompts"),
        ({"image": torch.zeros(4, 8, 8), "height": 32}, ValueError, "cannot be scaled"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"prompt": None}, ValueError, "either prompt or prompt_embeds"),
    ],
)
def test_bad_input_is_refused_before_any_work(img2img, calls, image, arguments, error, message):
    with pytest.raises(error, match=message):
        img2img(**{"prompt": "a cat", "image": image, **arguments})
    assert not calls


def test_a_large_image_is_encoded_in_tiles(img2img, monkeypatch):
    tiled = []
    encode = img2img.vae._tiled_encode
    monkeypatch.setattr(img2img.vae, "_tiled_encode", lambda x: (tiled.append(1), encode(x))[1])
    monkeypatch.setattr("localdit.core.latents.TILING_THRESHOLD", 64 * 64)
    monkeypatch.setattr("localdit.core.tiling.TILE", 8)
    assert change(img2img, torch.zeros(3, 96, 96)).isfinite().all()
    assert tiled
    assert not img2img.vae.use_tiling


def test_half_precision_is_finite(image):
    from localdit.pipelines import LocalDiTImg2ImgPipeline
    from tests.tiny import tiny_components

    half = LocalDiTImg2ImgPipeline(**tiny_components()).to(torch.float16)
    half.set_progress_bar_config(disable=True)
    result = change(half, image, output_type="pt")
    assert result.isfinite().all()
    assert half.vae.dtype == torch.float16


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("strength", [0.1, 0.29, 0.5, 0.8, 1.0])
def test_the_last_steps_are_taken(img2img, steps, strength):
    kept = img2img.set_timesteps(request_of(num_inference_steps=steps, strength=strength))
    assert len(kept) == int(steps * strength)
    assert torch.equal(kept, img2img.scheduler.timesteps[steps - len(kept) :])
    assert img2img.scheduler.begin_index == steps - len(kept)


def test_a_strength_below_one_step_gives_a_warning(img2img, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(img2img.set_timesteps(request_of(num_inference_steps=5, strength=0.1))) == 0
    assert "Strength 0.1 of 5 steps is less than one step" in caplog.text


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_the_noise_is_that_of_the_first_timestep_to_come(img2img, scheduler, seeded):
    """The result is `alpha x + sigma n`, or `x + sigma n` for schedulers with sigmas."""
    pipe = LocalDiTImg2ImgPipeline(**{**img2img.components, "scheduler": scheduler()})
    schedule = pipe.set_timesteps(request_of(num_inference_steps=10, strength=0.5))
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    noised = pipe.add_noise(latents, noise, schedule)
    alpha = pipe.scheduler.alphas_cumprod[schedule[0].long()]
    if scheduler is not DDIMScheduler:
        noised = noised * alpha.sqrt()
    expected = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(noised, expected, atol=2e-3, rtol=0)
    assert torch.equal(pipe.add_noise(latents, noise, schedule[10:]), latents)


@pytest.mark.parametrize(
    ("steps", "strength", "warned"), [(4, 0.8, True), (4, 1.0, False), (12, 0.8, False)]
)
def test_pndm_with_few_steps_from_a_picture_gives_a_warning(
    img2img, caplog, steps, strength, warned
):
    pndm = LocalDiTImg2ImgPipeline.from_pipe(img2img, scheduler=PNDMScheduler(skip_prk_steps=True))
    pndm("a cat", torch.zeros(3, 32, 32), strength, num_inference_steps=steps)
    assert ("PNDMScheduler ends a step before" in caplog.text) == warned
