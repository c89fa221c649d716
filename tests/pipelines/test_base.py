"""The stages that the pipelines share, tested with text to image unless an image is needed."""

import logging

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback

from localdit.core import latents as autoencoding
from localdit.core import tiling
from localdit.core.conditions import size_conditions
from localdit.pipelines import (
    LocalDiTImg2ImgPipeline,
    LocalDiTInpaintPipeline,
    LocalDiTPipeline,
)
from tests.tiny import tiny_components, tiny_pipeline

TEXT = [
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
]


def latents_of(pipe, prompt="a red circle", **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "latent", **arguments}
    generator = arguments.pop("generator", torch.Generator().manual_seed(0))
    return pipe(prompt, generator=generator, **arguments).images


# Saving, loading, sharing


@pytest.mark.parametrize("kind", [LocalDiTPipeline, LocalDiTImg2ImgPipeline])
def test_a_saved_pipeline_makes_identical_pictures(kind, tmp_path, seeded):
    pipe = kind(**tiny_components())
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    if kind is LocalDiTImg2ImgPipeline:
        arguments["image"] = torch.rand(3, 64, 64, generator=seeded())
    before = pipe("a cat", generator=seeded(), **arguments).images
    assert torch.equal(loaded("a cat", generator=seeded(), **arguments).images, before)


def test_a_pipeline_saved_without_text_encoder_loads_and_runs(pipe, tmp_path):
    with torch.no_grad():
        embeds = dict(zip(TEXT, pipe.encode_prompt("a red circle"), strict=True))
    bare = LocalDiTPipeline(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    bare.save_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    assert loaded.text_encoder is None
    torch.testing.assert_close(latents_of(loaded, None, **embeds), latents_of(pipe))


def test_prompts_are_encoded_without_the_other_components(pipe):
    components = {**pipe.components, "vae": None, "transformer": None, "scheduler": None}
    with torch.no_grad():
        embeds = LocalDiTPipeline(**components).encode_prompt("a red circle", negative_prompt="bad")
    given = latents_of(pipe, None, **dict(zip(TEXT, embeds, strict=True)))
    torch.testing.assert_close(given, latents_of(pipe, negative_prompt="bad"))


KINDS = [LocalDiTPipeline, LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other_kind", KINDS)
def test_pipelines_share_components_as_they_are(kind, other_kind):
    pipe = kind(**tiny_components()).to(torch.bfloat16)
    other = other_kind.from_pipe(pipe)
    assert type(other) is other_kind
    for name, component in pipe.components.items():
        assert getattr(other, name) is component
    assert other.prompt_cache is pipe.prompt_cache
    assert pipe.transformer.dtype == torch.bfloat16
    kind.from_pipe(other, torch_dtype=torch.float32)
    assert pipe.transformer.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_of_offloaded_models_offloads_them_too(kind, monkeypatch):
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    other = kind.from_pipe(pipe)
    offloaded = []
    enable = kind.enable_model_cpu_offload
    monkeypatch.setattr(
        kind,
        "enable_model_cpu_offload",
        lambda self, **options: (offloaded.append((self, options)), enable(self, **options))[1],
    )
    picture, mask = torch.rand(3, 64, 64), torch.ones(1, 64, 64)
    given = {LocalDiTImg2ImgPipeline: (picture,), LocalDiTInpaintPipeline: (picture, mask)}
    other("a cat", *given.get(kind, ()), num_inference_steps=2)
    assert offloaded == [(other, {"device": torch.device("cpu:0")})]
    assert pipe("a cat", num_inference_steps=2, output_type="pt").images.isfinite().all()


# Guidance, conditions


def test_guidance_puts_the_negative_prompts_first_in_one_batch(pipe, calls):
    latents_of(pipe, ["a cat", "a dog"], negative_prompt=["bad", "blurry"])
    assert len(calls) == 3
    with torch.no_grad():
        positive, mask, negative, negative_mask = pipe.encode_prompt(
            ["a cat", "a dog"], negative_prompt=["bad", "blurry"]
        )
    for call in calls:
        assert call["hidden_states"].shape == (4, 4, 8, 8)
        assert torch.equal(*call["hidden_states"].chunk(2))
        assert torch.equal(call["encoder_hidden_states"], torch.cat([negative, positive])[:, :8])
        assert torch.equal(call["encoder_attention_mask"], torch.cat([negative_mask, mask])[:, :8])
        assert call["timestep"].shape == (4,)


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.0])
def test_without_guidance_there_is_no_second_half(pipe, calls, scale):
    latents_of(pipe, ["a cat", "a dog"], guidance_scale=scale)
    assert [len(call["hidden_states"]) for call in calls] == [2, 2, 2]
    assert not pipe.do_classifier_free_guidance


