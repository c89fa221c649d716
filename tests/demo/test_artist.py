"""Settings of the page, pictures with their steps, and previews."""

import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from localdit.demo.artist import MAX_SEED, Previews, Step, decode_small, expected_latents
from localdit.inference import inference
from localdit.pipelines import LocalDiTPipeline
from localdit.utils import model_in_the_box
from tests.tiny import tiny_pipeline

RED = Image.new("RGB", (32, 32), "red")


def mask_of(box, size=(32, 32)):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def drawn(artist, settings, *pictures):
    *steps, picture = artist.draw(settings, *pictures)
    return steps, picture


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "localdit-drawing"]


@pytest.fixture
def calls(artist, monkeypatch):
    """The number of running calls of the transformer when each call begins."""
    at_work, counts = [], []
    forward = artist.pipe.transformer.forward

    def counting(*args, **kwargs):
        at_work.append(None)
        counts.append(len(at_work))
        try:
            return forward(*args, **kwargs)
        finally:
            at_work.pop()

    monkeypatch.setattr(artist.pipe.transformer, "forward", counting)
    return counts


def test_no_negative_prompt_is_an_empty_one(artist, asked):
    """A client of the page may send null for it. Guidance stays."""
    pictures = [drawn(artist, asked(negative_prompt=text))[1].tobytes() for text in (None, "")]
    assert pictures[0] == pictures[1]
    assert drawn(artist, asked(guidance_scale=1.0))[1].tobytes() != pictures[0]


def test_drawing_yields_steps_with_previews_then_the_picture(artist, asked):
    steps, picture = drawn(artist, asked())
    assert [(step.number, step.total) for step in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].preview.size == (32, 32)
    assert picture.size == (32, 32)


@pytest.mark.parametrize("mode", ["generate", "edit", "inpaint"])
def test_pictures_equal_those_of_inference(artist, asked, mode):
    settings = asked(mode, strength=0.75)
    image = None if mode == "generate" else RED
    mask = mask_of((0, 0, 16, 32)) if mode == "inpaint" else None
    _, picture = drawn(artist, settings, image, mask)
    config = settings.configure(artist.config)
    again = inference(
        artist.pipe, settings.prompt, "", config, image, mask=mask, seed=settings.seed
    )
    assert np.array_equal(picture, again[0])


def test_strength_sets_the_number_of_steps_of_an_edit(artist, asked):
    steps, _ = drawn(artist, asked("edit", strength=0.5), RED)
    assert len(steps) == 2


def test_unmarked_pixels_do_not_change(artist, asked):
    _, picture = drawn(artist, asked("inpaint"), RED, mask_of((0, 0, 16, 16)))
    pixels = np.asarray(picture)
    assert (pixels[16:] == (255, 0, 0)).all()
    assert not (pixels[:16, :16] == (255, 0, 0)).all()


def test_an_inpainted_picture_keeps_its_size(artist, asked):
    image = Image.new("RGB", (96, 64), "red")
    _, picture = drawn(artist, asked("inpaint"), image, mask_of((8, 8, 24, 24), image.size))
    assert picture.size == image.size
    assert picture.getpixel((90, 60)) == (255, 0, 0)


def test_closing_stops_the_drawing_after_the_current_step(artist, asked, calls):
    drawing = artist.draw(asked(num_inference_steps=100))
    assert next(drawing).number == 1
    drawing.close()
    assert len(calls) < 100
    assert not workers()
    assert artist.pipe.interrupt
    assert drawn(artist, asked())[1].size == (32, 32)  # the next one is drawn


