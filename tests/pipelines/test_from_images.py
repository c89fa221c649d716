import logging

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from localdit.pipelines import LocalDiTImg2ImgPipeline


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("strength", [0.1, 0.29, 0.5, 0.8, 1.0])
def test_the_last_steps_are_taken(img2img, steps, strength):
    img2img.scheduler.set_timesteps(steps)
    kept = img2img.get_timesteps(strength)
    assert len(kept) == int(steps * strength)
    assert torch.equal(kept, img2img.scheduler.timesteps[steps - len(kept) :])
    assert img2img.scheduler.begin_index == steps - len(kept)


def test_a_strength_of_less_than_a_step_is_warned_about(img2img, caplog):
    img2img.scheduler.set_timesteps(5)
    with caplog.at_level(logging.WARNING):
        assert len(img2img.get_timesteps(0.1)) == 0
    assert "Strength 0.1 of 5 steps is less than one step" in caplog.text


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_noise_is_added_as_at_the_first_timestep_to_come(img2img, scheduler, seeded):
    """To `alpha x + sigma n` or, by schedulers that compute with sigmas, to `x + sigma n`."""
    pipe = LocalDiTImg2ImgPipeline(**{**img2img.components, "scheduler": scheduler()})
    pipe.scheduler.set_timesteps(10)
    schedule = pipe.get_timesteps(0.5)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    noised = pipe.add_noise(latents, noise, schedule)
    alpha = pipe.scheduler.alphas_cumprod[schedule[0].long()]
    if scheduler is not DDIMScheduler:
        noised = noised * alpha.sqrt()
    expected = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(noised, expected, atol=2e-3, rtol=0)
    assert torch.equal(pipe.add_noise(latents, noise, schedule[10:]), latents)
