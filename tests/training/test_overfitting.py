"""Tests that a model trained on one picture and its caption reproduces that picture."""

import math
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from localdit import LocalDiTPipeline
from localdit.scenes import Scene, SceneObject, draw_scene
from localdit.scenes.scene import Background
from localdit.training.encode.__main__ import main as encode
from localdit.utils import model_in_the_box
from tests.training.workplace import load_main

SIDE = 256
CAPTION = "a large red circle in the centre on a blue background"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """One encoded picture and its caption."""
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
    """Return the autoencoder's reconstruction, which no model of its latents can surpass."""
    space = LocalDiTPipeline.from_pretrained(model_in_the_box()).latent_space
    with torch.no_grad():
        return space.decode(space.encode(to_tensor(scene()))).clamp(-1, 1)


@pytest.fixture
def sample(encoded, tmp_path, monkeypatch):
    """Train for some steps, and draw the picture of the caption."""

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
    return draw_scene(Scene(Background.plain("blue"), (circle,)), SIDE)


def to_tensor(image):
    """Return a picture as `(1, 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def psnr(image, other):
    """Return the peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
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