def test_the_picture_follows_prompt_negative_prompt_and_guidance(pipe):
    reference = latents_of(pipe)
    for change in (
        {"prompt": "a blue dog"},
        {"negative_prompt": "bad quality"},
        {"guidance_scale": 3.0},
        {"num_inference_steps": 4},
        {"generator": torch.Generator().manual_seed(1)},
    ):
        assert (latents_of(pipe, **change) - reference).abs().max() > 1e-3


def test_size_conditions_apply_to_every_row(pipe, calls):
    latents_of(pipe, ["a cat", "a dog"], height=48, width=96)
    conditions = calls[0]["added_cond_kwargs"]
    assert torch.equal(conditions["resolution"], torch.tensor([[48.0, 96.0]]))
    assert torch.equal(conditions["aspect_ratio"], torch.tensor([[2.0]]))
    assert calls[0]["hidden_states"].shape == (4, 4, 6, 12)


def test_a_transformer_without_conditions_gets_none(monkeypatch):
    pipe = tiny_pipeline(use_additional_conditions=False)
    assert latents_of(pipe).isfinite().all()
    assert size_conditions(
        pipe.transformer.use_additional_conditions, 64, 64, torch.device("cpu")
    ) == {
        "resolution": None,
        "aspect_ratio": None,
    }


def test_a_learned_variance_is_left_out(seeded):
    pipe = tiny_pipeline(out_channels=8)
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    embeds, mask = pipe.encode_prompt("a cat", False)[:2]
    full = pipe.transformer(
        latents,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        timestep=torch.tensor([7]),
        added_cond_kwargs=size_conditions(
            pipe.transformer.use_additional_conditions, 64, 64, latents.device
        ),
    ).sample
    assert full.shape[1] == 8
    predicted = pipe.predict(torch.tensor(7), latents, embeds, mask)
    torch.testing.assert_close(predicted, full[:, :4])
    assert latents_of(pipe).isfinite().all()


# Schedules


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler]
)
def test_other_schedulers_work(pipe, img2img, scheduler, seeded):
    components = {**pipe.components, "scheduler": scheduler()}
    generators = [seeded(0), seeded(1)]
    assert (
        latents_of(LocalDiTPipeline(**components), ["a", "b"], generator=generators)
        .isfinite()
        .all()
    )
    changed = LocalDiTImg2ImgPipeline(**components)
    image = torch.rand(3, 64, 64, generator=seeded())
    assert latents_of(changed, image=image, strength=0.7).isfinite().all()
    # Heun's method calls the model twice in each of the two steps but the last.
    assert changed.num_timesteps == (3 if scheduler is HeunDiscreteScheduler else 2)


def test_custom_timesteps_and_sigmas_are_used(pipe, calls):
    latents_of(pipe, timesteps=[900, 400, 100, 10])
    assert [int(call["timestep"][0]) for call in calls] == [900, 400, 100, 10]
    assert pipe.num_timesteps == 4
    for same in (range(900, 0, -400), list(torch.tensor([900, 500, 100]))):
        latents_of(pipe, timesteps=same)
        assert pipe.scheduler.timesteps.tolist() == [900, 500, 100]
    calls.clear()
    euler = LocalDiTPipeline(**{**pipe.components, "scheduler": EulerDiscreteScheduler()})
    with pytest.raises(ValueError, match=r"sigmas must be .* at least 0, got \[10.0, -5.0\]"):
        latents_of(euler, sigmas=[10.0, -5.0])
    latents_of(euler, sigmas=[10.0, 2.0, 0.0])
    assert euler.scheduler.sigmas[:2].tolist() == [10.0, 2.0]
    assert len(calls) == euler.num_timesteps


