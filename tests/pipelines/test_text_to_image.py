import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image


def test_sampling_follows_the_algorithm(pipe, seeded):
    """The algorithm written out once more."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    text, mask, negative, negative_mask = pipe.encode_prompt("a cat", negative_prompt="blurry")
    conditions = {
        "resolution": torch.tensor([[64.0, 96.0]]),
        "aspect_ratio": torch.tensor([[1.5]]),
    }
    latents = torch.randn(1, 4, 8, 12, generator=seeded())
    with torch.no_grad():
        for t in scheduler.timesteps:
            halves = [
                pipe.transformer(
                    latents,
                    encoder_hidden_states=embeds,
                    encoder_attention_mask=keep,
                    timestep=t[None],
                    added_cond_kwargs=conditions,
                ).sample
                for embeds, keep in ((negative, negative_mask), (text, mask))
            ]
            noise = halves[0] + 7.0 * (halves[1] - halves[0])
            latents = scheduler.step(noise, t, latents).prev_sample
        expected = (pipe.vae.decode(latents / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    made = pipe(
        "a cat",
        negative_prompt="blurry",
        height=64,
        width=96,
        num_inference_steps=4,
        generator=seeded(),
        output_type="pt",
    ).images
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_same_seed_same_picture(pipe, seeded):
    first, again, other = (
        pipe("a cat", num_inference_steps=2, generator=seeded(seed), output_type="pt").images
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_a_batch_gives_the_same_pictures_as_single_calls(pipe, seeded, guidance_scale):
    prompts = ["a cat", "a small red dog on the left of a lake", ""]
    shared = {
        "num_inference_steps": 4,
        "guidance_scale": guidance_scale,
        "output_type": "pt",
        "height": 48,
        "width": 80,
    }
    batch = pipe(prompts, generator=[seeded(i) for i in range(3)], **shared).images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeded(i), **shared).images
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=0)


def test_pictures_are_ordered_by_prompt(pipe, seeded):
    shared = {"num_inference_steps": 2, "output_type": "pt"}
    images = pipe(
        ["a cat", "a dog"],
        negative_prompt=["bad", "blurry"],
        num_images_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
        **shared,
    ).images
    assert images.shape == (4, 3, 64, 64)
    alone = pipe("a dog", negative_prompt="blurry", generator=seeded(2), **shared).images
    torch.testing.assert_close(images[2:3], alone, atol=1e-4, rtol=0)


def test_landscape_after_portrait_is_the_same_as_alone(pipe, seeded):
    def make(height, width):
        return pipe(
            "a cat",
            height=height,
            width=width,
            num_inference_steps=2,
            generator=seeded(),
            output_type="pt",
        ).images

    landscape = make(48, 64)
    portrait = make(64, 48)
    assert landscape.shape == (1, 3, 48, 64)
    assert portrait.shape == (1, 3, 64, 48)
    assert torch.equal(make(48, 64), landscape)


@pytest.mark.parametrize("size", [(16, 16), (16, 80), (112, 48)])
def test_any_multiple_of_sixteen_pixels_is_a_size(pipe, size):
    image = pipe("a cat", height=size[0], width=size[1], num_inference_steps=1).images[0]
    assert image.size == size[::-1]


def test_the_default_size_is_the_transformers(pipe):
    assert pipe("a cat", num_inference_steps=1).images[0].size == (64, 64)


def test_output_types_agree(pipe, seeded):
    def make(kind):
        return pipe("a cat", num_inference_steps=2, generator=seeded(), output_type=kind).images

    tensor, array, pictures, latents = (make(kind) for kind in ("pt", "np", "pil", "latent"))
    assert tensor.shape == (1, 3, 64, 64)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert isinstance(pictures[0], Image.Image)
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert latents.shape == (1, 4, 8, 8)


def test_the_tuple_holds_the_same_as_the_output(pipe, seeded):
    shared = {"num_inference_steps": 2, "output_type": "np"}
    output = pipe("a cat", generator=seeded(), **shared)
    (images,) = pipe("a cat", generator=seeded(), return_dict=False, **shared)
    assert isinstance(output, ImagePipelineOutput)
    assert np.array_equal(output.images, images)


def test_given_latents_replace_drawn_noise(pipe, seeded):
    shared = {"num_inference_steps": 2, "output_type": "pt"}
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    given = pipe("a cat", latents=noise, **shared).images
    assert torch.equal(given, pipe("a cat", generator=seeded(), **shared).images)


def test_embeddings_replace_prompts(pipe, seeded):
    shared = {"num_inference_steps": 2, "output_type": "pt", "num_images_per_prompt": 2}
    text = pipe.encode_prompt(["a cat", "a dog"], negative_prompt="bad")
    names = ("prompt_embeds", "prompt_attention_mask")
    embeds = dict(zip([*names, *(f"negative_{n}" for n in names)], text, strict=True))
    generators = [[seeded(i) for i in range(4)] for _ in range(3)]
    expected = pipe(
        ["a cat", "a dog"], negative_prompt="bad", generator=generators[0], **shared
    ).images
    given = pipe(**embeds, generator=generators[1], **shared).images
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=0)
    positive = {name: embeds[name] for name in names}
    mixed = pipe(**positive, negative_prompt="bad", generator=generators[2], **shared).images
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=0)
