"""Training, encoding ahead and drawing with text encoders of other kinds."""

import shutil
import sys

import pytest
import torch
from accelerate.state import AcceleratorState

from localdit import LocalDiTPipeline
from localdit.training.encode.__main__ import main as encode
from tests.tiny import TEXT_WIDTHS, tiny_components, tiny_text_encoder
from tests.training.workplace import lines, load_main, make_workplace, options, weights


@pytest.fixture(scope="module", params=["umt5", "gemma", "clip"])
def workplace(request, tmp_path_factory):
    """Pictures, and the folder of a pipeline whose text encoder is of the kind."""
    folder = make_workplace(tmp_path_factory.mktemp(request.param))
    parts = tiny_components() | {"text_encoder": tiny_text_encoder(request.param)}
    shutil.rmtree(folder / "pipeline")
    LocalDiTPipeline(**parts).save_pretrained(folder / "pipeline")
    return folder, TEXT_WIDTHS[request.param]


def train(monkeypatch, workplace, output, *more):
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["train.py", *options(workplace, output, "--transformer-config", "tiny", *more)]
    monkeypatch.setattr(sys, "argv", argv)
    assert load_main()() == 0


def test_a_new_transformer_follows_the_text_encoder(workplace, tmp_path, monkeypatch):
    folder, width = workplace
    more = ["--max-train-steps", "2", "--validation-samples", "2", "--validation-interval", "2"]
    more += ["--validation-prompts", "a red picture"]
    train(monkeypatch, folder, tmp_path / "run", *more)
    assert lines(tmp_path / "run")[-1]["validation/model/loss"] > 0
    pipe = LocalDiTPipeline.from_pretrained(tmp_path / "run/final")
    assert pipe.transformer.config.caption_channels == width
    assert pipe("a red picture", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_encoded_captions_train_alike(workplace, tmp_path, monkeypatch):
    """From the pictures and from data encoded ahead: float16 and bfloat16 round, no more."""
    folder, _ = workplace
    encoded = str(tmp_path / "encoded")
    same = ["--data-root", f"{folder}/pictures", "--pretrained", f"{folder}/pipeline"]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert encode([*same, "--image-size", "96", "--num-workers", "0", "--output", encoded]) == 0
    train(monkeypatch, folder, tmp_path / "pictures")
    train(monkeypatch, folder, tmp_path / "ahead", "--data-root", encoded)
    first, second = (lines(tmp_path / name)[0]["loss"] for name in ("pictures", "ahead"))
    assert first == pytest.approx(second, rel=0.02)
    trained = weights(tmp_path / "ahead/final")
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
