"""The model in the box draws what the prompt says, judged by pixels."""

import json

import numpy as np
import pytest
import torch

from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTPipeline
from localdit.scenes import Scene, SceneObject, describe, draw_scene, sample_scenes
from localdit.scenes.scene import Background
from localdit.scenes.score import mean_scores, score_picture
from localdit.utils import model_in_the_box


@pytest.fixture(scope="module")
def pipe():
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def student(pipe):
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae")}
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box(few_steps=True), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_it_is_small_and_names_no_path():
    files = [file for file in model_in_the_box().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    for file in files:
        if file.suffix == ".json" and file.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(file.read_text())


def test_its_windows_are_real(pipe):
    shifts = [block.attn1.shift_size for block in pipe.transformer.transformer_blocks]
    assert shifts == [0, 1, 2, 3, 0, 1]
    assert pipe.transformer.config.window_size == 4  # of 8 x 8 tokens


@pytest.mark.parametrize("name", ["pipe", "student"])
def test_it_draws_scenes_that_it_was_never_trained_on(name, request):
    pipe = request.getfixturevalue(name)
    scenes = list(sample_scenes(16, seed=5, held_out=True))
    rng = np.random.default_rng(5)
    prompts = [describe(scene, rng).text for scene in scenes]
    pictures = pipe(prompts, generator=seeds(16)).images
    scores = [score_picture(*pair) for pair in zip(pictures, scenes, strict=True)]
    means = mean_scores(scores)
    assert means["all"] >= 0.85
    assert means["background"] >= 0.9
    assert means["shape"] >= 0.9
    # The scorer can tell: against each other's scenes the same pictures fail.
    shuffled = [
        score_picture(*pair) for pair in zip(pictures, [*scenes[1:], scenes[0]], strict=True)
    ]
    assert mean_scores(shuffled)["all"] <= 0.1


def test_the_student_draws_in_four_steps_and_in_one(student):
    scenes = list(sample_scenes(16, seed=6, held_out=True))
    rng = np.random.default_rng(6)
    prompts = [describe(scene, rng).text for scene in scenes]
    for steps, least in ((None, 0.85), (1, 0.85)):
        pictures = student(prompts, generator=seeds(16), num_inference_steps=steps).images
        assert student.num_timesteps == (steps or 4)
        scores = [score_picture(*pair) for pair in zip(pictures, scenes, strict=True)]
        assert mean_scores(scores)["all"] >= least


def test_capitals_and_spaces_change_nothing(pipe):
    plain, loud = (
        pipe(prompt, generator=seeds(1)[0], num_inference_steps=2, output_type="latent").images
        for prompt in ("a red circle on blue", "  A RED Circle on blue ")
    )
    assert torch.equal(plain, loud)


@pytest.mark.parametrize("name", ["pipe", "student"])
def test_image_to_image_follows_the_prompt_and_keeps_the_composition(name, request):
    pipe = request.getfixturevalue(name)
    before = Scene(Background.plain("blue"), (SceneObject("circle", "red", "large", 0.25, 0.25),))
    after = Scene(Background.plain("blue"), (SceneObject("circle", "yellow", "large", 0.25, 0.25),))
    edit = LocalDiTImg2ImgPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    common = {"image": draw_scene(before), "generator": seeds(1)[0]}
    prompt = "a large yellow circle at the top left on a blue background"

    strong = edit(prompt, strength=0.9, **common).images[0]
    assert score_picture(strong, after)["all"] == 1.0

    weak = edit(prompt, strength=0.2, **common).images[0]
    difference = np.abs(np.asarray(weak, float) - np.asarray(draw_scene(before), float))
    assert difference.mean() < 10  # of 255
    assert score_picture(weak, before)["position"] == 1.0
