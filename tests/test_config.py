"""`Config`: its defaults, and its checks."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import config as top_level
from localdit.config import Config, inference_settings, with_settings

DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 18,
    "patch_size": 2,
    "window_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "do_rope": True,
    "use_global": False,
    "shift_schedule": "cyclic",
    "sample_size": 128,
    "eps": 1e-10,
    "dropout": 0.0,
    "max_length": 120,
    "height": 768,
    "width": 1024,
    "denoising_steps": 20,
    "denoising_strength": 0.8,
    "guidance_scale": 7.0,
    "batch_size": 1,
    "ckpt_path": "output/LocalDiT-1024.pt",
    "text_encoder": "google/flan-t5-xxl",
    "vae": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    "scheduler": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    "sampler": None,
    "offload": None,
    "text_encoder_quantization": None,
    "num_workers": 32,
    "train_sampling_steps": 1000,
    "save_checkpoint_interval": 20_000,
    "validation_interval": 1_000,
    "learning_rate": 5e-5,
    "weight_decay": 3e-2,
    "gradient_clip": 0.01,
    "max_datasteps": 500_000,
    "token_dropout": 0.15,
    "ema_beta": 0.9999,
    "ema_step": 450_000,
}

WRONG = [
    ("num_layers", 0, ValueError, "at least 1"),
    ("num_layers", 18.0, TypeError, "int"),
    ("num_layers", True, TypeError, "int"),
    ("height", 0, ValueError, "at least 1"),
    ("height", "768", TypeError, "int"),
    ("denoising_steps", 0, ValueError, "at least 1 and at most 1000"),
    ("denoising_steps", -3, ValueError, "at least 1"),
    ("denoising_strength", 1.01, ValueError, "at least 0 and at most 1"),
    ("denoising_strength", -0.1, ValueError, "at least 0"),
    ("guidance_scale", float("nan"), ValueError, "at least 0 and at most 1000000"),
    ("guidance_scale", 1e300, ValueError, "at most 1000000"),
    ("weight_decay", float("inf"), ValueError, "at least 0 and finite"),
    ("eps", 0, ValueError, "more than 0"),
    ("dropout", 1, ValueError, "less than 1"),
    ("ema_beta", 1.0, ValueError, "less than 1"),
    ("learning_rate", 0.0, ValueError, "more than 0"),
    ("do_rope", 1, TypeError, "bool"),
    ("norm_type", "layer_norm", ValueError, "'ada_norm_single'"),
    ("shift_schedule", "random", ValueError, "'cyclic' or 'alternating'"),
    ("offload", "disk", ValueError, "'model' or 'sequential' or None"),
    ("text_encoder_quantization", 8, ValueError, "'8bit' or '4bit' or None"),
    ("ckpt_path", None, TypeError, "str or Path"),
]


def test_defaults_are_exactly_the_published_ones():
    assert dataclasses.asdict(Config()) == DEFAULTS


@pytest.mark.parametrize(("name", "value", "error", "expected"), WRONG)
def test_the_error_names_the_field_the_value_and_the_expectation(name, value, error, expected):
    config = Config()
    for attempt in (lambda: Config(**{name: value}), lambda: setattr(config, name, value)):
        with pytest.raises(error) as raised:
            attempt()
        message = str(raised.value)
        assert f"Config.{name}" in message
        assert repr(value) in message
        assert expected in message
    assert getattr(config, name) == DEFAULTS[name]


@pytest.mark.parametrize("name", ["weight_decay", "height", "learning_rate", "batch_size"])
def test_numbers_beyond_all_floats_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"Config\.{name} is 1000.*\.\.\..*; expected .* and finite"
    ):
        Config(**{name: 10**400})


def test_the_error_about_an_unknown_name_has_the_closest_one():
    with pytest.raises(TypeError, match="no field 'hieght'; the closest is 'height'"):
        Config(hieght=768)
    with pytest.raises(TypeError, match="the closest is 'guidance_scale'"):
        Config().guidance = 3.0
    with pytest.raises(TypeError):
        Config(16)


def test_fields_that_depend_on_each_other():
    with pytest.raises(ValueError, match="cross_attention_dim is 1152.* 8 x 72 = 576"):
        Config(num_attention_heads=8)
    assert Config(num_attention_heads=8, cross_attention_dim=576).cross_attention_dim == 576
    sizes = {"attention_head_dim": 70, "cross_attention_dim": 1120}
    with pytest.raises(ValueError, match="attention_head_dim is 70.*multiple of 4"):
        Config(**sizes)
    assert not Config(do_rope=False, **sizes).do_rope


def test_whole_numbers_paths_and_none_are_accepted():
    config = Config(guidance_scale=4, ckpt_path=Path("weights"), offload="model")
    config.offload = None
    assert (config.guidance_scale, config.ckpt_path, config.offload) == (4, Path("weights"), None)


def test_copies_and_pickles():
    config = Config(height=512)
    assert dataclasses.replace(config, width=512).height == 512
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_a_derived_class_changes_defaults_and_keeps_ranges():
    @dataclasses.dataclass(kw_only=True)
    class Square(Config):
        height: int = 1024
        note: str = ""

    assert Square(note="mine").height == 1024
    with pytest.raises(ValueError, match="at least 1"):
        Square(height=0)


def test_transformer_kwargs():
    kwargs = Config(eps=1e-6, dropout=0.1).transformer_kwargs()
    assert kwargs["qk_norm_eps"] == 1e-6
    assert kwargs["dropout"] == 0.1
    assert "eps" not in kwargs
    assert "height" not in kwargs
    assert kwargs["use_global"] is False


def test_any_size_is_accepted_since_the_model_decides_about_it():
    assert Config(height=770, width=1020).height == 770


def test_settings_have_standard_names():
    config = with_settings(Config(), {"num_inference_steps": 5, "strength": 0.25, "height": 32})
    assert (config.denoising_steps, config.denoising_strength, config.height) == (5, 0.25, 32)
    assert inference_settings(config) == {
        "height": 32,
        "width": 1024,
        "num_inference_steps": 5,
        "strength": 0.25,
        "guidance_scale": 7.0,
    }


def test_the_top_level_file_is_the_same_class():
    assert top_level.Config is Config


def test_reading_the_defaults_imports_nothing_heavy():
    code = (
        "import sys, localdit.config;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers', 'numpy')))"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
