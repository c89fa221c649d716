"""Pipelines that name their steps and guidance, and the schedulers of few-step models."""

import json
import re
import shutil

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)

from localdit.cli import main
from localdit.cli.info import contents_of
from localdit.core.diffusion import NOISE_SCHEDULE, Objective
from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
from localdit.sizes import pixels_per_latent
from tests.tiny import tiny_components

OWN = {"num_inference_steps": 4, "guidance_scale": 1.0}
KINDS = {
    "epsilon": lambda: LCMScheduler(**NOISE_SCHEDULE),
    "v_prediction": lambda: LCMScheduler(**NOISE_SCHEDULE, prediction_type="v_prediction"),
    "flow": FlowMatchLCMScheduler,
}


@pytest.fixture(params=KINDS)
def objective(request):
    return Objective(request.param)


def few_step_pipe(kind, scheduler, components=None):
    pipe = kind(**{**(components or tiny_components()), "scheduler": scheduler}, **OWN)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch(pipe, monkeypatch):
    """Record the latents and the timestep of each call of the transformer."""
    seen, forward = [], pipe.transformer.forward

    def spy(latents, timestep, **kwargs):
        seen.append((latents, timestep))
        return forward(latents, timestep=timestep, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    return seen


# Settings of a folder


def test_a_student_takes_the_parts_that_it_lacks_from_its_teacher(tmp_path, capsys):
    teacher = tmp_path / "teacher"
    LocalDiTPipeline(**tiny_components()).save_pretrained(teacher)
    student = teacher / "student"
    few_step_pipe(LocalDiTPipeline, LCMScheduler(), tiny_components(1)).save_pretrained(student)
    whole = LocalDiTPipeline.from_pretrained(student)
    for part in ("tokenizer", "text_encoder", "vae"):
        shutil.rmtree(student / part)
    with pytest.raises((OSError, ValueError)):
        LocalDiTPipeline.from_pretrained(student)
    index = student / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_shares_parts": True}))
    pipe = LocalDiTPipeline.from_pretrained(student, torch_dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.vae, pipe.transformer, pipe.text_encoder)} == {
        torch.bfloat16
    }
    pipe = LocalDiTPipeline.from_pretrained(student)
    assert own(pipe) == OWN
    expected = LocalDiTPipeline.from_pretrained(teacher).vae.state_dict()
    assert all(torch.equal(x, pipe.vae.state_dict()[name]) for name, x in expected.items())
    weights = whole.transformer.state_dict()
    assert all(torch.equal(x, weights[n]) for n, x in pipe.transformer.state_dict().items())
    assert contents_of(student)[str(student)]["missing"] == "nothing"
    assert pixels_per_latent(student) == pixels_per_latent(teacher)
    assert own(AutoPipelineForImage2Image.from_pretrained(student)) == OWN
    with pytest.raises((OSError, ValueError)):  # as docs/guides/share.md says
        DiffusionPipeline.from_pretrained(student)
    moved = shutil.copytree(student, tmp_path / "moved")
    lacking = "lacks files for .*moved, which .* parent: move it to its teacher's folder"
    with pytest.raises(FileNotFoundError, match=lacking):
        LocalDiTPipeline.from_pretrained(moved)
    assert main(["generate", "a cat", "--model", str(moved), "-o", str(tmp_path / "out")]) == 2
    assert re.search(lacking, capsys.readouterr().err)
    pipe.save_pretrained(tmp_path / "own")  # whole, wherever the parts came from
    DiffusionPipeline.from_pretrained(tmp_path / "own")


def own(pipe):
    return {name: pipe.config[name] for name in OWN}


def test_a_call_takes_the_settings_of_the_pipeline_unless_it_gives_its_own(monkeypatch):
    pipe = few_step_pipe(LocalDiTPipeline, LCMScheduler())
    seen = watch(pipe, monkeypatch)
    pipe("a cat", output_type="latent")
    assert [len(latents) for latents, _ in seen] == [1] * 4
    seen.clear()
    pipe("a cat", output_type="latent", num_inference_steps=2, guidance_scale=3.0)
    assert [len(latents) for latents, _ in seen] == [2] * 2


def test_settings_are_saved_loaded_and_passed_on(tmp_path):
    pipe = few_step_pipe(LocalDiTPipeline, LCMScheduler())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index | OWN == index
    call = '"a photo of a mountain lake at sunset", num_inference_steps=4, guidance_scale=1.0\n'
    assert call in (tmp_path / "README.md").read_text()
    loaded = LocalDiTInpaintPipeline.from_pretrained(tmp_path)
    others = [
        loaded,
        LocalDiTImg2ImgPipeline.from_pipe(loaded),
        LocalDiTPipeline.from_pipe(loaded, torch_dtype=torch.float32),
        AutoPipelineForImage2Image.from_pipe(pipe),
    ]
    assert [own(other) for other in others] == [OWN] * 4
    changed = LocalDiTPipeline.from_pipe(loaded, guidance_scale=2.5)
    assert own(changed) == {"num_inference_steps": 4, "guidance_scale": 2.5}
    changed = LocalDiTPipeline.from_pretrained(tmp_path, num_inference_steps=3)
    assert own(changed) == {"num_inference_steps": 3, "guidance_scale": 1.0}


def test_from_pipe_keeps_the_settings_that_are_no_components():
    pipe = LocalDiTPipeline(**tiny_components(), **OWN, whole_words=True)
    kept = LocalDiTImg2ImgPipeline.from_pipe(pipe, num_inference_steps=3)
    assert own(kept) | {"whole_words": kept.config.whole_words} == {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "whole_words": True,
    }
    assert own(LocalDiTPipeline(**pipe.components)) == {
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
    }


