"""Steps and guidance that suit a model; samplers, what they keep of it, and what they refuse."""

import inspect
import json

import diffusers
import pytest
import torch

from localdit.config import Config
from localdit.core.diffusion import NOISE_SCHEDULE, Objective
from localdit.core.samplers import (
    LCM_LEVELS,
    SAMPLERS,
    SamplingSettings,
    check_sampler,
    config_of,
    make_sampler,
    prediction_type_of,
    read_settings,
    suitable_samplers,
)
from localdit.pipelines import LocalDiTImg2ImgPipeline
from tests.core.test_diffusion import Oracle
from tests.tiny import tiny_pipeline

TRAILING = {"timestep_spacing": "trailing"}
UNCLIPPED = {"clip_sample": False, **TRAILING}
BY_HAND = {  # class and settings beside noise schedule and prediction type
    "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", TRAILING),
    "euler-a": ("EulerAncestralDiscreteScheduler", TRAILING),
    "heun": ("HeunDiscreteScheduler", TRAILING),
    "ddim": ("DDIMScheduler", UNCLIPPED),
    "ddpm": ("DDPMScheduler", UNCLIPPED),
    "lcm": ("LCMScheduler", {}),
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOW_BY_HAND = {
    "dpm++2m": ("DPMSolverMultistepScheduler", FLOW),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}),
}
CASES = [
    *((kind, name) for kind in ("epsilon", "v_prediction") for name in BY_HAND),
    *(("flow", name) for name in FLOW_BY_HAND),
]


def objective_of(kind):
    return Objective(kind, flow_shift=3.0 if kind == "flow" else 1.0)


def made_by_hand(kind, name):
    class_name, settings = (FLOW_BY_HAND if kind == "flow" else BY_HAND)[name]
    model = {} if kind == "flow" else {**NOISE_SCHEDULE, "prediction_type": kind}
    return getattr(diffusers, class_name)(**model, **settings)


def draw(pipe, scheduler, steps=20):
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "latent"}
    return pipe("a cat", generator=generator, **arguments).images


def settings_of(scheduler):
    """The configuration, without Diffusers' note on which values are its defaults."""
    return {k: v for k, v in config_of(scheduler).items() if k != "_use_default_values"}


