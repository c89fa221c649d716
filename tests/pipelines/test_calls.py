"""Calls side by side, calls under a program's settings, and calls of copies of a pipeline."""

import copy
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Thread

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FirstBlockCacheConfig
from diffusers.callbacks import SDCFGCutoffCallback

from localdit.core.text import TextCache
from localdit.pipelines import (
    LocalDiTImg2ImgPipeline,
    LocalDiTInpaintPipeline,
    LocalDiTPipeline,
)
from tests.tiny import tiny_components, tiny_pipeline

PICTURE, MASK = torch.full((3, 64, 64), 0.3), torch.ones(1, 64, 64)
INPUTS = {
    LocalDiTPipeline: {},
    LocalDiTImg2ImgPipeline: {"image": PICTURE},
    LocalDiTInpaintPipeline: {"image": PICTURE, "mask_image": MASK},
}
KINDS = list(INPUTS)


def draw(pipe, seed=0, prompt="a red circle", steps=4, **arguments):
    return pipe(
        prompt,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=steps,
        **{"output_type": "pt", **INPUTS[type(pipe)], **arguments},
    ).images


def sibling(pipe, kind):
    other = kind.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


# Values that are not finite


@pytest.fixture
def spoiled():
    """Make a pipeline with a NaN among the weights of a part."""

    def make(kind, part):
        pipe = sibling(tiny_pipeline(), kind)
        weights = {
            "text_encoder": pipe.text_encoder.encoder.final_layer_norm,
            "transformer": pipe.transformer.proj_out,
            "decoder": pipe.vae.decoder.conv_out,
            "encoder": pipe.vae.encoder.conv_out,
        }
        with torch.no_grad():
            weights[part].weight.view(-1)[0] = float("nan")
        return pipe

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_nothing_is_returned_if_the_denoiser_gives_nan(spoiled, kind, output_type):
    with pytest.raises(ValueError, match="The denoiser at step 1 of .* NaN .* weights may be dam"):
        draw(spoiled(kind, "transformer"), output_type=output_type)


@pytest.mark.parametrize(
    ("kind", "part", "stage"),
    [
        (LocalDiTPipeline, "text_encoder", "The text encoder gave NaN"),
        (LocalDiTPipeline, "decoder", r"The autoencoder \(VAE\), decoding, gave NaN"),
        (LocalDiTImg2ImgPipeline, "encoder", r"The autoencoder \(VAE\), encoding, gave NaN"),
    ],
)
def test_an_error_names_the_stage_that_gave_nan(spoiled, kind, part, stage):
    with pytest.raises(ValueError, match=stage):
        draw(spoiled(kind, part))


def test_an_error_names_the_step_and_what_a_callback_did(pipe):
    def spoil(pipeline, index, timestep, tensors):
        return {"latents": tensors["latents"] / (index != 2)}

    with pytest.raises(ValueError, match="a callback, at step 3 of 4 gave NaN or infinite"):
        draw(pipe, callback_on_step_end=spoil)
    assert draw(pipe).isfinite().all()


def test_float16_that_overflows_is_told_to_use_float32():
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(6e4)
    pipe.to(torch.float16)
    with pytest.raises(ValueError, match=r"float16 overflows .* torch_dtype=torch\.float32"):
        draw(pipe)


# Several calls at once

SCHEDULERS = [
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "DDPMScheduler",
]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_within_a_callback_changes_nothing(pipe, kind, name):
    outer = LocalDiTPipeline(**{**pipe.components, "scheduler": getattr(diffusers, name)()})
    outer.set_progress_bar_config(disable=True)
    inner = outer if kind is LocalDiTPipeline else sibling(outer, kind)
    alone, inner_alone = draw(outer), draw(inner, 1, "a blue cat", 5, guidance_scale=2.0)
    scheduler, drawn = outer.scheduler, []

    def within(pipeline, index, timestep, tensors):
        before = pipeline.scheduler.timesteps
        if index == 1:
            drawn.append(draw(inner, 1, "a blue cat", 5, guidance_scale=2.0))
            in_thread = Thread(target=lambda: drawn.append(draw(inner, 1, "a blue cat", 5,
                               guidance_scale=2.0)))  # fmt: skip
            in_thread.start()
            in_thread.join()
        assert pipeline.num_timesteps == len(before)
        assert pipeline.guidance_scale == 7.0
        assert pipeline.current_timestep == timestep
        assert torch.equal(pipeline.scheduler.timesteps, before)

    assert torch.equal(draw(outer, callback_on_step_end=within), alone)
    assert all(torch.equal(one, inner_alone) for one in drawn)
    assert len(drawn) == 2
    assert outer.scheduler is scheduler is inner.scheduler


