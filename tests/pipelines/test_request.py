import numpy as np
import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from diffusers.callbacks import SDXLCFGCutoffCallback
from transformers import T5Config, T5EncoderModel

from localdit.config import Config
from localdit.inference import inference
from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
from localdit.pipelines.request import (
    check_generator,
    check_integer,
    check_number,
    check_tensor,
)

EMBEDS = {"prompt_embeds": torch.zeros(2, 7, 16), "prompt_attention_mask": torch.ones(2, 7)}
NEGATIVE = {f"negative_{name}": tensor for name, tensor in EMBEDS.items()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 100}, ValueError, "height .* 16 pixels, got 100; .* 96 or 112"),
        ({"width": 0}, ValueError, "width .* got 0; .* 16"),
        ({"width": -64}, ValueError, "got -64"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be a positive"),
        ({"num_inference_steps": -3}, ValueError, "num_inference_steps must be a positive"),
        ({"num_inference_steps": 2.5}, ValueError, "num_inference_steps must be a positive"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt"),
        ({"max_sequence_length": 0}, ValueError, "max_sequence_length"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"guidance_scale": 1e300}, ValueError, "guidance_scale must be a number from -1e"),
        ({"cross_attention_kwargs": {"scale": -1e300}}, ValueError, "scale .* a number from -1e"),
        ({"guidance_scale": "2"}, ValueError, "guidance_scale"),
        ({"output_type": "jpeg"}, ValueError, "output_type: 'jpeg' is not one of pil, np, pt, "),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "'noise' is not one of l"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, TypeError, "a list .* got 'latents'"),
        ({"callback_on_step_end": SDXLCFGCutoffCallback()}, ValueError, "'add_time_ids' is not"),
        ({"callback_on_step_end": 5}, TypeError, "callback_on_step_end must be a function or None"),
        ({"cross_attention_kwargs": [1]}, TypeError, "must be a dict or None, got list"),
        ({"eta": 1.5}, ValueError, "eta must be a number from 0 to 1, got 1.5"),
        ({"eta": float("nan")}, ValueError, "eta must be a number from 0 to 1"),
        ({"eta": "0.5"}, ValueError, "eta must be a number from 0 to 1"),
        ({"prompt": None}, ValueError, "either prompt or prompt_embeds"),
        ({"prompt": []}, ValueError, "prompt is an empty list"),
        ({"prompt": 5}, TypeError, "prompt must be a str or a list"),
        ({"negative_prompt": []}, ValueError, "negative_prompt is an empty list"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "1 prompts but 2 negative prompts"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, ValueError, "2 prompts but 1 negative"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "list of 2, but 1 pictures"),
        ({"generator": 0}, TypeError, r"torch\.Generator"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, ValueError, r"latents must have shape \(1, 4, 8, 8"),
        ({"timesteps": [9, 5], "sigmas": [1.0]}, ValueError, "either timesteps or sigmas"),
        ({"sigmas": [2.0, 1.0]}, ValueError, "DPMSolverMultistepScheduler takes no custom sigmas"),
        ({"num_inference_steps": 1001}, ValueError, "1001 timesteps must each be lower"),
        ({"timesteps": [500, 500]}, ValueError, "timesteps must each be lower"),
        ({"timesteps": [10, 500]}, ValueError, "timesteps must each be lower"),
        ({"timesteps": [10, -5]}, ValueError, "at least 0"),
        ({"timesteps": [1000, 500]}, ValueError, "has 1000, but the model was trained up to 999"),
        ({"timesteps": []}, ValueError, "The 0 timesteps"),
        *(
            ({"timesteps": wrong}, ValueError, "timesteps must be a list of finite numbers")
            for wrong in (5, "95", ["a"], [None], [[999], [500]], [float("nan"), 5], {999: 1})
        ),
        ({"timesteps": [900.9, 500]}, ValueError, "Multistep.* takes whole timesteps: round"),
        (EMBEDS, ValueError, "either prompt or prompt_embeds"),
        ({"prompt": None, **EMBEDS, "prompt_attention_mask": None}, ValueError, "go together"),
        ({"prompt_attention_mask": torch.ones(1, 7)}, ValueError, "go together"),
        (
            {"prompt": None, **EMBEDS, "prompt_attention_mask": torch.ones(2, 6)},
            ValueError,
            r"prompt_attention_mask must have shape \(2, 7\)",
        ),
        *(
            ({"prompt": None, **EMBEDS, "prompt_attention_mask": mask}, ValueError, message)
            for mask, message in (
                (-torch.ones(2, 7), "must be 1 for tokens and 0 for padding"),
                (torch.full((2, 7), 0.5), "must be 1 for tokens and 0 for padding"),
                (torch.full((2, 7), torch.nan), "must be 1 for tokens and 0 for padding"),
                (torch.tensor([[True], [False]]).expand(2, 7), "a 1 in every row"),
            )
        ),
        (
            {"prompt": None} | {name: tensor[:0] for name, tensor in EMBEDS.items()},
            ValueError,
            "at least one row",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 120, 16)}
            | {"negative_prompt_attention_mask": torch.arange(120)[None]},
            ValueError,
            "negative_prompt_attention_mask must be 1 for tokens and 0 for padding",
        ),
        (
            {"prompt": None, **EMBEDS, "prompt_embeds": torch.zeros(2, 7, 15)},
            ValueError,
            r"prompt_embeds must have shape \(any, any, 16\), got \(2, 7, 15\)",
        ),
        (
            {**NEGATIVE, "negative_prompt": "bad", "max_sequence_length": 7},
            ValueError,
            "either negative_prompt or",
        ),
        (NEGATIVE, ValueError, r"negative_prompt_embeds must have shape \(any, 120, 16\)"),
        (
            {**NEGATIVE, "max_sequence_length": 7},
            ValueError,
            "1 prompts but 2 negative prompts",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    pipe, calls, monkeypatch, arguments, error, message
):
    encodings = []
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *_, **__: encodings.append(1))
    with pytest.raises(error, match=message):
        pipe(**{"prompt": "a cat", **arguments})
    assert not calls
    assert not encodings