class WholeOracle(Oracle):
    """An oracle for schedulers whose timesteps lie between the whole ones of a noise schedule."""

    def __call__(self, sample, timestep, **conditions):
        whole = timestep if self.chosen.is_flow else timestep.round().long()
        return super().__call__(sample, whole, **conditions)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_every_sampler_is_tested():
    assert list(SAMPLERS) == list(BY_HAND)
    assert [name for name in SAMPLERS if SAMPLERS[name].flow] == list(FLOW_BY_HAND)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_sampler_is_the_scheduler_made_by_hand(pipe, kind, name):
    stock = made_by_hand(kind, name)
    made = make_sampler(name, objective_of(kind).sampling_scheduler())
    assert type(made) is type(stock)
    drawn, expected = draw(pipe, made), draw(pipe, stock)
    assert drawn.isfinite().all()
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_samplers_find_the_latents_in_perfect_predictions(monkeypatch, kind, name):
    """Of noise, and of a picture with the noise of a strength."""
    objective = objective_of(kind)
    latents, image, noise = torch.randn(
        3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)
    ) * torch.tensor([2.0, 2.0, 1.0]).view(3, 1, 1, 1, 1)
    pipe = tiny_pipeline()
    pipe.scheduler = make_sampler(name, objective.sampling_scheduler())
    oracle = WholeOracle(objective, latents)
    monkeypatch.setattr(pipe.transformer, "forward", oracle)
    settings = {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 10}
    settings["generator"] = torch.Generator().manual_seed(2)
    found = pipe("a cat", **settings).images
    torch.testing.assert_close(found, latents, rtol=0, atol=0.1)
    img2img = LocalDiTImg2ImgPipeline.from_pipe(pipe)
    img2img.set_progress_bar_config(disable=True)
    oracle.seen.clear()
    found = img2img("a cat", image, strength=0.5, latents=noise, **settings).images
    torch.testing.assert_close(found, latents, rtol=0, atol=0.1)
    start, timestep = oracle.seen[0]
    expected = objective.add_noise(image, noise, timestep)
    torch.testing.assert_close(start, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_noise_schedule_is_kept_where_the_class_has_another_default(name):
    """Diffusers' `from_config` leaves defaults out: LCM would sample another schedule."""
    made = make_sampler(name, diffusers.DPMSolverMultistepScheduler())
    assert {one: made.config[one] for one in NOISE_SCHEDULE} == NOISE_SCHEDULE
    other = diffusers.DDIMScheduler(beta_end=0.012, num_train_timesteps=500)
    made = make_sampler(name, other)
    assert (made.config["beta_end"], made.config["num_train_timesteps"]) == (0.012, 500)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_name_means_the_same_whatever_the_scheduler_was(kind, name):
    start = objective_of(kind).sampling_scheduler()
    expected = settings_of(make_sampler(name, start))
    for other in suitable_samplers(config_of(start)):
        assert settings_of(make_sampler(name, make_sampler(other, start))) == expected


def test_a_sampler_must_suit_the_prediction():
    kinds = {
        "epsilon": list(BY_HAND),
        "v_prediction": list(BY_HAND),
        "flow_prediction": list(FLOW_BY_HAND),
        "sample": [],
    }
    for kind, names in kinds.items():
        assert suitable_samplers({"prediction_type": kind}) == names
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert prediction_type_of(flow) == "flow"
    with pytest.raises(
        ValueError,
        match=r"^Config\.sampler is 'ddim', which can't sample a model that predicts 'flow'; "
        r"samplers that suit this model: dpm\+\+2m, dpm\+\+2m-sde, unipc, euler, heun, lcm$",
    ):
        check_sampler("ddim", flow)
    with pytest.raises(
        ValueError, match=r"'eular', and there is no sampler of that name; samplers .*"
    ):
        make_sampler("eular", diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match=r"predicts 'sample'.*: none"):
        make_sampler("ddim", diffusers.DDIMScheduler(prediction_type="sample"))


def test_a_noise_schedule_that_a_sampler_lacks_is_refused():
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert make_sampler("euler", zero).config["rescale_betas_zero_snr"]
    with pytest.raises(ValueError, match=r"'heun', which lacks the model's noise schedule"):
        make_sampler("heun", zero)


@pytest.mark.parametrize(
    ("before", "name", "warning"),
    [
        (diffusers.LCMScheduler, "euler", "made for few steps with a sampler such"),
        (diffusers.FlowMatchLCMScheduler, "euler", "made for few steps with a sampler such"),
        (diffusers.DDIMScheduler, "lcm", "for few-step models, and this is not one"),
        (diffusers.TCDScheduler, "lcm", ""),
        (diffusers.FlowMatchLCMScheduler, "lcm", ""),
        (diffusers.DDIMScheduler, "euler", ""),
    ],
)
def test_few_step_models_and_samplers_are_warned_of(before, name, warning, caplog):
    make_sampler(name, before())
    assert len(caplog.records) == bool(warning)
    assert warning in caplog.text


def test_lcm_keeps_the_timesteps_that_a_few_step_model_was_trained_on():
    trained = diffusers.LCMScheduler(original_inference_steps=8, prediction_type="v_prediction")
    assert make_sampler("lcm", trained).config.original_inference_steps == 8
    for name in BY_HAND:
        made = make_sampler("lcm", make_sampler(name, trained))
        assert made.config.original_inference_steps == 8
    parameters = inspect.signature(diffusers.LCMScheduler).parameters
    assert parameters["original_inference_steps"].default == LCM_LEVELS


def test_a_sampler_that_needs_steps_is_refused_with_fewer():
    start = diffusers.DDIMScheduler()
    make_sampler("heun", start, 5)
    make_sampler("heun", diffusers.FlowMatchEulerDiscreteScheduler(), 2)
    with pytest.raises(ValueError, match="num_inference_steps is 4, but the sampler 'heun' needs"):
        make_sampler("heun", start, 4)


# Steps and guidance


def test_the_defaults_are_those_of_the_config():
    assert SamplingSettings() == SamplingSettings(Config().denoising_steps, Config().guidance_scale)


def test_a_folder_names_both_one_or_none(tmp_path):
    assert read_settings(tmp_path / "gone.pt") == SamplingSettings(20, 7.0)
    for entries in ({"num_inference_steps": 4, "guidance_scale": 1}, {"guidance_scale": 2.0}, {}):
        (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["a", "b"], **entries}))
        assert read_settings(tmp_path) == SamplingSettings(**entries)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0; expected at least 1"),
        ({"num_inference_steps": 10**9}, ValueError, "at most 1000"),
        ({"num_inference_steps": 4.0}, TypeError, "num_inference_steps is 4.0 of type float"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale is -1.0; expected at least 0"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale is inf"),
        ({"guidance_scale": None}, TypeError, "guidance_scale is None"),
    ],
)
def test_unusable_values_are_refused(tmp_path, entry, error, message):
    with pytest.raises(error, match=f"^{message}|{message}$"):
        SamplingSettings(**entry)
    (tmp_path / "model_index.json").write_text(json.dumps(entry))
    with pytest.raises(error, match=rf"model_index\.json: .*{message}"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("steps", "scale", "few"), [(4, 1.0, True), (8, 0.0, True), (4, 2.0, False), (20, 1.0, False)]
)
def test_few_steps_are_at_most_eight_without_guidance(steps, scale, few):
    assert SamplingSettings(steps, scale).few_steps == few
