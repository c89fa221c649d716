import time

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from localdit.demo import preview
from localdit.demo.preview import Previews, decode_small, expected_latents
from localdit.pipelines import LocalDiTPipeline
from localdit.utils import model_in_the_box
from tests.tiny import tiny_pipeline


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
        "a large red circle on a blue background",
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

    monkeypatch.setattr(preview, "decode_small", takes_three_seconds)
    previews, latents, made = Previews(work_per_preview=2.0), torch.zeros(1, 4, 2, 2), []
    for _ in range(20):
        now[0] += 1  # a step
        made.append(previews.of(pipe, latents) is not None)
    assert [step for step, one in enumerate(made, 1) if one] == [1, 7, 13, 19]


def test_offloaded_models_are_not_moved_for_a_preview(pipe, monkeypatch):
    monkeypatch.setattr(pipe.vae, "_hf_hook", object(), raising=False)
    assert Previews().of(pipe, torch.zeros(1, 4, 2, 2)) is None
