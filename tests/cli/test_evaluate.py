"""`localdit evaluate`: the pictures of a benchmark, and what becomes of an interrupted start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localdit import model_in_the_box
from localdit.cli import evaluate, main
from localdit.images import load_image, read_metadata, save_image
from localdit.scenes import sample_scenes
from tests.tiny import tiny_pipeline

QUICK = ["--steps", "2", "--device", "cpu", "--width", "32", "--height", "32"]


@pytest.fixture
def prompts(here):
    path = Path("prompts.jsonl")
    texts = ["a red circle", "a blue star", "a cat"]
    path.write_text("".join(json.dumps({"prompt": text, "tag": "x"}) + "\n" for text in texts))
    return path


def run(model, prompts, *argv):
    return main(["evaluate", str(prompts), "--model", str(model), *QUICK, *argv])


def drawn(folder="out"):
    return {
        path.relative_to(folder).as_posix(): np.asarray(load_image(path))
        for path in sorted(Path(folder).rglob("pictures/**/*.png"))
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


def test_it_draws_where_the_scorer_looks(here, model, prompts, capsys):
    assert run(model, prompts, "--num-images", "2", "-o", "out", "--seed", "5") == 0
    assert list(drawn()) == [
        f"pictures/{index:05d}/samples/{place:04d}.png" for index in range(3) for place in range(2)
    ]
    made = read_metadata("out/pictures/00001/samples/0001.png")
    assert (made["prompt"], made["seed"]) == ("a blue star", 5 + 2 + 1)
    assert json.loads(Path("out/pictures/00002/metadata.jsonl").read_text())["tag"] == "x"
    found = json.loads(Path("out/scores.json").read_text())
    assert (found["prompts"], found["pictures"], found["scores"]) == (3, 6, {})
    assert found["settings"]["num_inference_steps"] == 2 and found["settings"]["seed"] == 5
    assert load_image("out/samples.png").size == (3 * 32, 2 * 32)
    assert "| pictures | 6 |" in capsys.readouterr().out


def test_a_picture_is_that_of_generate(here, model, prompts):
    run(model, prompts, "--num-images", "2", "-o", "out", "--max-prompts", "2")
    argv = ["generate", "a blue star", "--model", str(model), *QUICK, "--seed", "3", "-o", "a.png"]
    assert main([*argv, "--negative-prompt", ""]) == 0
    one = load_image("out/pictures/00001/samples/0001.png")
    assert np.array_equal(load_image("a.png"), one)


def test_each_prompt_of_dpg_bench_gets_a_sheet(here, model):
    Path("prompts").mkdir()
    Path("prompts/boat.txt").write_text("a red circle")
    assert run(model, "prompts", "-o", "out") == 0
    sheet = np.asarray(load_image("out/sheets/boat.png"))
    assert sheet.shape == (64, 64, 3)
    last = load_image("out/pictures/boat/samples/0003.png")
    assert np.array_equal(sheet[32:, 32:], last)


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_second_start_draws_only_what_is_missing(batch_size, here, model, prompts, monkeypatch):
    argv = ["--num-images", "3", "--batch-size", batch_size, "-o"]
    assert run(model, prompts, *argv, "whole") == 0

    def interrupted(image, path, *args, **kwargs):
        if str(path).endswith("00001/samples/0001.png"):
            raise KeyboardInterrupt
        return save(image, path, *args, **kwargs)

    from localdit import images

    save = images.save_image
    monkeypatch.setattr(images, "save_image", interrupted)
    assert run(model, prompts, *argv, "out") == 130
    monkeypatch.undo()
    monkeypatch.chdir(here)
    before = {path: os.stat(f"out/{path}").st_mtime_ns for path in drawn()}
    assert len(before) == 4 and not Path("out/scores.json").exists()
    assert run(model, prompts, *argv, "out") == 0
    assert same(drawn("whole"), drawn())
    kept = [path for path in before if os.stat(f"out/{path}").st_mtime_ns == before[path]]
    assert len(kept) >= 3  # a batch is drawn whole
    assert run(model, prompts, *argv, "out") == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (["--steps", "3"], "was drawn with num_inference_steps 2, not 3"),
        (["--seed", "1"], "was drawn with seed 0, not 1"),
        (["--negative-prompt", "bad"], "was drawn with negative_prompt '', not 'bad'"),
    ],
)
def test_pictures_of_other_settings_are_not_mixed(change, message, here, model, prompts, capsys):
    assert run(model, prompts, "--num-images", "1", "-o", "out") == 0
    before = drawn()
    assert run(model, prompts, "--num-images", "1", "-o", "out", *change) == 1
    assert message in capsys.readouterr().err
    assert same(before, drawn())


def test_records_are_those_of_the_present_prompts(here, model, prompts):
    assert run(model, prompts, "--num-images", "1", "-o", "out") == 0
    before = drawn()
    prompts.write_text(prompts.read_text().replace('"x"', '"y"'))
    assert run(model, prompts, "--num-images", "1", "-o", "out") == 0
    assert same(before, drawn())
    for number in range(3):
        record = json.loads(Path(f"out/pictures/0000{number}/metadata.jsonl").read_text())
        assert record["tag"] == "y"


@pytest.mark.parametrize(
    "sheets, more, first",
    [
        (False, ["--max-prompts", "2"], "out/pictures/00002"),
        (True, ["--max-prompts", "1"], "out/pictures/b"),
        (False, ["--num-images", "1"], "out/pictures/00000/samples/0001.png"),
    ],
)
def test_pictures_that_a_scorer_would_score_too_are_refused(
    sheets, more, first, here, model, prompts, capsys
):
    if sheets:
        prompts = Path("prompts")
        prompts.mkdir()
        for name in "abc":
            (prompts / f"{name}.txt").write_text("a red circle")
    options = ["--num-images", "2", "-o", "out"]
    assert run(model, prompts, *options) == 0
    before = drawn()
    assert run(model, prompts, *options, *more) == 2
    assert f"such as {first}, and a scorer would score it too" in capsys.readouterr().err
    assert same(before, drawn())
    assert run(model, prompts, *options) == 0


def test_existing_pictures_are_not_replaced_by_another_batch_size(here, model, prompts):
    options = ["--num-images", "3", "-o", "out", "--max-prompts", "1"]
    assert run(model, prompts, *options) == 0
    folder = Path("out/pictures/00000/samples")
    (folder / "0001.png").unlink()
    kept = {name: (folder / name).stat().st_ino for name in ("0000.png", "0002.png")}
    assert run(model, prompts, *options, "--batch-size", "3") == 0
    assert (folder / "0001.png").exists()
    assert {name: (folder / name).stat().st_ino for name in kept} == kept


def test_more_steps_than_noise_levels_are_refused_before_anything_is_written(here, prompts, capsys):
    before = sorted(here.rglob("*"))
    assert run("box-few-steps", prompts, "--steps", "20", "-o", "out") == 2
    assert "--num-inference-steps is 20, but the LCMScheduler" in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", ["data.json", "pictures/a.png", "pictures/cats/a.png"])
def test_a_folder_of_something_else_stays_as_it_is(name, here, model, prompts, capsys):
    Path("out", name).parent.mkdir(parents=True)
    Path("out", name).write_text("mine")
    assert run(model, prompts, "-o", "out") == 2
    assert "--output out is not empty and holds no evaluation" in capsys.readouterr().err
    assert [path for path in Path("out").rglob("*") if path.is_file()] == [Path("out", name)]


def test_pictures_of_other_weights_are_not_mixed(here, model, prompts, capsys):
    tiny_pipeline(1).save_pretrained("other")
    assert run("other", prompts, "--num-images", "1", "-o", "out") == 0
    tiny_pipeline(2).save_pretrained("other")
    assert run("other", prompts, "--num-images", "1", "-o", "out") == 1
    assert "was drawn with weights" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler"])
def test_pictures_of_other_parts_are_not_mixed(part, here, model, prompts, capsys):
    """Whether an option names another part, or the files of the same folder change."""
    for number in range(2):
        pipe = tiny_pipeline(number)
        pipe.scheduler.register_to_config(solver_order=number + 1)
        pipe.save_pretrained(f"parts{number}")
    option, argv = f"--{part.replace('_', '-')}", ["--num-images", "1", "-o"]
    assert run(model, prompts, *argv, "a") == 0
    assert run(model, prompts, *argv, "a", option, "parts1") == 1
    assert "a/pictures/00000/samples/0000.png was drawn with " in capsys.readouterr().err
    assert run(model, prompts, *argv, "b", option, "parts0") == 0
    assert json.loads(Path("b/scores.json").read_text())["settings"][part] == "parts0"
    Path("parts0").rename("gone")
    Path("parts1").rename("parts0")
    before = drawn("b")
    assert run(model, prompts, *argv, "b", option, "parts0") == 1
    assert f"was drawn with {part}_fingerprint" in capsys.readouterr().err
    assert same(before, drawn("b"))


def test_pictures_that_do_not_say_their_parts_are_refused(here, model, prompts, capsys):
    assert run(model, prompts, "--num-images", "1", "-o", "out") == 0
    path = Path("out/pictures/00001/samples/0000.png")
    made = read_metadata(path)
    earlier = {name: made[name] for name in made if not name.endswith("_fingerprint")}
    save_image(load_image(path), path, earlier)
    assert run(model, prompts, "--num-images", "1", "-o", "out") == 1
    said = capsys.readouterr().err
    assert f"{path} does not say which VAE" in said and "Give another --output" in said


@pytest.mark.slow
def test_processes_share_the_work_and_draw_the_same(here, model, prompts):
    command = [
        "-m", "localdit", "evaluate", str(prompts), "--model", str(model), *QUICK[:2], *QUICK[4:],
        "--num-images", "2", "-o",
    ]  # fmt: skip
    alone = [sys.executable, *command, "alone"]
    shared = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    shared += ["--mixed_precision", "no", *command, "shared"]
    outputs = []
    for each in (alone, shared):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run(each, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert same(drawn("alone"), drawn("shared")) and len(drawn("alone")) == 6
    assert outputs[1].count("| pictures | 6 |") == 1
    assert json.loads(Path("shared/scores.json").read_text())["pictures"] == 6


def test_captions_of_scenes_are_scored(here, model):
    scenes = list(sample_scenes(3, 0))
    lines = [json.dumps({"prompt": "a cat", "scene": scene.to_dict()}) for scene in scenes]
    Path("prompts.jsonl").write_text("\n".join(lines))
    assert run(model, "prompts.jsonl", "--num-images", "1", "-o", "out") == 0
    found = json.loads(Path("out/scores.json").read_text())["scores"]
    assert any(name.startswith("scene, ") and name.endswith(": all") for name in found)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num-images", "0"], "--num-images is 0; expected at least 1"),
        (["--num-images", "1000000000"], "3,000,000,000 pictures; expected at most 1,000,000"),
        (["--max-prompts", "0"], "--max-prompts is 0; expected at least 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--height", "33"], "33"),
        (["--reference", "."], "--reference and --feature-extractor go together"),
        (["--clip", "nowhere"], "--clip is nowhere; expected a folder"),
        (["--reference", "empty", "--feature-extractor", "empty"], "0 real pictures"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    argv, message, here, model, prompts, capsys, monkeypatch
):
    Path("empty").mkdir()
    monkeypatch.setattr(evaluate, "load", None)
    assert run(model, prompts, "-o", "out", *argv) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["--clip", "--feature-extractor"])
@pytest.mark.parametrize("kind", ["nothing", "text"])
def test_a_model_that_cannot_score_is_found_before_anything_is_loaded(
    option, kind, here, model, prompts, capsys, monkeypatch
):
    Path("real").mkdir()
    for number in range(4):
        save_image(Image.new("RGB", (32, 32)), f"real/{number}.png")
    folder = {"nothing": "real", "text": str(model_in_the_box() / "text_encoder")}[kind]
    reference = ["--reference", "real"] if option == "--feature-extractor" else []
    monkeypatch.setattr(evaluate, "load", None)
    assert run(model, prompts, "-o", "out", option, folder, *reference) == 2
    assert f"{option} is {folder}, whose model can't score a picture" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_missing_package_is_named(here, model, prompts, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    assert run(model, prompts, "--reference", ".", "--feature-extractor", ".") == 2
    assert 'pip install "localdit[evaluate]"' in capsys.readouterr().err
