"""Trained on one picture and its caption alone, a model gives that picture back."""

import math
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL

from localdit import LocalDiTPipeline
from localdit.scenes import Scene, SceneObject, draw_scene
from localdit.training.encode.__main__ import main as encode
from localdit.utils import model_in_the_box
from tests.training.workplace import load_main

SIDE = 128
CAPTION = "a large red circle in the centre on a blue background"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """One picture and its caption, encoded ahead."""
    folder = tmp_path_factory.mktemp("overfitting")
    scene().save(folder / "scene.png")
    (folder / "scene.txt").write_text(CAPTION)
    AcceleratorState._reset_state(reset_partial_state=True)
    encode([
        "--data-root", str(folder), "--pretrained", str(model_in_the_box()), "--image-size",
        str(SIDE), "--num-workers", "0", "--output", str(folder / "encoded"),
    ])  # fmt: skip
    return folder / "encoded"


@pytest.fixture(scope="module")
def wanted():
    """The picture as the autoencoder gives it back: no model in its latents can do better."""
    vae = AutoencoderKL.from_pretrained(model_in_the_box() / "vae", torch_dtype=torch.float32)
    pixels = to_tensor(scene())
    with torch.no_grad():
        return vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)


@pytest.fixture
def sample(encoded, tmp_path, monkeypatch):
    """Trains for some steps, and makes the picture that the caption asks for."""

    def run(prediction, steps):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = [
            "train.py", "--data-root", str(encoded), "--transformer-config", "tiny", "--output",
            str(tmp_path / str(steps)), "--image-size", str(SIDE), "--batch-size", "1",
            "--num-workers", "0", "--prediction-type", prediction, "--learning-rate", "2e-3",
            "--lr-schedule", "cosine", "--warmup-steps", "20", "--gradient-clip", "1",
            "--ema-decay", "0.95", "--token-dropout", "0", "--max-train-steps", str(steps),
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        assert load_main()() == 0
        pipeline = LocalDiTPipeline.from_pretrained(tmp_path / str(steps) / "final")
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        (image,) = pipeline(
            CAPTION, height=SIDE, width=SIDE, guidance_scale=1.0, generator=generator
        ).images
        return to_tensor(image)

    return run


def scene():
    circle = SceneObject("circle", "red", "large", 0.5, 0.5)
    return draw_scene(Scene("blue", (circle,)), SIDE)


def to_tensor(image):
    """A picture as `(1, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def psnr(image, other):
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return -10 * math.log10(((image - other) / 2).square().mean().item())


@pytest.mark.slow
# Noise prediction takes far more steps: at the noisiest timesteps, where a picture begins, the
# smallest error in the noise is a large one in the picture.
@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_an_overfitted_model_reproduces_its_picture(sample, wanted, prediction):
    before, after = (psnr(sample(prediction, steps), wanted) for steps in (1, 400))
    print(f"{prediction}: {before:.1f} dB after 1 step, {after:.1f} dB after 400")
    assert before < 15
    assert after > 25
