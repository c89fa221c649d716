import math

import pytest
import torch

from localdit.training import objective


def linear_alphas() -> torch.Tensor:
    """The products of alphas, written out from DDPM's schedule."""
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 500, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_targets_follow_the_formulas(batch, prediction_type):
    latents, noise, timesteps = batch
    alphas = linear_alphas()[timesteps].view(-1, 1, 1, 1)
    expected = {
        "epsilon": noise.double(),
        "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * latents,
    }[prediction_type]
    scheduler = objective.training_scheduler(prediction_type)
    target = objective.training_target(scheduler, latents, noise, timesteps)
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_sampler_finds_the_latents_in_a_perfect_prediction(batch, prediction_type):
    latents, noise, _ = batch
    scheduler = objective.training_scheduler(prediction_type)
    sampler = objective.sampling_scheduler(scheduler)
    sampler.set_timesteps(10)
    sample = noise
    for timestep in sampler.timesteps:
        alpha = linear_alphas()[timestep].float()
        noise_left = (sample - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        prediction = objective.training_target(
            scheduler, latents, noise_left, timestep.expand(len(latents))
        )
        sample = sampler.step(prediction, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, latents, rtol=1e-3, atol=1e-3)


def test_uniform_timesteps_cover_the_range_evenly():
    timesteps = objective.sample_timesteps(
        20_000, 1000, "uniform", torch.Generator().manual_seed(0)
    )
    assert timesteps.min() == 0
    assert timesteps.max() == 999
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=8)


def test_logit_normal_timesteps_favour_the_middle():
    timesteps = objective.sample_timesteps(
        20_000, 1000, "logit_normal", torch.Generator().manual_seed(0)
    )
    # Half of a logit-normal lies within sigmoid(-0.6745) .. sigmoid(0.6745).
    inside = ((timesteps >= 337) & (timesteps < 663)).float().mean().item()
    assert inside == pytest.approx(0.5, abs=0.02)
    assert 0 <= timesteps.min() < timesteps.max() <= 999


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_the_error_of_the_latents(prediction_type):
    timesteps = torch.tensor([5, 200, 800])
    scheduler = objective.training_scheduler(prediction_type)
    weights = objective.min_snr_weights(scheduler, timesteps, gamma=5.0).double()
    snr = linear_alphas()[timesteps] / (1 - linear_alphas()[timesteps])
    # An error e in the latents is an error e * sqrt(snr) in the noise, e * sqrt(snr + 1) in v.
    of_the_latents = weights * (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(of_the_latents, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)
    assert snr[0] > 5 > snr[1]


def test_loss_is_the_weighted_mean_square():
    prediction = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert objective.denoising_loss(prediction, target).item() == 5.0
    weights = torch.tensor([1.0, 0.5])
    assert objective.denoising_loss(prediction, target, weights).item() == 2.75
    assert objective.denoising_loss(prediction, target).dtype == torch.float32
    assert math.isnan(objective.denoising_loss(prediction, target * math.nan).item())


def test_size_conditions_are_pixels_and_one():
    conditions = objective.size_conditions(512, 3, torch.device("cpu"))
    assert conditions["resolution"].tolist() == [[512.0, 512.0]] * 3
    assert conditions["aspect_ratio"].tolist() == [[1.0]] * 3
