import pytest
import torch
from diffusers import DDPMScheduler

from localdit.core.diffusion import Objective, denoising_errors, sample_position
from localdit.pipelines import LocalDiTImg2ImgPipeline
from tests.tiny import tiny_pipeline

OBJECTIVES = [
    Objective("epsilon"),
    Objective("v_prediction"),
    Objective("flow"),
    Objective("flow", flow_shift=3.0),
]


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
def test_noise_and_target_are_those_of_ddpm(batch, prediction_type):
    latents, noise, timesteps = batch
    chosen = Objective(prediction_type)
    alphas = linear_alphas()[timesteps].view(-1, 1, 1, 1)
    noisy = chosen.add_noise(latents, noise, timesteps)
    expected = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
    torch.testing.assert_close(noisy.double(), expected, rtol=1e-4, atol=1e-4)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    torch.testing.assert_close(
        chosen.target(latents, noise, timesteps).double(),
        noise.double() if prediction_type == "epsilon" else velocity,
        rtol=1e-4,
        atol=1e-4,
    )
    torch.testing.assert_close(noisy, DDPMScheduler().add_noise(latents, noise, timesteps))


def test_grids_reach_from_the_latents_to_the_noise():
    for objective in OBJECTIVES:
        for steps in range(1, 1001):
            try:
                objective.require_grid(steps)
            except ValueError as error:
                assert not objective.is_flow
                nearest = int(str(error).split()[-1])
                assert objective.require_grid(nearest) is None and 250 < steps < 800
            else:
                upper, _ = objective.grid(torch.tensor([1 - 1e-6]), steps)
                assert upper.item() >= 799
    with pytest.raises(ValueError, match="A grid of 600 .* ends at 600 of 1000, .* as with 500$"):
        Objective("v_prediction").require_grid(600)


def test_flow_goes_straight_from_the_latents_to_the_noise(batch):
    latents, noise, _ = batch
    chosen = Objective("flow")
    timesteps = chosen.timesteps(torch.tensor([0.0, 0.25, 0.999]))
    assert timesteps.dtype == torch.float32
    torch.testing.assert_close(timesteps, torch.tensor([0.0, 250.0, 999.0]))
    noisy = chosen.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    # The target is the derivative by sigma.
    moved = chosen.add_noise(latents, noise, timesteps + 100)
    torch.testing.assert_close((moved - noisy) / 0.1, chosen.target(latents, noise, timesteps))


def test_timesteps_of_the_noise_schedule_are_whole():
    timesteps = Objective().timesteps(torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.99999994]))
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == [0, 0, 1, 500, 999]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sampler_takes_the_levels_that_even_positions_are_trained_at(shift):
    chosen = Objective("flow", flow_shift=shift)
    sampler = chosen.sampling_scheduler()
    sampler.set_timesteps(9)
    trained = chosen.timesteps(torch.linspace(0.999, 0.111, 9)) / 1000
    torch.testing.assert_close(sampler.sigmas[:-1], trained)
    assert trained[4].item() == pytest.approx(0.555 * shift / (1 + (shift - 1) * 0.555))


class Oracle:
    """Stands in for the transformer; knows the clean latents, and records what it is shown."""

    def __init__(self, chosen, latents):
        self.chosen, self.latents, self.seen = chosen, latents, []

    def __call__(self, sample, timestep, **conditions):
        self.seen.append((sample, timestep))
        with_latents = self.chosen.add_noise(self.latents, torch.zeros_like(sample), timestep)
        only_noise = self.chosen.add_noise(
            torch.zeros_like(sample), torch.ones_like(sample), timestep
        )
        noise = (sample - with_latents) / only_noise
        return (self.chosen.target(self.latents, noise, timestep),)


@pytest.mark.parametrize("chosen", OBJECTIVES, ids=str)
def test_the_pipelines_find_the_latents_in_perfect_predictions(batch, monkeypatch, chosen):
    latents, image, _ = batch
    oracle = Oracle(chosen, latents[:1])
    pipe = tiny_pipeline()
    pipe.scheduler = chosen.sampling_scheduler()
    monkeypatch.setattr(pipe.transformer, "forward", oracle)
    settings = {
        "num_inference_steps": 12,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
    }
    # Flow's timesteps are cut to whole ones on the way to the model, so its noise is a little off.
    found = pipe("a cat", **settings).images
    torch.testing.assert_close(found, latents[:1], rtol=0, atol=0.05)

    img2img = LocalDiTImg2ImgPipeline(**pipe.components)
    img2img.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    oracle.seen.clear()
    found = img2img("a cat", image[:1], strength=0.5, latents=noise, **settings).images
    torch.testing.assert_close(found, latents[:1], rtol=0, atol=0.05)
    assert len(oracle.seen) == 6
    start, timestep = oracle.seen[0]
    trained = chosen.add_noise(image[:1], noise, timestep)
    torch.testing.assert_close(start, trained, rtol=0, atol=0.005)


@pytest.mark.parametrize("chosen", OBJECTIVES, ids=str)
def test_a_saved_pipeline_samples_as_trained(tmp_path, chosen):
    pipe = tiny_pipeline()
    pipe.scheduler = chosen.sampling_scheduler()
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(pipe.scheduler)
    for name in ("prediction_type", "use_flow_sigmas", "flow_shift", "beta_end"):
        assert loaded.scheduler.config[name] == pipe.scheduler.config[name]


def test_positions_are_drawn_from_the_generator():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.tensor([sample_position(generator, "uniform") for _ in range(5000)])
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.015)
    middle = torch.tensor([sample_position(generator, "logit_normal") for _ in range(5000)])
    # Half of a logit-normal lies within sigmoid(-0.6745) .. sigmoid(0.6745).
    inside = ((middle > 0.3375) & (middle < 0.6625)).float().mean().item()
    assert inside == pytest.approx(0.5, abs=0.03)
    assert sample_position(generator.manual_seed(7), "uniform") == sample_position(
        torch.Generator().manual_seed(7), "uniform"
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_cap_the_error_of_the_latents(prediction_type):
    timesteps = torch.tensor([5, 200, 800])
    snr = linear_alphas()[timesteps] / (1 - linear_alphas()[timesteps])
    weights = Objective(prediction_type, min_snr_gamma=5.0).weights(timesteps).double()
    # An error e in the latents is an error e * sqrt(snr) in the noise, e * sqrt(snr + 1) in v.
    of_the_latents = weights * (snr if prediction_type == "epsilon" else snr + 1)
    torch.testing.assert_close(of_the_latents, snr.clamp(max=5.0), rtol=1e-3, atol=1e-6)
    assert snr[0] > 5 > snr[1]


def test_weights_are_one_by_default():
    for chosen in OBJECTIVES:
        assert chosen.weights(torch.tensor([1, 2])).tolist() == [1.0, 1.0]


def test_other_prediction_types_are_refused():
    with pytest.raises(ValueError, match="expected one of epsilon, v_prediction, flow"):
        Objective("sample")


def test_errors_are_means_over_each_sample():
    prediction = torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    errors = denoising_errors(prediction, target)
    assert errors.tolist() == [1.0, 9.0]
    assert errors.dtype == torch.float32