def test_threads_draw_what_they_draw_alone(pipe):
    pipes = [pipe, *(sibling(pipe, kind) for kind in KINDS)]
    jobs = [(pipes[i % 4], i, ["a cat", "a dog"][i % 2], 3 + i % 3) for i in range(16)]
    alone = [draw(*job) for job in jobs]
    pipe.prompt_cache.clear()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: draw(*job), jobs))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_an_interrupted_inner_call_does_not_stop_the_outer_one(pipe):
    alone, steps = draw(pipe), []

    def stop(pipeline, index, timestep, tensors):
        steps.append("inner")
        pipeline._interrupt = True

    def within(pipeline, index, timestep, tensors):
        steps.append("outer")
        if index == 1:
            draw(pipe, callback_on_step_end=stop)
        assert not pipeline.interrupt

    assert torch.equal(draw(pipe, callback_on_step_end=within), alone)
    assert steps == ["outer", "outer", "inner", "outer", "outer"]


def test_another_thread_can_interrupt_all_calls(pipe):
    started, stopped, steps = [Event(), Event()], Event(), [0, 0]

    def work(number):
        def wait(pipeline, index, timestep, tensors):
            steps[number] += 1
            started[number].set()
            assert stopped.wait(60)

        return draw(pipe, callback_on_step_end=wait)

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(work, number) for number in range(2)]
        assert all(event.wait(60) for event in started)
        assert not pipe.interrupt
        pipe._interrupt = True
        assert pipe.interrupt
        stopped.set()
        assert all(call.result().isfinite().all() for call in calls)
    assert steps == [1, 1]


def test_a_step_cache_serves_one_call_at_a_time():
    pipe = tiny_pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    alone = draw(pipe)
    with pytest.raises(RuntimeError, match="step cache holds the states of one call at a time"):
        draw(pipe, callback_on_step_end=lambda *_: draw(sibling(pipe, LocalDiTPipeline)))
    assert torch.equal(draw(pipe), alone)


def test_offloaded_models_serve_one_thread_at_a_time():
    pipe = tiny_pipeline()
    alone = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")

    def within(pipeline, index, timestep, tensors):
        assert torch.equal(draw(pipe), alone)
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="one thread at a t"):
            pool.submit(draw, pipe).result()

    assert torch.equal(draw(pipe, callback_on_step_end=within), alone)


def test_a_callback_may_return_other_names(pipe):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        seen.append(index)
        return {"step": index, "image": None, "timestep": timestep}

    assert torch.equal(draw(pipe, callback_on_step_end=callback), draw(pipe))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("returned", [True, "latents", ("latents",)])