@pytest.mark.parametrize(
    ("scheduler", "kept", "refused"),
    [
        (DDPMScheduler(), {"timesteps": [999, 500]}, {"timesteps": [1005, 500]}),
        (LCMScheduler(), {"timesteps": [999, 499]}, {"timesteps": [1500, 500]}),
        (EulerDiscreteScheduler(), {"timesteps": [999, 500.5]}, {"timesteps": [1500, 500]}),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.0, 0.5]}, {"sigmas": [1.5, 0.5]}),
    ],
    ids=lambda one: type(one).__name__,
)
def test_timesteps_beyond_those_of_training_are_refused(pipe, scheduler, kept, refused):
    pipe = LocalDiTPipeline(**{**pipe.components, "scheduler": scheduler})
    latents_of(pipe, **kept)
    with pytest.raises(ValueError, match="5.*the model was trained up to (999|1):"):
        latents_of(pipe, **refused)


def test_a_number_of_steps_beside_a_schedule_is_warned_of(pipe, caplog, seeded):
    expected = pipe("a cat", timesteps=[900, 100], generator=seeded(), output_type="latent").images
    assert not caplog.records
    given = {"timesteps": [900, 100], "num_inference_steps": 20, "output_type": "latent"}
    assert torch.equal(pipe("a cat", **given, generator=seeded()).images, expected)
    assert "num_inference_steps has no effect beside custom" in caplog.text


def test_noise_is_scaled_to_the_schedulers_initial_sigma(pipe, calls, seeded):
    euler = LocalDiTPipeline(**{**pipe.components, "scheduler": EulerDiscreteScheduler()})
    latents_of(euler, guidance_scale=1.0)
    sigma = euler.scheduler.sigmas[0]
    assert euler.scheduler.init_noise_sigma > 10
    start = torch.randn(1, 4, 8, 8, generator=seeded()) * euler.scheduler.init_noise_sigma
    torch.testing.assert_close(calls[0]["hidden_states"], start / (sigma**2 + 1).sqrt())


def test_eta_reaches_a_scheduler_that_has_one(pipe):
    ddim = LocalDiTPipeline(**{**pipe.components, "scheduler": DDIMScheduler()})
    assert (latents_of(ddim, eta=1.0) - latents_of(ddim)).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 49])
def test_few_steps_and_many_stay_finite(pipe, steps):
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=50)
    short = LocalDiTPipeline(**{**pipe.components, "scheduler": scheduler})
    assert latents_of(short, num_inference_steps=steps).isfinite().all()
    with pytest.raises(ValueError, match="The 51 timesteps"):
        latents_of(short, num_inference_steps=51)


# Callbacks


def test_a_callback_gets_the_tensors_it_asks_for_at_every_step(pipe):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        assert pipeline is pipe
        seen.append((index, int(timestep), sorted(tensors)))

    latents_of(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
    )
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert seen[0][2] == sorted(["latents", *TEXT])


def test_what_a_callback_returns_replaces_the_tensors(pipe):
    def blank_at_the_end(pipeline, index, timestep, tensors):
        assert list(tensors) == ["latents"]
        last = index == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else tensors

    assert latents_of(pipe, callback_on_step_end=blank_at_the_end).abs().sum() == 0