def test_one_picture_is_drawn_at_a_time(artist, asked, calls):
    alone = [np.asarray(drawn(artist, asked(seed=seed))[1]) for seed in range(3)]
    together = [None] * 3

    def draw(seed):
        together[seed] = np.asarray(drawn(artist, asked(seed=seed))[1])

    threads = [threading.Thread(target=draw, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(calls) == 1
    assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "mode, image, mask, message",
    [
        ("edit", None, None, "There is no picture to start from"),
        ("inpaint", None, mask_of((0, 0, 8, 8)), "There is no picture to start from"),
        ("inpaint", RED, None, "Nothing is marked"),
        ("inpaint", RED, mask_of((0, 0, 0, 0)), "Nothing is marked"),
    ],
)
def test_missing_pictures_are_reported_before_anything_is_computed(
    artist, asked, calls, mode, image, mask, message
):
    with pytest.raises(ValueError, match=message):
        next(artist.draw(asked(mode), image, mask))
    assert not calls


def test_the_caller_gets_the_exceptions_of_the_drawing(artist, asked, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(artist.pipe.transformer, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(artist.draw(asked()))
    assert not workers()
    monkeypatch.undo()
    assert isinstance(next(artist.draw(asked())), Step)


# Settings


def test_settings_change_the_config(asked, config):
    settings = asked(
        "edit", num_inference_steps=7, guidance_scale=3.5, height=48, width=64, strength=0.25
    )
    made = settings.configure(config)
    assert made.sampler is None and asked(sampler="ddim").configure(config).sampler == "ddim"
    assert (made.denoising_steps, made.guidance_scale, made.denoising_strength) == (7, 3.5, 0.25)
    assert (made.height, made.width) == (48, 64)
    assert made.sample_size == config.sample_size


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "  \n"}, "The prompt is empty"),
        ({"height": 0}, "Height is 0; expected at least 1"),
        ({"width": None}, "Width is None"),
        ({"num_inference_steps": 0}, "Steps is 0; expected at least 1"),
        ({"guidance_scale": float("nan")}, "Guidance is nan"),
        ({"strength": 1.5}, "Strength is 1.5; expected at least 0 and at most 1"),
        ({"seed": -1}, "The seed must be a whole number from 0"),
        ({"seed": None}, "The seed must be a whole number from 0"),
        ({"seed": MAX_SEED + 1}, "The seed must be a whole number from 0"),
    ],
)
def test_errors_use_the_labels_of_the_page(asked, config, changes, message):
    with pytest.raises(ValueError) as raised:
        asked(**changes).configure(config)
    assert str(raised.value).startswith(message)


# Previews


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize("scheduler", [None, UniPCMultistepScheduler])
def test_the_expected_latents_are_without_noise_and_lead_to_the_picture(pipe, scheduler):
    pipe = LocalDiTPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected, noisy = [], []

    def on_step_end(pipe, index, timestep, tensors):
        expected.append(expected_latents(pipe.scheduler, tensors["latents"]).clone())
        noisy.append(tensors["latents"])
        return {}

    latents = pipe(
        "a red circle",
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=on_step_end,
    ).images
    distances = [float((one - latents).norm()) for one in expected]
    assert len(distances) == 5
    assert distances[-1] <= 0.02 * float(latents.norm())
    assert not torch.equal(expected[0], noisy[0])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_schedulers_that_keep_no_estimate_show_the_latents_themselves(scheduler):
    latents = torch.randn(1, 4, 2, 2)
    assert expected_latents(scheduler(), latents) is latents


def test_estimates_of_the_noise_are_no_estimates_of_the_picture(pipe):
    scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    )
    scheduler.model_outputs = [None, torch.zeros(1, 4, 2, 2)]
    latents = torch.ones(1, 4, 2, 2)
    assert expected_latents(scheduler, latents) is latents


def test_large_pictures_have_small_previews_of_the_same_proportions(pipe):
    assert decode_small(pipe, torch.randn(1, 4, 64, 128)).size == (256, 128)
    assert decode_small(pipe, torch.randn(1, 4, 4, 8)).size == (64, 32)


def test_a_preview_of_the_last_step_is_the_picture():
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def on_step_end(pipe, index, timestep, tensors):
        seen.append(Previews().of(pipe, tensors["latents"]))
        return {}

    picture = pipe(
        "a large red circle",
        num_inference_steps=8,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=on_step_end,
    ).images[0]
    final = np.asarray(picture, float)
    differences = [np.abs(np.asarray(one, float) - final).mean() for one in seen]
    assert differences[-1] < 1  # of 255
    assert differences[0] > 5  # it changed on the way


def test_previews_take_no_more_than_their_share_of_the_time(pipe, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes_three_seconds(pipe, latents):
        now[0] += 3
        return "preview"

    monkeypatch.setattr("localdit.demo.artist.decode_small", takes_three_seconds)
    previews, latents, made = Previews(work_per_preview=2.0), torch.zeros(1, 4, 2, 2), []
    for _ in range(20):
        now[0] += 1  # a step
        made.append(previews.of(pipe, latents) is not None)
    assert [step for step, one in enumerate(made, 1) if one] == [1, 7, 13, 19]


def test_offloaded_models_are_not_moved_for_a_preview(pipe, monkeypatch):
    monkeypatch.setattr(pipe.vae, "_hf_hook", object(), raising=False)
    assert Previews().of(pipe, torch.zeros(1, 4, 2, 2)) is None
