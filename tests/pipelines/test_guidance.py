from types import SimpleNamespace

import pytest
import torch

from localdit.core.conditions import size_conditions
from localdit.core.text import cut_padding
from localdit.pipelines.request import DenoiserText, Request
from tests.tiny import tiny_pipeline


def draw(pipe, prompt="a cat", **arguments):
    arguments = {"num_inference_steps": 5, "output_type": "latent", **arguments}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).images


# Text without padding


def test_padding_of_all_rows_is_cut_to_a_multiple_of_eight():
    embeds, mask = torch.randn(2, 120, 4), torch.zeros(2, 120)
    mask[0, :3] = mask[1, :9] = 1
    short, short_mask = cut_padding(embeds, mask)
    assert torch.equal(short, embeds[:, :16])
    assert torch.equal(short_mask, mask[:, :16])
    mask[0, 118] = 0.5  # weighs a little, so it counts
    assert cut_padding(embeds, mask)[0].shape[1] == 120


def test_other_lengths_are_not_cut():
    assert cut_padding(torch.randn(1, 13, 4), torch.ones(1, 13))[0].shape == (1, 13, 4)


def test_a_row_of_padding_alone_stops_the_cut():
    mask = torch.zeros(2, 24)
    mask[0, :3] = 1
    assert cut_padding(torch.randn(2, 24, 4), mask)[0].shape[1] == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_predicts_the_same_without_padding(dtype, seeded):
    pipe = tiny_pipeline().to(dtype)
    latents = torch.randn(2, 4, 8, 8, generator=seeded()).to(dtype)
    text = pipe.encode_prompt(["a cat", "a small red dog on the left of a lake"], False)[:2]
    shared = {
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": size_conditions(
            pipe.transformer.use_additional_conditions, 64, 64, latents.device
        ),
        "return_dict": False,
    }
    with torch.no_grad():
        full, cut = (
            pipe.transformer(
                latents, encoder_hidden_states=embeds, encoder_attention_mask=mask, **shared
            )[0].float()
            for embeds, mask in (text, cut_padding(*text))
        )
    assert cut_padding(*text)[0].shape[1] == 16
    scale = full.abs().max()
    assert (cut - full).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * scale
    garbled = text[0].clone()
    garbled[:, 16:] = 1e3  # what is cut has no weight at all
    with torch.no_grad():
        other = pipe.transformer(
            latents, encoder_hidden_states=garbled, encoder_attention_mask=text[1], **shared
        )[0].float()
    assert torch.equal(other, full)


# Joined text


def test_text_is_joined_once_in_a_call(pipe, calls):
    draw(pipe)
    assert len({id(call["encoder_hidden_states"]) for call in calls}) == 1
    assert pipe._denoiser_text._made is None  # and nothing of it is kept


def test_text_is_joined_again_when_it_changes():
    join, mask = DenoiserText(), torch.ones(1, 8)
    one, other = torch.zeros(1, 8, 4), torch.ones(1, 8, 4)
    made, _ = join((one, mask), (other, mask))
    assert join((one, mask), (other, mask))[0] is made
    assert torch.equal(join((other, mask), (one, mask))[0], made.flip(0))
    assert torch.equal(join((one, mask))[0], one)
    one.add_(2)  # in place
    assert torch.equal(join((one, mask))[0], torch.full((1, 8, 4), 2.0))
    mask[0, 1:] = 0
    assert join((one, mask))[1].sum() == 1


def test_inference_mode_gives_the_same_picture(pipe):
    expected = draw(pipe)
    with torch.inference_mode():
        assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_may_replace_the_text(pipe, calls, in_place):
    def silence(pipeline, index, timestep, tensors):
        embeds = tensors["prompt_embeds"]
        return {"prompt_embeds": embeds.zero_() if in_place else torch.zeros_like(embeds)}

    draw(pipe, callback_on_step_end=silence, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    sums = [float(call["encoder_hidden_states"][1].abs().sum()) for call in calls]
    assert sums[0] > 0
    assert sums[1:] == [0] * 4


# The guidance interval


def test_fractions_become_steps():
    def guided_steps(interval, steps):
        return Request.guided_steps(SimpleNamespace(guidance_interval=interval), steps)

    assert guided_steps((0.0, 1.0), 20) == range(20)
    assert guided_steps((0.25, 0.75), 10) == range(2, 7)
    assert not guided_steps((0.5, 0.5), 10)


def test_the_negative_prompt_is_left_out_outside_the_interval(pipe, calls):
    draw(pipe, guidance_interval=(0.2, 0.6))
    assert [len(call["hidden_states"]) for call in calls] == [1, 2, 2, 1, 1]
    assert pipe._within_interval


def test_the_interval_has_an_effect_and_covers_all_steps_by_default(pipe):
    reference = draw(pipe)
    assert torch.equal(draw(pipe, guidance_interval=(0.0, 1.0)), reference)
    assert (draw(pipe, guidance_interval=(0.2, 0.6)) - reference).abs().max() > 1e-3
    unguided = draw(pipe, guidance_scale=1.0)
    assert torch.equal(draw(pipe, guidance_interval=(0.3, 0.3)), unguided)


def test_a_callback_changes_the_guidance_only_within_the_interval(pipe, calls):
    def guide(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 0.0 if index == 1 else 7.0

    draw(pipe, callback_on_step_end=guide, guidance_interval=(0.2, 0.8))
    assert [len(call["hidden_states"]) for call in calls] == [1, 2, 1, 2, 1]


def test_the_interval_of_image_to_image_counts_the_steps_taken(img2img, calls):
    arguments = {"image": torch.zeros(3, 64, 64), "strength": 0.5, "num_inference_steps": 8}
    img2img("a cat", guidance_interval=(0.5, 1.0), **arguments)
    assert [len(call["hidden_states"]) for call in calls] == [1, 1, 2, 2]


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1), (0, 1.5), (0.5,), 0.5, (0, "1"), None])
def test_other_intervals_are_refused(pipe, calls, interval):
    with pytest.raises(ValueError, match="guidance_interval must be two fractions"):
        draw(pipe, guidance_interval=interval)
    assert not calls


@pytest.mark.parametrize(
    ("negative_prompt", "options", "warned"),
    [
        ("blurry", {"guidance_scale": 1.0}, True),
        (["", "blurry"], {"guidance_scale": 0.0}, True),
        ("blurry", {"guidance_scale": 3.0, "guidance_interval": (0.5, 0.5)}, True),
        ("blurry", {"guidance_scale": 3.0}, False),
        (" ", {"guidance_scale": 1.0}, False),
        (None, {"guidance_scale": 1.0}, False),
    ],
)
def test_a_negative_prompt_without_guidance_gives_a_warning(
    pipe, caplog, negative_prompt, options, warned
):
    pipe(["a cat", "a dog"], negative_prompt=negative_prompt, height=32, width=32,
         num_inference_steps=2, **options)  # fmt: skip
    assert ("The negative prompt has no effect" in caplog.text) == warned


@pytest.mark.parametrize(
    ("interval", "scale", "warned"),
    [
        ((0, 0.1), 3.0, True),
        ((0.3, 0.4), 3.0, True),
        ((0, 0.1), 1.0, False),
        ((0.5, 0.5), 3.0, False),
        ((0, 0.25), 3.0, False),
        ((0, 1), 3.0, False),
    ],
)
def test_an_interval_that_guides_no_step_gives_a_warning(pipe, caplog, interval, scale, warned):
    draw(pipe, num_inference_steps=4, guidance_interval=interval, guidance_scale=scale)
    assert ("No step is guided" in caplog.text) == warned
