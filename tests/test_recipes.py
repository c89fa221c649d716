"""The recipes' own code, on the smallest inputs."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from localdit.core.latents import LatentSpace
from localdit.models import LocalDiTTransformer2DModel
from localdit.scenes import SceneObject
from localdit.scenes.scene import PALETTE
from tests.training.workplace import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "recipes" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "side", "crops"), [("kl", 128, 64), ("dc", 256, 128)])
def test_each_kind_of_autoencoder_trains_and_is_standardised(kind, side, crops):
    recipe = load("box/train_autoencoder.py")
    vae = recipe.build_autoencoder() if kind == "kl" else recipe.build_compact_autoencoder()
    pictures, centres = recipe.draw_pictures(2, 0, False, side)
    assert pictures.shape == (2, side, side, 3)
    stage = recipe.Stage(1.0, 0.5, 2)
    pixels = recipe.random_crops(pictures, centres, stage, np.random.default_rng(0))
    assert pixels.shape == (2, 3, crops, crops)
    loss = recipe.training_loss(vae, pixels, 0.1, 1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())
    before = recipe.reconstruct(vae, pixels)
    recipe.standardise_latents(vae, pixels)
    latents = LatentSpace(vae).encode(pixels)
    assert latents.shape == {"kl": (2, 4, 8, 8), "dc": (2, 32, 4, 4)}[kind]
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(recipe.reconstruct(vae, pixels), before, atol=1e-3, rtol=0)


def test_both_compact_runs_have_the_same_shape():
    shape = json.loads((ROOT / "recipes/compact/shape.json").read_text())
    box = json.loads((ROOT / "localdit/box/transformer/config.json").read_text())
    with torch.device("meta"):
        new, trained = (LocalDiTTransformer2DModel.from_config(one) for one in (shape, box))
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (new, trained)]
    different = {n for n, size in shapes[0].items() if shapes[1][n] != size}
    assert different == {"pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"}
    settings = ("window_size", "shift_schedule", "do_rope", "use_global", "qk_norm_eps")
    assert all(new.config[name] == trained.config[name] for name in settings)
    assert new.use_additional_conditions == trained.use_additional_conditions


def test_the_comparison_names_the_step_that_is_as_good():
    compare = load("compact/compare.py")
    curves = {
        "nothing": {10: 0.1, 20: 0.5, 30: 0.5},
        "transferred": {10: 0.6, 20: 0.7},
    }
    page = compare.table(curves)
    assert "| 30 | 50.0 % | – |" in page
    assert "From nothing: 50.0 % at best, at step 20. Transferred: step 10, 50 % of" in page
    assert "does not reach that" in compare.table(curves | {"transferred": {10: 0.2}})


@pytest.fixture(scope="module")
def study():
    return load("study/scenes.py")


def test_true_drawings_of_the_study_are_right(study):
    for scene in study.sample_many(100, 1):
        assert study.is_right(study.draw(scene), scene), scene


def thing(x, y, colour="red"):
    return SceneObject("circle", colour, "small", x, y)


OPPOSITE = [(0.2, 0.2), (0.8, 0.8, "blue")]
ACROSS = [(0.2, 0.3), (0.8, 0.6)]
TWO = [(0.2, 0.2), (0.5, 0.5)]


@pytest.mark.parametrize(
    ("task", "colours", "right", "wrong"),
    [
        ("corners", ("red", "blue"), OPPOSITE, [(0.2, 0.2), (0.8, 0.2, "blue")]),
        ("corners", ("red", "blue"), OPPOSITE, [(0.2, 0.2), (0.8, 0.8, "green")]),
        ("pair", (), ACROSS, [(0.2, 0.3), (0.8, 0.6, "green")]),
        ("pair", (), ACROSS, [(0.2, 0.3), (0.2, 0.7)]),
        ("count", ("red",), TWO, [*TWO, (0.8, 0.8)]),
        ("count", ("red",), TWO, [(0.2, 0.2), (0.5, 0.5, "black")]),
    ],
)
def test_objects_of_the_study_are_judged_by_colour_number_and_place(
    study, task, colours, right, wrong
):
    asked = study.Study(task, colours, 2)
    for places, verdict in ((right, True), (wrong, False)):
        drawn = study.Study(task, objects=tuple(thing(*place) for place in places))
        assert study.is_right(study.draw(drawn), asked) is verdict


def test_a_moved_or_recoloured_mirror_image_is_wrong(study):
    left = (thing(0.14, 0.2), thing(0.36, 0.5, "blue"))
    asked = study.Study("mirror", objects=left)
    moved = study.Study("", objects=(*left, thing(0.86, 0.3), thing(0.64, 0.5, "blue")))
    recoloured = study.Study("", objects=(*left, thing(0.86, 0.2), thing(0.64, 0.5, "green")))
    assert study.is_right(study.draw(asked), asked)
    assert not study.is_right(study.draw(moved), asked)
    assert not study.is_right(study.draw(recoloured), asked)


@pytest.mark.parametrize(
    ("box", "colour"),
    [((60, 8, 68, 24), "white"), ((8, 8, 64, 24), "blue"), ((30, 24, 100, 30), "red")],
    ids=["a gap", "two colours", "a thicker side"],
)
def test_a_broken_frame_is_wrong(study, box, colour):
    asked = study.Study("frame", frame=("red", 8, 16))
    picture = study.draw(asked)
    assert study.is_right(picture, asked)
    picture.paste(PALETTE[colour], box)
    assert not study.is_right(picture, asked)


def test_variants_are_scored_at_equal_steps_and_at_equal_time():
    scored = load("study/variants.py").scored_steps({"cheap": 50.0, "dear": 80.0}, 400)
    assert scored == {"cheap": {"steps": 400, "time": 400}, "dear": {"steps": 400, "time": 240}}


def test_the_interval_over_three_seeds_is_students():
    mean, half = load("study/report.py").interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(2.484, abs=1e-3))  # 4.303 / sqrt(3)