HUGE = 10**400  # larger than any float


@pytest.mark.parametrize(
    "arguments",
    [
        {"height": HUGE},
        {"width": HUGE},
        {"num_inference_steps": HUGE},
        {"timesteps": [HUGE]},
        {"guidance_scale": HUGE},
        {"guidance_interval": (0, HUGE)},
        {"num_images_per_prompt": HUGE},
        {"eta": HUGE},
        {"max_sequence_length": HUGE},
        {"cross_attention_kwargs": {"scale": HUGE}},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_integers_of_hundreds_of_digits_are_refused(pipe, calls, arguments):
    with pytest.raises(ValueError):
        pipe("a cat", **arguments)
    assert not calls


def test_a_text_encoder_of_another_width_is_refused(pipe):
    wide = T5EncoderModel(T5Config(d_model=24, d_kv=8, num_heads=2, num_layers=1, d_ff=16))
    pipe = LocalDiTPipeline(**{**pipe.components, "text_encoder": wide})
    with pytest.raises(ValueError, match="states of 24 channels, but the transformer takes 16"):
        pipe("a cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(2, 7, 16)}, "either prompt or prompt_embeds"),
        (EMBEDS, "either prompt or prompt_embeds"),
        ({"prompt": None, **EMBEDS, "prompt_attention_mask": None}, "go together"),
        ({"prompt_attention_mask": torch.ones(1, 7)}, "go together"),
        ({"negative_prompt_embeds": torch.zeros(1, 120, 16)}, "go together"),
        ({"prompt": None, **EMBEDS, "prompt_embeds": torch.zeros(2, 7, 15)}, "16.*got"),
        (NEGATIVE, r"negative_prompt_embeds must have shape \(any, 120, 16\)"),
    ],
)
def test_encode_prompt_refuses_what_a_call_refuses(pipe, arguments, message):
    for use in (pipe, pipe.encode_prompt):
        with pytest.raises(ValueError, match=message):
            use(**{"prompt": "a cat", **arguments})


@pytest.mark.parametrize(
    ("part", "other", "expected"),
    [
        ("transformer", torch.nn.Linear(2, 2), "Linear; expected a LocalDiTTransformer2DModel"),
        ("vae", torch.nn.Linear(2, 2), "Linear; expected an autoencoder"),
        ("text_encoder", torch.nn.Linear(2, 2), "Linear; expected a text model"),
        ("scheduler", ScoreSdeVeScheduler(), "ScoreSdeVeScheduler; expected a scheduler"),
    ],
)
def test_a_component_of_another_kind_is_named(pipe, calls, part, other, expected):
    wrong = LocalDiTPipeline(**pipe.components)
    setattr(wrong, part, other)
    with pytest.raises(TypeError, match=f"The pipeline's {part} is a {expected}"):
        wrong("a cat")
    assert not calls


@pytest.mark.parametrize("part", ["transformer", "scheduler", "vae"])
@pytest.mark.parametrize(
    "kind", [LocalDiTPipeline, LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline]
)
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_a_missing_component_is_named_before_any_work(pipe, calls, kind, output_type, part):
    lacking = kind(**{**pipe.components, part: None})
    pictures = {"image": torch.zeros(3, 64, 64), "mask_image": torch.ones(1, 64, 64)}
    names = {LocalDiTImg2ImgPipeline: ["image"], LocalDiTInpaintPipeline: list(pictures)}
    inputs = {name: pictures[name] for name in names.get(kind, [])}
    arguments = {"num_inference_steps": 1, "output_type": output_type}
    if part == "vae" and output_type == "latent":
        if inputs:
            inputs["image"] = torch.randn(4, 8, 8)
        assert lacking("a cat", **inputs, **arguments).images.shape == (1, 4, 8, 8)
        return
    with pytest.raises(ValueError, match=f"The pipeline has no {part}, which"):
        lacking("a cat", **inputs, **arguments)
    assert not calls
    with pytest.raises(ValueError, match=f"The pipeline has no {part}, which inference needs"):
        inference(lacking, "a cat", "", Config(height=64, width=64))


def test_a_picture_needs_a_vae(pipe, calls):
    lacking = LocalDiTImg2ImgPipeline(**{**pipe.components, "vae": None})
    with pytest.raises(ValueError, match="no vae, which a picture as image needs"):
        lacking("a cat", torch.zeros(3, 64, 64), output_type="latent")
    assert not calls


def test_prompts_need_a_text_encoder_or_embeddings(pipe):
    textless = type(pipe)(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="no tokenizer or no text encoder"):
        textless("a cat")
    with pytest.raises(ValueError, match="no tokenizer or no text encoder"):
        textless(**EMBEDS)  # guided, so the negative prompt would have to be encoded


def test_a_numpy_integer_is_an_integer():
    check_integer("n", np.int32(1), 1)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_counts_are_positive_integers(value):
    with pytest.raises(ValueError, match="n must be a positive integer"):
        check_integer("n", value, 1)


def test_integers_from_a_bound_on():
    check_integer("n", 0, 0)
    with pytest.raises(ValueError, match="n must be an integer of at least 0, got -1"):
        check_integer("n", -1, 0)


@pytest.mark.parametrize("value", [-0.01, 1.01, HUGE, float("nan"), float("inf"), "0.5", None])
def test_numbers_in_a_range(value):
    with pytest.raises(ValueError, match="strength must be a number from 0 to 1"):
        check_number("strength", value, 0, 1)


def test_both_ends_of_a_range_are_in_it():
    check_number("strength", 0, 0, 1)
    check_number("strength", 1.0, 0, 1)


def test_generators_are_one_or_one_for_each_picture():
    generator = torch.Generator()
    for good in (None, generator, [generator, generator]):
        check_generator(good, 2)
    with pytest.raises(ValueError, match="list of 3, but 2 pictures"):
        check_generator([generator] * 3, 2)
    with pytest.raises(ValueError, match="list of 0"):
        check_generator([], 2)
    for bad in (7, [generator, 7], [None, None]):
        with pytest.raises(TypeError, match=r"torch\.Generator"):
            check_generator(bad, 2)


def test_tensors_have_their_shape_and_finite_values():
    check_tensor("latents", torch.zeros(2, 5), (2, None))
    with pytest.raises(ValueError, match=r"latents must have shape \(2, any\), got \(3, 5\)"):
        check_tensor("latents", torch.zeros(3, 5), (2, None))
    with pytest.raises(ValueError, match="shape"):
        check_tensor("latents", torch.zeros(2), (2, None))
    with pytest.raises(TypeError, match="ndarray"):
        check_tensor("latents", np.zeros((2, 5)), (2, None))
    with pytest.raises(ValueError, match="NaN"):
        check_tensor("latents", torch.tensor([float("nan")]), (1,))
