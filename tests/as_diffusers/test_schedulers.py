"""Schedulers of every family in the pipelines."""

import diffusers
import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_scipy_available, is_torchsde_available

from localdit.core.schedulers import check_schedule
from localdit.pipelines import LocalDiTPipeline
from tests.as_diffusers.cases import KINDS, distance, draw, make

NEEDS = {
    "LMSDiscreteScheduler": is_scipy_available,
    "DPMSolverSDEScheduler": is_torchsde_available,
}
OTHERS = ["LCMScheduler", "TCDScheduler", "SASolverScheduler", "EDMDPMSolverMultistepScheduler"]
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
NAMES = [*(scheduler.name for scheduler in KarrasDiffusionSchedulers), *OTHERS, *FLOW]


def scheduler_of(name, **options):
    if name in NEEDS and not NEEDS[name]():
        pytest.skip(f"{name} needs a package that is not installed")
    return getattr(diffusers, name)(**options)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_a_scheduler_works(kind, name):
    pipe = make(kind)
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = scheduler_of(name, **options)
    pictures = draw(pipe, num_inference_steps=5, output_type="latent")
    assert pictures.shape == (1, 4, 4, 4)
    assert pictures.isfinite().all()


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_karras_sigmas_at_any_number_of_steps(name, steps):
    """Many of their timesteps are the same after rounding; their noise levels are not."""
    pipe = make(LocalDiTPipeline)
    pipe.scheduler = scheduler_of(name, use_karras_sigmas=True)
    assert draw(pipe, num_inference_steps=steps, output_type="latent").isfinite().all()


def test_runge_kutta_steps_of_pndm_are_taken():
    """Its first steps visit some timesteps twice."""
    pipe = make(LocalDiTPipeline)
    pipe.scheduler = scheduler_of("PNDMScheduler")
    assert draw(pipe, num_inference_steps=10, output_type="latent").isfinite().all()
    assert pipe.num_timesteps > 10


def test_flow_matching_takes_the_same_steps_as_the_solver_for_flows():
    """First-order DPM-Solver and Euler's method take the same step along a flow."""
    pipe = make(LocalDiTPipeline)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    pipe.scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    euler = draw(pipe, sigmas=sigmas, output_type="latent")
    pipe.scheduler = scheduler_of(
        "DPMSolverMultistepScheduler",
        solver_order=1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    pipe.scheduler.set_timesteps(4)
    solver = draw(pipe, num_inference_steps=4, output_type="latent")
    assert pipe.scheduler.sigmas[0] < 1.0  # it cannot begin at pure noise, where Euler's does
    assert 0 < distance(euler, solver) < 0.2 * euler.abs().max()


def test_noise_is_added_to_a_picture_as_a_flow_mixes_them():
    pipe = make(KINDS["image to image"])
    pipe.scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler")
    seen = []
    denoise = pipe.denoise
    pipe.denoise = lambda latents, *a, **k: (seen.append(latents), denoise(latents, *a, **k))[1]
    picture, noise = torch.full((1, 4, 4, 4), 3.0), torch.ones(1, 4, 4, 4)
    draw(pipe, image=picture, latents=noise, num_inference_steps=4, strength=0.5)
    sigma = pipe.scheduler.sigmas[2].item()
    torch.testing.assert_close(seen[0], (1 - sigma) * picture + sigma * noise)


def test_a_scheduler_without_add_noise_is_refused():
    pipe = make(KINDS["image to image"])
    pipe.scheduler = scheduler_of("IPNDMScheduler")
    with pytest.raises(ValueError, match=r"IPNDMScheduler cannot start from a picture"):
        draw(pipe)


@pytest.mark.parametrize("how", [{}, {"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("kind", ["KDPM2Ancestral", "KDPM2", "Heun"])
def test_the_halves_of_steps_may_be_rounded(kind, how):
    scheduler = scheduler_of(f"{kind}DiscreteScheduler", **how)
    for steps in range(1, 30):
        scheduler.set_timesteps(steps)
        check_schedule(scheduler)
    scheduler.timesteps = scheduler.timesteps.flip(0)
    with pytest.raises(ValueError, match="each be lower"):
        check_schedule(scheduler)


def test_unusable_schedules_are_refused():
    scheduler = scheduler_of("DPMSolverMultistepScheduler", num_train_timesteps=50)
    scheduler.set_timesteps(51)  # more than there are distinct ones
    with pytest.raises(ValueError, match="The 51 timesteps"):
        check_schedule(scheduler)
    scheduler.set_timesteps(timesteps=[10, 20])
    with pytest.raises(ValueError, match="each be lower"):
        check_schedule(scheduler)
    scheduler.set_timesteps(timesteps=[10, -1])
    with pytest.raises(ValueError, match="at least 0"):
        check_schedule(scheduler)
    scheduler = scheduler_of("EulerDiscreteScheduler")
    scheduler.set_timesteps(sigmas=[1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="each be lower"):
        check_schedule(scheduler)