def test_a_folder_names_a_vocabulary_of_whole_words(tmp_path):
    LocalDiTPipeline(**tiny_components(), whole_words=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["whole_words"] is True
    assert "whole words" in contents_of(tmp_path)[str(tmp_path)]["vocabulary"]
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    others = [
        LocalDiTInpaintPipeline.from_pipe(loaded),
        LocalDiTPipeline.from_pipe(loaded, torch_dtype=torch.float32),
        AutoPipelineForImage2Image.from_pipe(loaded),
    ]
    assert all(pipe.config.whole_words is True for pipe in [loaded, *others])
    assert LocalDiTPipeline(**tiny_components()).config.whole_words is False
    with pytest.raises(TypeError, match="whole_words is 1; expected True or False"):
        LocalDiTPipeline(**tiny_components(), whole_words=1)


def test_a_folder_without_settings_has_the_defaults(tmp_path):
    few_step_pipe(LocalDiTPipeline, LCMScheduler()).save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in OWN})
    )
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    assert own(loaded) == {"num_inference_steps": 20, "guidance_scale": 7.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_scale": -1.0}))
    with pytest.raises(ValueError, match=r"model_index\.json: guidance_scale is -1\.0"):
        LocalDiTPipeline.from_pretrained(tmp_path)


def test_unusable_settings_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        LocalDiTPipeline(**tiny_components(), num_inference_steps=0)


@pytest.mark.parametrize(
    "values",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": None},
        {"num_inference_steps": 2000},
        {"whole_words": "yes"},
    ],
)
def test_settings_that_would_not_load_are_never_set(tmp_path, values):
    pipe = few_step_pipe(LocalDiTPipeline, LCMScheduler())
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(values))} is"):
        pipe.register_to_config(**values)
    pipe.save_pretrained(tmp_path)
    assert own(LocalDiTPipeline.from_pretrained(tmp_path)) == OWN


# Schedules


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_text_to_image_takes_even_steps_from_pure_noise(objective, steps, monkeypatch):
    pipe = few_step_pipe(LocalDiTPipeline, KINDS[objective.prediction_type]())
    seen = watch(pipe, monkeypatch)
    pipe("a cat", num_inference_steps=steps, output_type="latent")
    taken = [timestep.item() for _, timestep in seen]
    # LCM's levels are 20 timesteps apart.
    last = 1000 if objective.is_flow else 999
    assert taken == pytest.approx([last - i * 1000 / steps for i in range(steps)], abs=20)
    assert taken[0] == last


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("steps", [4, 2, 1])
@pytest.mark.parametrize("kind", [LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline])
def test_all_steps_are_taken_from_the_noise_of_the_strength(
    objective, kind, steps, strength, monkeypatch
):
    pipe = few_step_pipe(kind, KINDS[objective.prediction_type]())
    seen = watch(pipe, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, 4, 8, 8, generator=generator)
    mask = {"mask_image": torch.ones(1, 1, 64, 64)} if kind is LocalDiTInpaintPipeline else {}
    pipe(
        "a cat", image, **mask, latents=noise, strength=strength, num_inference_steps=steps,
        generator=generator, output_type="latent",
    )  # fmt: skip
    assert len(seen) == steps
    start, timestep = seen[0]
    assert timestep.item() == pytest.approx(1000 * strength, abs=1)
    if strength == 1 and mask:
        assert torch.equal(start, noise)
    else:
        torch.testing.assert_close(start, objective.add_noise(image, noise, timestep))


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler, FlowMatchLCMScheduler])
def test_strengths_of_less_than_the_steps(scheduler, caplog, monkeypatch):
    """LCM has 50 noise levels: a strength of 0.05 leaves two of them, and 0.01 none."""
    pipe = few_step_pipe(LocalDiTImg2ImgPipeline, scheduler())
    seen = watch(pipe, monkeypatch)
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    flow = scheduler is FlowMatchLCMScheduler
    for strength, taken in ((0.05, 4 if flow else 2), (0.01, 4 if flow else 0), (0.0, 0)):
        seen.clear()
        result = pipe("a cat", image, strength=strength, output_type="latent").images
        assert len(seen) == taken
        assert torch.equal(result, image) == (taken == 0)
        assert ("Only 2 of the 4 steps are taken" in caplog.text) != flow
    assert ("no step is taken" in caplog.text) != flow


@pytest.mark.parametrize("strength", [1.0, 0.99, 0.5, 0.0])
@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_more_steps_than_noise_levels_are_refused(scheduler, strength, caplog):
    """At every strength. Fewer steps that the strength leaves are reported, unless it is 0."""
    pipe = few_step_pipe(LocalDiTImg2ImgPipeline, scheduler(original_inference_steps=8))
    given = {"image": torch.zeros(1, 4, 8, 8), "strength": strength, "output_type": "latent"}
    pipe("a cat", num_inference_steps=4, **given)
    assert not caplog.records
    pipe("a cat", num_inference_steps=8, **given)
    assert ("of the 8 steps are taken" in caplog.text) == (0 < strength < 1)
    with pytest.raises(ValueError, match=r"num_inference_steps is 9, but .* has 8 noise levels"):
        pipe("a cat", num_inference_steps=9, **given)


def test_a_custom_schedule_is_cut_as_with_other_schedulers(monkeypatch):
    pipe = few_step_pipe(LocalDiTImg2ImgPipeline, FlowMatchLCMScheduler())
    seen = watch(pipe, monkeypatch)
    image = torch.zeros(1, 4, 8, 8)
    pipe("a cat", image, strength=0.5, sigmas=[1.0, 0.9, 0.4, 0.2], output_type="latent")
    assert [timestep.item() for _, timestep in seen] == pytest.approx([400, 200])
