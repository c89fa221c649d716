"""Other latent spaces in every part of the library: pipelines, files, training, commands, page."""

import argparse
import json
import logging
import re
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image

from localdit import LocalDiTPipeline
from localdit.cli import main as cli
from localdit.config import Config
from localdit.core.latents import LatentFormat
from localdit.demo.artist import Artist, Settings, Step
from localdit.images import load_image
from localdit.models import PRESETS
from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline
from localdit.training.encode.__main__ import main as encode
from localdit.training.initialization import load_transformer
from tests.tiny import tiny_components, tiny_pipeline, tiny_vae
from tests.training.workplace import lines, load_main, make_workplace, options, weights

# By kind: class, channels, pixels per token, and the side of the pictures to train on.
SPACES = {
    "sd3": ("AutoencoderKL", 16, 16, 96),
    "dc": ("AutoencoderDC", 32, 32, 128),
    "tiny": ("AutoencoderTiny", 16, 16, 96),
    "statistics": ("AutoencoderKL", 4, 16, 96),
}


@pytest.fixture(scope="module", params=SPACES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def workplace(kind, tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def pipe(kind):
    """A text-to-image pipeline; no test may change it for good."""
    return tiny_pipeline(vae=kind)


@pytest.fixture(scope="module")
def main():
    return load_main()


def drawn(pipe, **more):
    """Draw one picture `(1, 3, H, W)` in a few steps from a seed."""
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "output_type": "pt", "generator": generator, **more}
    return pipe("a red circle", **arguments).images


def sibling(pipe, kind):
    other = kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


# Pipelines


def test_text_to_image(kind, pipe):
    multiple = SPACES[kind][2]
    assert drawn(pipe).shape == (1, 3, 4 * multiple, 4 * multiple)
    assert drawn(pipe, height=multiple, width=3 * multiple).shape == (1, 3, multiple, 3 * multiple)


def test_image_to_image_follows_the_image(kind, pipe):
    edit = sibling(pipe, LocalDiTImg2ImgPipeline)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    untouched = drawn(edit, image=image, strength=0.0)
    changed = drawn(edit, image=image, strength=0.9)
    assert untouched.shape == changed.shape == image.shape
    space = pipe.latent_space
    with torch.no_grad():
        latents = space.encode(
            2 * image - 1, sample=True, generator=torch.Generator().manual_seed(0)
        )
        expected = (space.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(untouched, expected, atol=1e-5, rtol=0)
    assert (changed - untouched).abs().mean() > 1e-3


def test_inpainting_keeps_every_other_pixel(kind, pipe):
    paint = sibling(pipe, LocalDiTInpaintPipeline)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 10:30, 5:50] = 1
    painted = drawn(paint, image=image, mask_image=mask)
    kept = (mask == 0).expand_as(image)
    assert torch.equal(painted[kept], image[kept])
    assert (painted - image)[~kept].abs().mean() > 0.01
    cropped = drawn(paint, image=image, mask_image=mask, padding_mask_crop=8)
    assert torch.equal(cropped[kept], image[kept])


def test_other_sizes_are_refused_with_the_nearest_that_work(kind, pipe):
    multiple = SPACES[kind][2]
    with pytest.raises(ValueError) as raised:
        drawn(pipe, height=multiple * 3 - 8)
    assert f"multiple of {multiple} pixels" in str(raised.value)
    assert f"{2 * multiple} or {3 * multiple}" in str(raised.value)


def test_pipelines_are_saved_and_loaded(kind, pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path)
    expected = drawn(pipe)
    with caplog.at_level(logging.WARNING):
        for loader in (LocalDiTPipeline, DiffusionPipeline):
            loaded = loader.from_pretrained(tmp_path)
            loaded.set_progress_bar_config(disable=True)
            assert type(loaded.vae).__name__ == SPACES[kind][0]
            assert torch.equal(drawn(loaded), expected)
            assert loaded.latent_space.format == pipe.latent_space.format


def test_each_class_of_autoencoder_is_expected(kind, pipe):
    (annotated,) = (types for name, types in pipe._get_signature_types().items() if name == "vae")
    assert isinstance(pipe.vae, annotated)


def test_pictures_are_no_latents_where_latents_have_3_channels():
    parts = tiny_components(in_channels=3, out_channels=3)
    edit = LocalDiTImg2ImgPipeline(**parts)
    assert not edit.are_latents(torch.zeros(1, 3, 64, 64))


# The page


def test_the_page_draws_with_previews(kind, pipe):
    size = SPACES[kind][3]
    settings = Settings(
        mode="generate",
        prompt="a red circle",
        negative_prompt="",
        width=size,
        height=size,
        seed=1,
        num_inference_steps=2,
        guidance_scale=2.0,
        strength=0.5,
    )
    *steps, picture = Artist(pipe, Config(sample_size=8)).draw(settings)
    assert picture.size == (size, size)
    assert all(isinstance(step, Step) for step in steps)
    assert steps[0].preview.size == (size, size)


# Commands


def test_generate_takes_every_multiple_and_nothing_else(kind, workplace, tmp_path, capsys):
    multiple = SPACES[kind][2]
    command = ["generate", "a cat", "--model", f"{workplace}/pipeline", "--steps", "1",
               "--device", "cpu"]  # fmt: skip
    path = str(tmp_path / "cat.png")
    size = ["--height", str(3 * multiple), "--width", str(multiple)]
    assert cli([*command, *size, "-o", path]) == 0
    assert load_image(path).size == (multiple, 3 * multiple)
    capsys.readouterr()
    assert cli([*command, "--height", str(3 * multiple - 8)]) == 2
    error = capsys.readouterr().err
    assert f"--height must be a positive multiple of {multiple} pixels" in error
    assert f"the nearest that work: {2 * multiple} or {3 * multiple}" in error


def test_info_describes_the_pipeline(kind, workplace, capsys):
    name, _, multiple, _ = SPACES[kind]
    assert cli(["info", "--json", "--device", "cpu", f"{workplace}/pipeline"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vae"]["class"] == name
    side = 4 * multiple
    assert facts["transformer"]["made for"].startswith(f"{side} x {side} pixels")
    folder = f"{workplace}/pipeline/transformer"
    assert cli(["info", "--json", "--device", "cpu", folder]) == 0
    elsewhere = json.loads(capsys.readouterr().out)[folder]["elsewhere"]
    channels = SPACES[kind][1]
    released = "" if channels != 4 else f"{Config.vae}, or "
    assert f"VAE of {channels} channels: {released}--vae" in elsewhere


# Training


@pytest.fixture
def train(main, workplace, kind, tmp_path, monkeypatch):
    """Runs `train.py` with options added to the common ones; returns its run folder."""

    def run(name, *more, expect=0):
        AcceleratorState._reset_state(reset_partial_state=True)
        common = ["--image-size", SPACES[kind][3], "--max-train-steps", 3, "--max-upscale", 3]
        argv = ["train.py", *options(workplace, tmp_path / name, *common, *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == expect
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    "kind",
    ["sd3", "dc", *(pytest.param(k, marks=pytest.mark.slow) for k in ("tiny", "statistics"))],
    indirect=True,
)
def test_training_leaves_pipelines_that_draw(kind, train, capsys):
    """From pictures, with validation pictures and losses, and resumed to the same bits."""
    validation = ["--validation-prompts", "a cat", "--validation-samples", 2,
                  "--validation-interval", 3, "--save-interval", 2]  # fmt: skip
    whole = train("whole", *validation)
    size = SPACES[kind][3]
    assert Image.open(whole / "validation/00000003.png").size == (size, size)
    assert any(line.get("validation/ema/loss", 0) > 0 for line in lines(whole))
    train("part", *validation, "--max-train-steps", 2, "--validation-interval", 9)
    part = train("part", *validation, "--validation-interval", 9, "--resume", "auto")
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in (whole, part)]
    assert losses[0] == losses[1]
    expected, resumed = weights(whole / "final"), weights(part / "final")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())

    for name in ("checkpoint-2", "final"):
        pipeline = LocalDiTPipeline.from_pretrained(whole / name)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline.vae).__name__ == SPACES[kind][0]
        assert drawn(pipeline).shape == (1, 3, size, size)
    capsys.readouterr()
    assert cli(["info", "--json", "--device", "cpu", str(whole / "final")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["transformer"]["made for"].startswith(f"{size} x {size} pixels")


def test_encoded_data_trains_as_pictures_do(kind, workplace, train, tmp_path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    command = [
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        "--output", f"{tmp_path}/encoded", "--image-size", str(SPACES[kind][3]),
        "--window-size", "2", "--num-workers", "0", "--max-upscale", "3",
        "--patch-size", "1" if kind == "dc" else "2",
    ]  # fmt: skip
    encode([*command, "--dry-run"])
    buckets = re.findall(r"of (\d+) x (\d+) pixels", capsys.readouterr().out)
    window = 2 * SPACES[kind][2]  # of two tokens along a side
    assert buckets and all(int(side) % window == 0 for size in buckets for side in size)
    encode([*command, "--crop", "center"])
    direct = train("direct", "--crop", "center", "--max-train-steps", 2)
    ahead = train("ahead", "--max-train-steps", 2, "--data-root", tmp_path / "encoded")
    for a, b in zip(lines(direct), lines(ahead), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # text in bfloat16
    pipeline = LocalDiTPipeline.from_pretrained(ahead / "final")
    assert type(pipeline.vae).__name__ == SPACES[kind][0]


def test_a_transformer_of_other_channels_is_refused(kind, workplace, train, pipe, capsys):
    shape = json.loads((workplace / "shape.json").read_text()) | {"in_channels": 5}
    (workplace / "five.json").write_text(json.dumps(shape))
    train("run", "--transformer-config", workplace / "five.json", expect=1)
    channels = SPACES[kind][1]
    assert f"latents of 5 channels, the VAE gives {channels}" in capsys.readouterr().err
    other = LocalDiTPipeline(
        **pipe.components | {"vae": tiny_vae("dc" if channels < 32 else "sd3")}
    )
    with pytest.raises(ValueError, match=f"the transformer takes {channels}: use the autoencoder"):
        drawn(other)


@pytest.mark.parametrize("channels", [16, 32])
def test_a_preset_follows_the_latent_space(channels):
    args = argparse.Namespace(
        transformer=None, transformer_config="tiny", new_latents=None, lora_rank=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    config = load_transformer(args, 16, LatentFormat(channels, 8)).config
    assert (config.in_channels, config.out_channels) == (channels, channels)


@pytest.mark.parametrize(("vae", "preset"), [("dc", "released-f32"), ("f16", "released-f16")])
def test_a_preset_for_compact_latents_trains_from_nothing(vae, preset, main, tmp_path, monkeypatch):
    """From pictures and from encoded data; the preset has fewer and narrower layers here."""
    smaller = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 8, "window_size": 2}
    monkeypatch.setitem(PRESETS, preset, PRESETS[preset] | smaller)
    folder = make_workplace(tmp_path, vae)
    encoders = f"{folder}/pipeline"
    same = ["--image-size", 128, "--max-upscale", 3, "--crop", "center", "--max-train-steps", 2]
    shape = ["--transformer-config", preset]
    AcceleratorState._reset_state(reset_partial_state=True)
    encode([
        "--data-root", f"{folder}/pictures", "--pretrained", encoders, "--output", f"{folder}/data",
        "--image-size", "128", "--max-upscale", "3", "--crop", "center", "--window-size", "2",
        "--patch-size", "1", "--num-workers", "0",
    ])  # fmt: skip
    runs = []
    for name, data in (("pictures", "pictures"), ("encoded", "data")):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = options(folder, folder / f"run-{name}", *same, *shape, "--data-root", folder / data)
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        assert main() == 0
        runs.append(lines(folder / f"run-{name}"))
        config = json.loads((folder / f"run-{name}/final/transformer/config.json").read_text())
        assert (config["in_channels"], config["patch_size"]) == (32, 1)
        assert config["sample_size"] == 128 // {"dc": 32, "f16": 16}[vae]
        assert config["interpolation_scale"] == PRESETS[preset]["interpolation_scale"]
        pipeline = LocalDiTPipeline.from_pretrained(folder / f"run-{name}/final")
        pipeline.set_progress_bar_config(disable=True)
        assert drawn(pipeline).shape == (1, 3, 128, 128)
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # text in bfloat16


def test_predictions_have_as_many_channels_as_latents(tmp_path):
    (tmp_path / "shape.json").write_text(
        json.dumps(
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_attention_heads": 3,
                "attention_head_dim": 8,
                "caption_channels": 16,
                "sample_size": 8,
            }
        )
    )
    args = argparse.Namespace(
        transformer=None, transformer_config=str(tmp_path / "shape.json"), new_latents=None,
        lora_rank=None, gradient_checkpointing=False,
    )  # fmt: skip
    assert load_transformer(args, 16, LatentFormat(16, 8)).config.out_channels == 16
