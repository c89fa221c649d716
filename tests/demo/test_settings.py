import pytest

from localdit.config import Config
from localdit.demo.settings import MAX_SEED, Offer


def test_settings_become_those_of_the_config(asked, config):
    settings = asked(
        "edit", num_inference_steps=7, guidance_scale=3.5, height=48, width=64, strength=0.25
    )
    made = settings.configure(config)
    assert (made.denoising_steps, made.guidance_scale, made.denoising_strength) == (7, 3.5, 0.25)
    assert (made.height, made.width) == (48, 64)
    assert made.sample_size == config.sample_size


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "  \n"}, "The prompt is empty"),
        ({"height": 0}, "Height is 0; expected at least 1"),
        ({"width": None}, "Width is None"),
        ({"num_inference_steps": 0}, "Steps is 0; expected at least 1"),
        ({"guidance_scale": float("nan")}, "Guidance is nan"),
        ({"strength": 1.5}, "Strength is 1.5; expected at least 0 and at most 1"),
        ({"seed": -1}, "The seed must be a whole number from 0"),
        ({"seed": None}, "The seed must be a whole number from 0"),
        ({"seed": MAX_SEED + 1}, "The seed must be a whole number from 0"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_the_words_of_the_page(asked, config, changes, message):
    with pytest.raises(ValueError) as raised:
        asked(**changes).configure(config)
    assert str(raised.value).startswith(message)


def test_sides_go_up_to_twice_what_stands_in_the_page():
    offer = Offer(Config(height=768, width=1024), "", ["a"], {}, None, 32)
    assert offer.sides == (32, 2048, 32)