def test_a_callback_may_change_the_guidance(pipe):
    def stronger(pipeline, index, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    changed = latents_of(pipe, guidance_scale=2.0, callback_on_step_end=stronger)
    assert pipe.guidance_scale == 5.0
    assert (changed - latents_of(pipe, guidance_scale=2.0)).abs().max() > 1e-3


def test_diffusers_own_callback_ends_guidance_early(pipe, calls):
    latents_of(pipe, callback_on_step_end=SDCFGCutoffCallback(None, cutoff_step_index=0))
    assert [len(call["hidden_states"]) for call in calls] == [2, 1, 1]


def test_guidance_cannot_begin_without_a_negative_prompt(pipe):
    def guide(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 7.0

    with pytest.raises(ValueError, match="start with a guidance_scale above 1"):
        latents_of(pipe, guidance_scale=1.0, callback_on_step_end=guide)


def test_a_callback_can_interrupt(pipe, calls):
    def stop(pipeline, index, timestep, tensors):
        pipeline._interrupt = index == 1

    stopped = latents_of(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert len(calls) == 2
    assert stopped.isfinite().all()
    latents_of(pipe)  # the next call starts afresh
    assert len(calls) == 5


def test_the_progress_bar_counts_the_steps(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    latents_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    assert "3/3" in capfd.readouterr().err


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_nearly_the_same_picture(pipe, dtype, seeded):
    half = tiny_pipeline().to(dtype)
    picture = half("a cat", num_inference_steps=3, generator=seeded(), output_type="pt").images
    reference = pipe("a cat", num_inference_steps=3, generator=seeded(), output_type="pt").images
    assert picture.isfinite().all()
    assert latents_of(half).dtype == dtype
    assert (picture.float() - reference).abs().mean() < 0.03


def test_components_may_differ_in_dtype(seeded):
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    seen = []
    result = pipe(
        "a cat",
        num_inference_steps=2,
        output_type="pt",
        callback_on_step_end=lambda *arguments: seen.append(arguments[-1]["latents"].dtype),
    ).images
    assert seen == [torch.bfloat16] * 2
    assert result.dtype == torch.float32


def test_a_float16_autoencoder_that_overflows_works_in_float32(monkeypatch):
    pipe = tiny_pipeline().to(torch.float16)
    assert pipe.vae.config.force_upcast
    dtypes = []
    decode = pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae, "decode", lambda z, **options: (dtypes.append(z.dtype), decode(z, **options))[1]
    )
    pipe("a cat", num_inference_steps=1)
    assert dtypes == [torch.float32]
    assert pipe.vae.dtype == torch.float16


# Decoding


def test_large_pictures_are_decoded_in_tiles_and_the_autoencoder_restored(pipe, monkeypatch):
    tiled = []
    tiled_decode = pipe.vae.tiled_decode
    monkeypatch.setattr(
        pipe.vae, "tiled_decode", lambda *a, **k: (tiled.append(1), tiled_decode(*a, **k))[1]
    )
    monkeypatch.setattr(autoencoding, "TILING_THRESHOLD", 64 * 128)
    monkeypatch.setattr(tiling, "TILE", 8)
    assert pipe("a cat", height=64, width=128, num_inference_steps=1).images[0].size == (128, 64)
    assert not tiled
    assert pipe("a cat", height=80, width=128, num_inference_steps=1).images[0].size == (128, 80)
    assert tiled
    assert not pipe.vae.use_tiling


def test_tiling_that_is_switched_on_stays_on(pipe):
    pipe.vae.enable_tiling()
    try:
        image = pipe("a cat", height=128, width=96, num_inference_steps=1).images[0]
        assert image.size == (96, 128)
        assert pipe.vae.use_tiling
    finally:
        pipe.vae.disable_tiling()


def test_the_autoencoder_is_restored_after_a_failure(pipe, monkeypatch):
    monkeypatch.setattr(autoencoding, "TILING_THRESHOLD", 0)
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe("a cat", num_inference_steps=1)
    assert not pipe.vae.use_tiling


def test_scaling_and_shift_of_the_latents_are_undone(pipe, monkeypatch):
    decoded = []
    decode = pipe.vae.decode
    monkeypatch.setattr(
        pipe.vae, "decode", lambda z, **options: (decoded.append(z), decode(z, **options))[1]
    )
    pipe.vae.register_to_config(shift_factor=0.5)
    pipe("a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    pipe.vae.register_to_config(shift_factor=None)
    latents = latents_of(pipe, "a cat", num_inference_steps=1)
    torch.testing.assert_close(decoded[0], latents / 0.13025 + 0.5)


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog):
    words = "a cat " * 59 + "and"  # 119, as many as fit beside </s>
    with caplog.at_level(logging.WARNING):
        fits = latents_of(pipe, words)
        assert not caplog.records
        cut = latents_of(pipe, words + " blue dog")
    assert "left out: 'blue dog'" in caplog.text
    assert torch.equal(cut, fits)


# Offloading. The CPU stands in for an accelerator: the hooks do the same there.


def offload_whole_models(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_layer_by_layer(pipe):
    for model in (pipe.text_encoder, pipe.transformer, pipe.vae):
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert pipe.transformer.device.type == "meta"


@pytest.mark.parametrize("offload", [offload_whole_models, offload_layer_by_layer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_offloading_does_not_change_the_picture(offload, dtype, seeded):
    pipe = tiny_pipeline().to(dtype)
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    expected = pipe("a cat", generator=seeded(), **arguments).images
    offload(pipe)
    assert torch.equal(pipe("a cat", generator=seeded(), **arguments).images, expected)
    changed = LocalDiTImg2ImgPipeline(**pipe.components)
    assert changed("a dog", image=expected, **arguments).images.isfinite().all()


def test_the_offload_order_names_every_model(pipe):
    models = {n for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == models
