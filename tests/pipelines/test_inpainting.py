import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from localdit.pipelines import LocalDiTInpaintPipeline
from localdit.pipelines.inpainting import Canvas, latents_to_repaint
from tests.tiny import request_of, tiny_components


@pytest.fixture
def image(seeded):
    return (255 * torch.rand(3, 64, 64, generator=seeded(9))).round() / 255


@pytest.fixture
def mask():
    """The right half."""
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    return mask


def repaint(inpaint, image, mask, prompt="a cat", seed=0, **arguments):
    arguments = {"num_inference_steps": 4, "output_type": "pt", **arguments}
    generator = arguments.pop("generator", torch.Generator().manual_seed(seed))
    return inpaint(prompt, image, mask, generator=generator, **arguments).images


def as_picture(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).squeeze().numpy())


def with_scheduler(inpaint, scheduler):
    pipeline = LocalDiTInpaintPipeline(**{**inpaint.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_sampling_follows_the_algorithm(inpaint, image, mask, seeded):
    """As image to image, but after each step the left half is put back, with that step's noise."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(5)
    kept = scheduler.timesteps[-3:]
    scheduler.set_begin_index(2)
    generator = seeded()
    with torch.no_grad():
        encoded = inpaint.vae.encode(2 * image[None] - 1).latent_dist.sample(generator) * 0.13025
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    alphas = [*scheduler.alphas_cumprod[kept], torch.tensor(1.0)]
    levels = [alpha.sqrt() * encoded + (1 - alpha).sqrt() * noise for alpha in alphas]
    latents = levels[0]
    text, text_mask, negative, negative_mask = inpaint.encode_prompt("a cat")
    conditions = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    for i, t in enumerate(kept):
        with torch.no_grad():
            uncond, cond = inpaint.transformer(
                torch.cat([latents, latents]),
                encoder_hidden_states=torch.cat([negative, text]),
                encoder_attention_mask=torch.cat([negative_mask, text_mask]),
                timestep=t.expand(2),
                added_cond_kwargs=conditions,
            ).sample.chunk(2)
        latents = scheduler.step(uncond + 7 * (cond - uncond), t, latents).prev_sample
        latents[..., :4] = levels[i + 1][..., :4]
    arguments = {"strength": 0.6, "num_inference_steps": 5}
    made = repaint(inpaint, image, mask, output_type="latent", **arguments)
    torch.testing.assert_close(made, latents, atol=1e-4, rtol=0)
    with torch.no_grad():
        decoded = (inpaint.vae.decode(latents / 0.13025).sample / 2 + 0.5).clamp(0, 1)
    decoded[..., :32] = image[..., :32]
    torch.testing.assert_close(repaint(inpaint, image, mask, **arguments), decoded)


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
@pytest.mark.parametrize("padding", [None, 8])
def test_the_unmasked_part_is_kept_to_the_bit(inpaint, image, mask, output_type, padding):
    made = repaint(inpaint, image, mask, output_type=output_type, padding_mask_crop=padding)
    expected = image.permute(1, 2, 0).numpy()
    if output_type == "pil":
        made, expected = np.array(made[0]), np.array(as_picture(image))
    elif output_type == "pt":
        made = made[0].permute(1, 2, 0).numpy()
    else:
        made = made[0]
    assert (made[:, :32] == expected[:, :32]).all()
    assert (made[:, 32:] != expected[:, 32:]).mean() > 0.9


FEW_STEPS = ["LCMScheduler", "TCDScheduler"]  # they take all steps, whatever the strength
# Without PNDM, whose repeated timesteps the pipelines refuse, and EDM, which is for other models.
SCHEDULERS = sorted(
    {kind.name for kind in KarrasDiffusionSchedulers} - {"PNDMScheduler", "EDMEulerScheduler"}
)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", [*SCHEDULERS, *FEW_STEPS])
def test_the_kept_part_has_the_noise_that_every_scheduler_expects(inpaint, name, strength):
    """A denoiser that knows the image keeps it at the level of noise that the scheduler goes on
    from. What is put back must be at the same level: so much of the image, so much noise."""
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError as missing:
        pytest.skip(str(missing).strip().splitlines()[0])
    scheduler.register_to_config(clip_sample=False)
    pipe = with_scheduler(inpaint, scheduler)
    schedule = pipe.set_timesteps(request_of(num_inference_steps=8, strength=strength))
    generator = torch.Generator().manual_seed(0)
    encoded, noise, start = torch.randn(3, 1, 4, 128, 128, generator=generator)
    latents = pipe.add_noise(encoded, start, schedule)
    keep = pipe.keeping(encoded, noise, torch.zeros(1, 1, 128, 128, dtype=torch.bool), schedule)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    compared = 0
    for index, timestep in enumerate(schedule):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = noise_in(scaled, encoded, scheduler, timestep)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        kept = keep(latents, index)
        if kept is not latents and index + 1 < len(schedule):
            spread = latents.std().item()
            torch.testing.assert_close(kept.std().item(), spread, rtol=0.02, atol=0)
            shares = [(one * encoded).mean().item() for one in (kept, latents)]
            torch.testing.assert_close(*shares, rtol=0, atol=0.02 * spread)
            compared += 1
    assert torch.equal(kept, encoded)
    assert compared == (8 if name in FEW_STEPS else int(8 * strength)) - 1


def noise_in(scaled, encoded, scheduler, timestep):
    """Return what a perfect model would predict for these inputs."""
    alphas, steps = scheduler.alphas_cumprod.numpy(), range(len(scheduler.alphas_cumprod))
    alpha = torch.tensor(np.interp(float(timestep), steps, alphas)).float()
    return (scaled - alpha.sqrt() * encoded) / (1 - alpha).sqrt()


def test_at_strength_1_the_masked_part_of_the_image_does_not_matter(inpaint, mask, seeded):
    latents, other = torch.randn(2, 4, 8, 8, generator=seeded())
    other[..., :4] = latents[..., :4]
    made = [repaint(inpaint, one, mask, output_type="latent") for one in (latents, other)]
    assert torch.equal(*made)
    made = [
        repaint(inpaint, one, mask, output_type="latent", strength=0.5) for one in (latents, other)
    ]
    assert (made[0] - made[1])[..., 4:].abs().max() > 0.1


def test_at_strength_0_the_masked_part_is_encoded_and_decoded(inpaint, img2img, image, mask, calls):
    made = repaint(inpaint, image, mask, strength=0)
    rendered = repaint(img2img, image, 0.0)
    assert not calls
    assert torch.equal(made[..., :32], image[None, ..., :32])
    torch.testing.assert_close(made[..., 32:], rendered[..., 32:])


def test_a_batch_gives_the_same_pictures_as_single_calls(inpaint, image, mask, seeded):
    images, masks = [image, 1 - image], [mask, mask.flip(-1)]
    prompts = ["a cat", "a dog"]
    generators = [seeded(i) for i in range(4)]
    for padding in (None, 4):
        arguments = {"num_images_per_prompt": 2, "padding_mask_crop": padding}
        batch = repaint(inpaint, images, masks, prompts, generator=generators, **arguments)
        generators = [seeded(i) for i in range(4)]
        for i in range(4):
            one = images[i // 2], masks[i // 2], prompts[i // 2]
            alone = repaint(inpaint, *one, seed=i, padding_mask_crop=padding)
            torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", [None, 4])
def test_one_image_or_mask_is_used_for_all_prompts(inpaint, image, mask, seeded, padding):
    prompts = ["a cat", "a dog"]
    masks = [mask, mask.flip(-1)]
    several = repaint(
        inpaint, image, masks, prompts, generator=[seeded(0), seeded(1)], padding_mask_crop=padding
    )
    alone = repaint(inpaint, image, masks[1], "a dog", seed=1, padding_mask_crop=padding)
    torch.testing.assert_close(several[1:], alone, atol=1e-4, rtol=0)
    one = repaint(inpaint, [image, image], mask, prompts, generator=[seeded(0), seeded(1)])
    assert torch.equal(one[..., :32], image[None, ..., :32].expand(2, -1, -1, -1))


def test_kinds_of_image_and_mask_agree(inpaint, image, mask):
    expected = repaint(inpaint, image, mask)
    arrays = image.permute(1, 2, 0).numpy(), mask[0].numpy()
    pictures = as_picture(image), as_picture(mask)
    for given in (arrays, pictures):
        torch.testing.assert_close(repaint(inpaint, *given), expected)


def test_a_picture_is_scaled_or_cut_to_sizes_that_work(inpaint):
    picture = Image.effect_noise((50, 33), 50).convert("RGB")
    mask = np.zeros((33, 50))
    mask[4:12, 4:12] = 1
    size = {"height": 48, "width": 64}
    assert repaint(inpaint, picture, mask, **size).shape == (1, 3, 48, 64)
    made = repaint(inpaint, picture, mask, padding_mask_crop=2, output_type="pil", **size)[0]
    assert made.size == (50, 33)
    assert (np.array(made)[mask == 0] == np.array(picture)[mask == 0]).all()
    assert (np.array(made)[mask == 1] != np.array(picture)[mask == 1]).any()


def test_a_blurred_mask_hides_the_seam(inpaint, image, mask):
    blurred = inpaint.mask_processor.blur(as_picture(mask), blur_factor=4)
    made = repaint(inpaint, image, blurred)
    sharp = repaint(inpaint, image, mask)
    soft = torch.from_numpy(np.array(blurred)) / 255
    torch.testing.assert_close(
        made[..., 34:], torch.lerp(image[None], sharp, soft)[..., 34:], atol=1e-4, rtol=0
    )
    assert torch.equal(made[..., :16], image[None, ..., :16])


def test_latents_are_accepted_and_returned(inpaint, pipe, image, mask, seeded):
    latents = pipe("a cat", num_inference_steps=2, generator=seeded(), output_type="latent").images
    made = repaint(inpaint, latents, mask, output_type="latent")
    assert torch.equal(made[..., :4], latents[..., :4])
    assert (made[..., 4:] - latents[..., 4:]).abs().min() > 0
    assert repaint(inpaint, latents, mask).shape == (1, 3, 64, 64)


def test_callbacks_see_the_kept_part_and_can_interrupt(inpaint, image, mask, calls, seeded):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        seen.append(tensors["latents"])
        pipeline._interrupt = index == 2

    generator = seeded()
    encoded = inpaint.encode_images(image[None], request_of(generator=generator))
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    repaint(inpaint, image, mask, callback_on_step_end=callback, num_inference_steps=4)
    assert len(seen) == len(calls) == 3
    alphas = inpaint.scheduler.alphas_cumprod[inpaint.scheduler.timesteps[1:]]
    for latents, alpha in zip(seen, alphas, strict=True):
        level = alpha.sqrt() * encoded + (1 - alpha).sqrt() * noise
        torch.testing.assert_close(latents[..., :4], level[..., :4])


def test_given_noise_replaces_drawn_noise(inpaint, image, mask, seeded):
    generator = seeded()
    request = request_of(generator=generator)
    inpaint.encode_images(image[None], request)  # what is drawn before the noise
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    expected = repaint(inpaint, image, mask)
    torch.testing.assert_close(repaint(inpaint, image, mask, latents=noise), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": None}, TypeError, "image must be a PIL image"),
        ({"mask_image": None}, TypeError, "mask_image must be a PIL image"),
        ({"mask_image": torch.zeros(1, 64, 64)}, ValueError, "nothing would be repainted"),
        ({"mask_image": torch.ones(1, 32, 64)}, ValueError, "is 64 x 32 pixels, the image 64 x 64"),
        ({"mask_image": torch.ones(2, 1, 64, 64)}, ValueError, "2 masks but 1 prompts"),
        ({"image": torch.zeros(2, 3, 64, 64)}, ValueError, "2 images but 1 prompts"),
        ({"image": torch.zeros(4, 8, 8), "padding_mask_crop": 4}, ValueError, "not of latents"),
        ({"output_type": "latent", "padding_mask_crop": 4}, ValueError, "not of latents"),
        ({"padding_mask_crop": -1}, ValueError, "padding_mask_crop must be an integer of at least"),
        ({"padding_mask_crop": 2.5}, ValueError, "padding_mask_crop must be an integer"),
        ({"strength": 1.1}, ValueError, "strength must be a number from 0 to 1"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps"),
        ({"prompt": None}, ValueError, "either prompt or prompt_embeds"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    inpaint, calls, image, mask, arguments, error, message
):
    with pytest.raises(error, match=message):
        inpaint(**{"prompt": "a cat", "image": image, "mask_image": mask, **arguments})
    assert not calls


def test_half_precision_is_finite_and_keeps_the_picture(image, mask):
    half = LocalDiTInpaintPipeline(**tiny_components()).to(torch.float16)
    half.set_progress_bar_config(disable=True)
    made = repaint(half, image, mask)
    assert made.isfinite().all()
    assert torch.equal(made[..., :32], image[None, ..., :32])


# The canvas


@pytest.fixture
def images(seeded):
    return torch.rand(1, 3, 96, 64, generator=seeded(3))


def box_mask(left, top, right, bottom, height=96, width=64):
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask


def test_only_the_masked_part_is_replaced(images):
    mask = box_mask(10, 20, 30, 50)
    canvas = Canvas(images, mask)
    assert torch.equal(canvas.pictures(96, 64), images)
    result = canvas.put_back(torch.full((2, 3, 96, 64), 0.25))
    inside = mask.bool().expand(2, 3, -1, -1)
    assert (result[inside] == 0.25).all()
    assert torch.equal(result[~inside], images.expand(2, -1, -1, -1)[~inside])


def test_soft_masks_blend(images):
    canvas = Canvas(images, torch.full((1, 1, 96, 64), 0.75))
    result = canvas.put_back(torch.ones(1, 3, 96, 64))
    torch.testing.assert_close(result, 0.75 + 0.25 * images)


def test_pictures_are_scaled_to_the_requested_size(images):
    canvas = Canvas(images, box_mask(0, 0, 64, 48))
    assert canvas.pictures(48, 32).shape == (1, 3, 48, 32)
    result = canvas.put_back(torch.full((1, 3, 48, 32), 2.0))
    assert result.shape == (1, 3, 48, 32)
    assert result[..., :23, :].min() > 1.4
    assert result[..., 25:, :].max() <= 1


def test_the_crop_around_a_mask_is_cut_out_and_put_back(images):
    mask = box_mask(20, 40, 28, 48)
    canvas = Canvas.around_masks(images, mask, 64, 64, padding=4)
    assert canvas.boxes == [(16, 36, 32, 52)]
    part = canvas.pictures(64, 64)
    assert part.shape == (1, 3, 64, 64)
    torch.testing.assert_close(part.mean(), images[..., 36:52, 16:32].mean(), atol=1e-2, rtol=0)
    repaint = canvas.latents_to_repaint(8, 8)
    assert repaint[..., 2:6, 2:6].all()
    assert repaint.sum() == 16
    result = canvas.put_back(torch.full((1, 3, 64, 64), 0.25))
    inside = mask.bool().expand(1, 3, -1, -1)
    torch.testing.assert_close(result[inside], torch.full_like(result[inside], 0.25))
    assert torch.equal(result[~inside], images[~inside])


def test_a_crop_has_the_requested_proportions_and_lies_within_the_picture(images):
    wide = Canvas.around_masks(images, box_mask(0, 0, 8, 8), 32, 64, padding=0)
    assert wide.boxes == [(0, 0, 16, 8)]
    large = Canvas.around_masks(images, box_mask(0, 0, 64, 96), 64, 64, padding=9)
    assert large.boxes == [(0, 0, 64, 96)]


def test_faint_values_do_not_widen_the_crop(images):
    mask = box_mask(20, 40, 28, 48).clamp(min=0.02)
    assert Canvas.around_masks(images, mask, 64, 64, 4).boxes == [(16, 36, 32, 52)]


def test_pictures_use_the_mask_of_their_prompt(images):
    masks = torch.cat([box_mask(20, 40, 28, 48), box_mask(0, 0, 16, 16)])
    for canvas in (
        Canvas(images, masks),
        Canvas.around_masks(images, masks, 96, 64, 0),
    ):
        pictures = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 96, 64) / 8
        result = canvas.put_back(pictures)
        for row, (y, x) in enumerate([(44, 24), (44, 24), (8, 8), (8, 8)]):
            torch.testing.assert_close(result[row, :, y, x], torch.full((3,), row / 8))
            y, x = (8, 8) if row < 2 else (44, 24)
            assert torch.equal(result[row, :, y, x], images[0, :, y, x])


def test_a_latent_is_repainted_if_any_of_its_pixels_is():
    masks = torch.cat([box_mask(17, 40, 18, 41), 0.4 * box_mask(0, 0, 64, 96)])
    repaint = latents_to_repaint(masks, 12, 8)
    assert repaint.shape == (2, 1, 12, 8)
    assert repaint.sum(dim=(1, 2, 3)).tolist() == [1, 0]
    assert repaint[0, 0, 5, 2]


@pytest.mark.parametrize("padding", [None, 0, 100])
def test_thin_lines_are_repainted_in_a_picture_that_is_scaled_down(inpaint, seeded, padding):
    """Scaling averages a line of two pixels to a quarter of white, which marks nothing."""
    image = torch.rand(3, 512, 512, generator=seeded())
    mask = box_mask(250, 0, 252, 512, 512, 512)[0]
    size = {"height": 64, "width": 64, "padding_mask_crop": padding}
    cat, dog = (
        repaint(inpaint, image, mask, prompt=prompt, **size)[0] for prompt in ("a cat", "a dog")
    )
    assert not torch.equal(cat, dog)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1)])
@pytest.mark.parametrize("padding", [None, 4])
def test_pictures_of_one_pixel_along_a_side(inpaint, shape, padding):
    image, mask = torch.rand(3, *shape), torch.ones(1, *shape)
    size = {"height": 64, "width": 64, "padding_mask_crop": padding}
    result = repaint(inpaint, image, mask, **size)
    assert result.shape == (1, 3, *((64, 64) if padding is None else shape))