def test_a_callback_returns_a_dict_or_none(pipe, returned):
    with pytest.raises(TypeError, match="must return a dict of tensors or None, got"):
        draw(pipe, callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize(
    ("name", "returned", "message"),
    [
        ("latents", torch.zeros(1, 4, 4, 4), r"latents .* must have shape \(1, 4, 8, 8\), got"),
        ("latents", None, "latents .* must be a torch.Tensor, got NoneType"),
        ("prompt_embeds", torch.zeros(2, 5, 16), r"prompt_embeds .* shape \(1, any, 16\), got"),
        ("prompt_attention_mask", -torch.ones(1, 120), "prompt_attention_mask .* must be 1 for to"),
        ("prompt_attention_mask", None, "prompt_attention_mask .* must be a torch.Tensor"),
    ],
)
def test_a_callback_returns_tensors_that_fit(pipe, name, returned, message):
    error = TypeError if returned is None else ValueError
    with pytest.raises(error, match=f"The {message}"):
        draw(pipe, callback_on_step_end=lambda *_: {name: returned})


@pytest.mark.parametrize("names", [["prompt_embeds"], ["prompt_embeds", "prompt_attention_mask"]])
def test_a_callback_shortens_all_text_or_none(pipe, names):
    def shorten(names):
        def callback(pipeline, index, timestep, tensors):
            return {name: tensors[name][:, :8] for name in names}

        every = pipe._callback_tensor_inputs
        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": every}

    torch.testing.assert_close(draw(pipe, **shorten(pipe._callback_tensor_inputs[1:])), draw(pipe))
    with pytest.raises(ValueError, match=r"have \[8, 120\] tokens, but need the same"):
        draw(pipe, **shorten(names))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_callback_may_return_another_dtype(pipe, dtype):
    def callback(pipeline, index, timestep, tensors):
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    given = {"callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs}
    found = draw(pipe, callback_on_step_end=callback, **given)
    torch.testing.assert_close(found, draw(pipe), rtol=0, atol=0.1 * float(draw(pipe).std()))


def test_without_the_negative_prompt_there_is_no_guidance(pipe):
    with pytest.raises(ValueError, match="or callback_on_step_end returned None for it"):
        draw(pipe, callback_on_step_end=lambda *_: {"negative_prompt_embeds": None})


def test_diffusers_cutoff_of_guidance_serves_one_picture_alone(pipe):
    """It keeps the last row of the embeddings, which is another picture's prompt in a batch."""
    callback = SDCFGCutoffCallback(cutoff_step_index=1, cutoff_step_ratio=None)
    with pytest.raises(ValueError, match=r"prompt_embeds .* shape \(2, any, 16\), got \(1, "):
        pipe(["a cat", "a dog"], num_inference_steps=4, callback_on_step_end=callback)


# Schedulers


@pytest.mark.parametrize("name", ["IPNDMScheduler", "CMStochasticIterativeScheduler"])
def test_schedulers_without_prediction_type_are_refused_or_warned_of(pipe, calls, caplog, name):
    kind, taken = (
        getattr(diffusers, name),
        DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    )
    other = LocalDiTPipeline(**{**pipe.components, "scheduler": kind.from_config(taken.config)})
    with pytest.raises(ValueError, match=f"predicts 'v_prediction'. {name} has no prediction_type"):
        draw(other)
    assert not calls
    other.scheduler = kind()
    draw(other)
    assert f"{name} has no prediction_type" in caplog.text


@pytest.mark.parametrize("name", ["CogVideoXDPMScheduler", "RePaintScheduler", "HeliosScheduler"])
def test_schedulers_with_another_kind_of_step_are_refused(pipe, calls, name):
    if not hasattr(diffusers, name):
        pytest.skip("this Diffusers lacks it")
    other = LocalDiTPipeline(**{**pipe.components, "scheduler": getattr(diffusers, name)()})
    with pytest.raises(ValueError, match=f"{name} is not for this model: its step needs"):
        draw(other)
    assert not calls


def test_schedulers_that_count_timesteps_on_another_scale_are_warned_of(pipe, caplog):
    other = LocalDiTPipeline(**{**pipe.components, "scheduler": diffusers.EDMEulerScheduler()})
    draw(other)
    assert "starts at timestep 1.1, but the model counts timesteps up to 1000" in caplog.text


def test_a_new_scheduler_with_another_prediction_is_warned_of(pipe, caplog):
    other = LocalDiTPipeline(**pipe.components)
    other.scheduler = DDPMScheduler.from_config(other.scheduler.config)
    assert not caplog.records
    other.scheduler = DDPMScheduler(prediction_type="v_prediction")
    assert "'v_prediction', the previous one 'epsilon'" in caplog.text
    assert other.config["scheduler"] == ("diffusers", "DDPMScheduler")


# A program's settings


@contextmanager
def setting(change, value, back):
    change(value)
    try:
        yield
    finally:
        change(back)


def default_dtype(dtype):
    return setting(torch.set_default_dtype, dtype, torch.float32)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "device": lambda: setting(torch.set_default_device, "meta", None),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "numpy": lambda: np.errstate(all="raise"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_means_the_same_picture_in_any_setting(pipe, kind, name):
    scheduler = DDPMScheduler()  # draws noise at each step
    other = sibling(LocalDiTPipeline(**{**pipe.components, "scheduler": scheduler}), kind)
    reference = draw(other)
    other.prompt_cache.clear()
    with SETTINGS[name]():
        dtype = torch.get_default_dtype()
        picture = draw(other)
        assert torch.get_default_dtype() == dtype
    assert torch.equal(picture, reference)
    assert torch.equal(draw(other), reference)  # nothing of that setting is kept in a cache


def test_threads_leave_the_default_dtype_as_it_was(pipe):
    alone = draw(pipe)
    with default_dtype(torch.float64):
        with ThreadPoolExecutor(3) as pool:
            pictures = list(pool.map(lambda _: draw(pipe), range(6)))
        assert torch.get_default_dtype() == torch.float64
    assert all(torch.equal(picture, alone) for picture in pictures)


# Copies


def by_torch(pipe):
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe)), by_torch]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", COPIES)
def test_a_copy_of_a_pipeline_draws_the_same(kind, make, used):
    pipe = kind(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    early = make(pipe)
    reference = draw(pipe)
    for other in (early, make(pipe) if used else early):
        assert other.transformer is not pipe.transformer
        assert other.scheduler is not pipe.scheduler
        assert torch.equal(draw(other), reference)


def test_a_copy_without_text_encoder_still_serves_its_prompts(pipe):
    other = LocalDiTPipeline(**pipe.components)
    reference = draw(other)
    other.release_text_encoder()
    assert torch.equal(draw(pickle.loads(pickle.dumps(other))), reference)


def test_a_copy_of_a_cache_is_independent():
    cache = TextCache()
    cache.put("a", torch.ones(2, 3))
    other = copy.deepcopy(cache)
    cache.clear()
    assert torch.equal(other.get("a"), torch.ones(2, 3))
    assert other.lock is not cache.lock


@pytest.mark.slow
def test_a_spawned_process_draws_the_same(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"latents": latents, "num_inference_steps": 2, "output_type": "np"}
    reference = pipe("a cat", **arguments).images
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        drawn = pool.apply(LocalDiTPipeline.__call__, (pipe, "a cat"), arguments).images
    np.testing.assert_allclose(drawn, reference, atol=1e-5)
