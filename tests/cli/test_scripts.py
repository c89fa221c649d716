"""The two scripts: without options, with options, and with mistakes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import localdit
from localdit import utils
from localdit.cli.drawing import run_script, script_parser
from localdit.cli.plan import SCENES
from localdit.config import Config
from localdit.images import load_image, read_metadata, save_image
from localdit.pipelines import LocalDiTPipeline

from .conftest import names

ROOT = Path(__file__).parents[2]
QUICK = ["--steps", "2", "--device", "cpu"]


@pytest.fixture
def boxed(here, monkeypatch, model, tmp_path_factory):
    """A working folder without weights, in which a tiny model of whole words is in the box."""
    box = tmp_path_factory.mktemp("boxed") / "box"
    LocalDiTPipeline.from_pretrained(model, whole_words=True).save_pretrained(box)
    monkeypatch.setattr(utils, "BOX", box)
    return here


def test_text_to_image_without_options_uses_the_model_in_the_box(boxed, capsys):
    assert run_script("t2i", Config(denoising_steps=2), []) == 0
    said = capsys.readouterr()
    notice = said.err.splitlines()[0]
    assert utils.DOWNLOAD_COMMAND in notice
    assert "output/LocalDiT-1024.pt" in notice
    count = len(SCENES.t2i)
    assert names("output") == [f"t2i_{i:03d}.png" for i in range(count)]
    assert said.out.splitlines()[0] == f"output/t2i_000.png: {SCENES.t2i[0]}"
    assert load_image("output/t2i_000.png").size == (64, 64)
    assert read_metadata("output/t2i_001.png") == {
        "prompt": SCENES.t2i[1],
        "negative_prompt": "",
        "seed": 1,
        "num_inference_steps": 2,
        "guidance_scale": 7.0,
        "height": 64,
        "width": 64,
        "model": "the model in the box",
        "dtype": "float32",
        "localdit": localdit.__version__,
    }


def test_default_prompts_follow_the_model_and_not_its_place(boxed):
    shutil.copytree(utils.BOX, "copy")
    for number, name in enumerate(("box", "copy")):
        argv = ["--model", name, "--steps", "1", "-o", f"{number}"]
        assert run_script("t2i", Config(), argv) == 0
    assert load_image("0/t2i_003.png").tobytes() == load_image("1/t2i_003.png").tobytes()
    carried = [read_metadata(f"{number}/t2i_003.png") for number in range(2)]
    assert carried[0]["prompt"] == SCENES.t2i[3] and carried[0]["model"] == "the model in the box"
    assert carried[1] == carried[0] | {"model": "copy"}


def test_image_to_image_without_options_draws_its_first_picture_and_reuses_it(boxed, capsys):
    config = Config(denoising_steps=2)
    assert run_script("i2i", config, []) == 0
    assert names("output") == ["i2i_000.png", "t2i_000.png"]
    made = read_metadata("output/i2i_000.png")
    assert made["image"] == "output/t2i_000.png"
    assert made["strength"] == 0.8
    assert read_metadata("output/t2i_000.png")["prompt"] == SCENES.t2i[0]
    assert "drawing one" in capsys.readouterr().out
    assert run_script("i2i", config, []) == 0
    assert names("output") == ["i2i_000.png", "i2i_001.png", "t2i_000.png"]
    assert load_image("output/i2i_000.png").tobytes() == load_image("output/i2i_001.png").tobytes()


def test_every_option_has_its_effect(here, model):
    save_image(Image.new("RGB", (90, 40), "red"), "in.png")
    argv = ["--model", str(model), "--prompt", "a cat", "--prompt", "a dog", "--seed", "7"]
    argv += ["--negative-prompt", "bad", "--steps", "4", "--guidance-scale", "2.5", "--dtype"]
    argv += ["bfloat16", "--device", "cpu", "--height", "32", "--width", "48", "--num-images", "2"]
    argv += ["--output", "deep/down", "--strength", "0.5", "--image", "in.png", "--grid"]
    assert run_script("i2i", Config(), argv) == 0
    pictures = [f"i2i_{i:03d}.png" for i in range(4)]
    assert names("deep/down") == [*pictures, "i2i_grid_000.png"]
    made = [read_metadata(f"deep/down/{name}") for name in pictures]
    assert [m["prompt"] for m in made] == ["a cat", "a cat", "a dog", "a dog"]
    assert [m["seed"] for m in made] == [7, 8, 9, 10]
    assert (
        made[0]
        | {
            "negative_prompt": "bad",
            "num_inference_steps": 4,
            "guidance_scale": 2.5,
            "height": 32,
            "width": 48,
            "model": str(model),
            "dtype": "bfloat16",
            "image": "in.png",
            "strength": 0.5,
        }
        == made[0]
    )
    assert load_image("deep/down/i2i_003.png").size == (48, 32)
    assert load_image("deep/down/i2i_grid_000.png").size == (96, 64)


def test_a_prompt_file_and_continued_numbers(here, model):
    Path("prompts.txt").write_text("a star\n\n  a café by the lake \n", encoding="utf-8")
    Path("output").mkdir()
    Path("output/t2i_041.png").write_bytes(b"mine")
    assert (
        run_script("t2i", Config(), ["--model", str(model), "--prompt-file", "prompts.txt", *QUICK])
        == 0
    )
    assert names("output") == ["t2i_041.png", "t2i_042.png", "t2i_043.png"]
    assert Path("output/t2i_041.png").read_bytes() == b"mine"
    assert read_metadata("output/t2i_043.png")["prompt"] == "a café by the lake"


def test_each_picture_is_saved_when_it_is_drawn(here, model, monkeypatch):
    """A failure in the third picture leaves the first two on disk."""
    from localdit import images

    def fails_later(picture, path, settings, **more):
        if settings["prompt"] == "c":
            raise OSError("No space left on device")
        return save_image(picture, path, settings, **more)

    monkeypatch.setattr(images, "save_image", fails_later)
    prompts = [word for letter in "abc" for word in ("--prompt", letter)]
    assert run_script("t2i", Config(), ["--model", str(model), *prompts, *QUICK]) == 1
    assert names("output") == ["t2i_000.png", "t2i_001.png"]


def test_sizes_come_from_the_config_where_it_describes_the_model(here, model):
    config = Config(sample_size=8, height=48, width=32)
    assert run_script("t2i", config, ["--model", str(model), "--prompt", "a cat", *QUICK]) == 0
    assert load_image("output/t2i_000.png").size == (32, 48)


MISTAKES = [
    (
        ["--height", "770"],
        "got 770; the nearest that work: 768 or 784",
    ),
    (["--width", "-16"], "--width is -16; expected at least 1"),
    (["--steps", "0"], "--num-inference-steps is 0; expected at least 1"),
    (["--strength", "1.5"], "--strength is 1.5; expected at least 0 and at most 1"),
    (["--guidance-scale", "nan"], "--guidance-scale is nan"),
    (["--seed", "-1"], "--seed is -1"),
    (["--num-images", "0"], "--num-images is 0"),
    (["--prompt", "x" * 10_001], "10001 characters"),
    (["--prompt-file", "gone.txt"], "gone.txt"),
    (["--prompt-file", "empty.txt"], "empty.txt is empty"),
    (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["--image", "empty.txt"], "empty.txt is not an image"),
    (["--image", "gone.png"], "there is no such image file"),
    (["--output", "empty.txt/pictures"], "can't write to the output folder"),
    (["--model", "gone.pt"], "--model: there is no gone.pt"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_mistakes_give_one_line_and_status_2_before_loading(
    here, model, monkeypatch, capsys, argv, message
):
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("loaded"))
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    if argv[0] != "--model":
        argv = [*argv, "--model", str(model)]
    assert run_script("i2i", Config(), argv) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert message in said.err
    assert not list(here.glob("**/*.png"))


def test_a_size_of_config_py_that_the_model_cannot_draw_is_refused(here, model, capsys):
    config = Config(sample_size=8, height=50)
    assert run_script("t2i", config, ["--model", str(model), *QUICK]) == 2
    assert "--height must be a positive multiple of 16 pixels, got 50" in capsys.readouterr().err


def test_arguments_that_the_parser_refuses(capsys):
    for argv in (["--steps", "x"], ["--prompt", "a", "--prompt-file", "b"], ["--image", "a.png"]):
        with pytest.raises(SystemExit) as raised:
            script_parser("t2i").parse_args(argv)
        assert raised.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_missing_weights_that_config_py_names_are_an_error(boxed, capsys):
    assert run_script("t2i", Config(ckpt_path="mine.pt"), []) == 2
    assert "--model: there is no mine.pt" in capsys.readouterr().err


def test_failures_give_one_line_and_status_1(here, model, capsys):
    damaged = here / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    config = Config(text_encoder=model, vae=model, scheduler=model)
    argv = ["--model", str(damaged), "--device", "cpu"]
    assert run_script("t2i", config, argv) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "damaged.safetensors" in said
    assert run_script("t2i", config, [*argv, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["infer_t2i.py", "infer_i2i.py"])
def test_help_is_quick_since_it_imports_nothing_heavy(script, tmp_path):
    code = (
        f"import runpy, sys; sys.argv = [{str(ROOT / script)!r}, '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit: print('heavy:', [m for m in ('torch', 'diffusers', 'PIL', 'numpy') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "heavy: []" in done.stdout
    assert "--negative-prompt" in done.stdout


@pytest.mark.slow
def test_the_script_itself(model, tmp_path):
    argv = ["--model", str(model), "--prompt", "a red circle", "--height", "32", "--width", "32"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "infer_t2i.py"), *argv, *QUICK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "output/t2i_000.png: a red circle\n"
    assert done.stderr == ""
    assert names(tmp_path / "output") == ["t2i_000.png"]
