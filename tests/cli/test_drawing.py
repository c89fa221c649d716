"""generate, edit and inpaint: what they make, and what they refuse before loading."""

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from localdit import utils
from localdit.checkpoint import convert_to_single_file
from localdit.cli import demo, evaluate, main, plan
from localdit.cli.drawing import edit_parser, generate_parser, inpaint_parser
from localdit.config import Config, part_source, with_settings
from localdit.core.diffusion import Objective
from localdit.images import load_image, read_metadata, save_image
from localdit.pipelines import LocalDiTPipeline
from tests.tiny import tiny_components, tiny_pipeline

from .conftest import names

QUICK = ["--steps", "2", "--device", "cpu"]


@pytest.fixture
def pictures(here):
    """A photograph of 96 x 48 pixels, masks for it, and files that are not masks."""
    rng = np.random.default_rng(0)
    save_image(Image.fromarray(rng.integers(0, 255, (48, 96, 3), np.uint8)), "photo.png")
    mask = Image.new("L", (96, 48))
    mask.paste(255, (8, 8, 40, 40))
    mask.save("mask.png")
    Image.new("L", (96, 48)).save("black.png")
    Image.new("L", (48, 48), 255).save("small.png")
    Image.new("RGBA", (96, 48), (255, 255, 255, 0)).save("clear.png")
    Image.new("RGB", (4, 3000)).save("thin.png")
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("zeros.txt").write_bytes("a cat".encode("utf-16-le"))
    return here


def draw(command, model, *argv):
    return main([command, *argv, "--model", str(model), *QUICK])


def test_generate_makes_a_picture(here, model, capsys):
    assert draw("generate", model, "a red circle", "-o", "circle.png", "--seed", "5") == 0
    assert capsys.readouterr().out == "circle.png: a red circle\n"
    assert load_image("circle.png").size == (64, 64)
    made = read_metadata("circle.png")
    assert (made["prompt"], made["seed"], made["num_inference_steps"]) == ("a red circle", 5, 2)
    assert names(here) == ["circle.png"]


def test_paths_may_start_with_the_home_folder(pictures, model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    home = Path(model.parent)
    (home / "prompt.txt").write_text("a cat")
    shutil.copy("photo.png", home / "photo.png")
    before = names(pictures)
    name = f"~/{model.name}"
    argv = ["--prompt-file", "~/prompt.txt", "--output=~/a.png", "--overwrite", f"--vae={name}"]
    assert draw("generate", name, *argv) == 0
    assert main(["edit", "~/photo.png", "a cat", "--model", name, "-o", "~/b.png", *QUICK]) == 0
    assert main(["convert", name, "~/own.safetensors"]) == main(["info", "~/a.png"]) == 0
    assert {"a.png", "b.png", "own.safetensors"} <= set(names(home))
    assert names(pictures) == before


def test_generate_makes_several(here, model):
    argv = ["a cat", "a dog", "--num-images", "2", "--grid", "--batch-size", "3"]
    assert draw("generate", model, *argv, "--width", "32") == 0
    made = [read_metadata(f"output/generate_{i:03d}.png") for i in range(4)]
    assert [m["prompt"] for m in made] == ["a cat", "a cat", "a dog", "a dog"]
    assert [m["seed"] for m in made] == [0, 1, 2, 3]
    assert load_image("output/generate_grid_000.png").size == (64, 128)


def test_prompts_come_from_a_pipe(here, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat\n\na dog\n"))
    assert draw("generate", model, "--prompt-file", "-", "-o", "a.png") == 0
    assert [read_metadata(f"a_00{i}.png")["prompt"] for i in range(2)] == ["a cat", "a dog"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_prompts_are_the_same_in_every_encoding(here, monkeypatch, encoding):
    data = "a caf\xe9 \U0001f534\r\n\r\n a\u2028dog\x85\rthe end".encode(encoding)
    Path("a.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
    for name in ("a.txt", "-"):
        prompts = plan._read_prompts(Path(name))
        assert prompts == ["a caf\xe9 \U0001f534", "a\u2028dog", "the end"]


def test_without_standard_input_there_are_no_prompts(here, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert draw("generate", model, "--prompt-file", "-") == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_what_the_terminal_lacks_does_not_end_the_drawing(here, model, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", printed)
    prompts = ["a red circle \U0001f534", "a\x1b[2J\nb"]
    assert draw("generate", model, *prompts, "-o", "\u4e2d.png") == 0
    assert printed.buffer.getvalue().decode("cp1252").splitlines() == [
        r"\u4e2d_000.png: a red circle \U0001f534", r"\u4e2d_001.png: a\x1b[2J\nb",
    ]  # fmt: skip
    assert [read_metadata(f"\u4e2d_00{i}.png")["prompt"] for i in range(2)] == prompts
    printed.buffer.truncate(0)
    assert main(["info", "\u4e2d_001.png"]) == 0
    assert rb"a\x1b[2J\nb" in printed.buffer.getvalue()


def test_a_failure_to_print_does_not_end_the_drawing(here, model, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert draw("generate", model, "a cat", "a dog", "--grid", "-o", "a.png") == 0
    assert capsys.readouterr().err == "warning: can't print: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert draw("generate", model, "a cat", "a dog", "-o", "b.png") == 0
    monkeypatch.setattr(sys, "stdout", None)
    assert draw("generate", model, "a cat", "a dog", "-o", "c.png") == 0
    assert capsys.readouterr().err == ""
    assert len(names(here)) == 7


def test_unknown_pieces_of_prompts_are_told_once(here, model, caplog):
    prompts = ["a red circle \U0001f534", "a \U0001f534 cat \u65e5"]
    assert draw("generate", model, *prompts, "-o", "a.png") == 0
    assert caplog.text.count("\U0001f534") == 1 and caplog.text.count("\u65e5") == 1
    assert "The tokenizer does not know" in caplog.text


def test_unknown_words_are_told_if_the_model_knows_whole_words(here, model, caplog):
    shutil.copytree(model, "whole")
    index = here / "whole/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"whole_words": True}))
    prompt = "a shiny red dodecahedron"
    assert draw("generate", "whole", prompt, "--negative-prompt", "dull", "-o", "a.png") == 0
    line = "The model does not know these words and ignores them: shiny, dodecahedron, dull"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_picture_may_have_a_name_of_255_bytes(pictures, model):
    name, source = "\u00e9" * 125 + "a.png", b"photo \xff\\e\xcc\x81.png"
    os.rename("photo.png", source)
    assert draw("edit", model, os.fsdecode(source), "a cat", "-o", name) == 0
    assert read_metadata(name)["image"] == os.fsdecode(source)


def test_box_is_the_model_in_the_box(here, model, monkeypatch, capsys):
    monkeypatch.setattr(utils, "BOX", model)
    assert main(["generate", "a cat", "--model", "box", "-o", "a.png", *QUICK]) == 0
    assert capsys.readouterr().err == ""
    (here / "box").mkdir()  # a folder that nobody has named
    assert main(["generate", "a cat", "-o", "b.png", *QUICK]) == 0
    said = capsys.readouterr().err
    assert utils.DOWNLOAD_COMMAND in said and "using the small model in the box" in said
    a, b = read_metadata("a.png"), read_metadata("b.png")
    assert a == b
    assert a["model"] == "the model in the box"


def test_a_copy_of_a_model_draws_the_same_picture(here, model, monkeypatch, capsys):
    monkeypatch.setattr(utils, "BOX", model)
    shutil.copytree(model, "copy")
    for name in ("box", "copy"):
        argv = ["a cat", "--guidance-scale", "7", "-o", f"{name}.png", *QUICK]
        assert main(["generate", *argv, "--model", name]) == 0
    assert load_image("box.png").tobytes() == load_image("copy.png").tobytes()
    assert read_metadata("copy.png") == read_metadata("box.png") | {"model": "copy"}
    assert read_metadata("copy.png")["negative_prompt"] == ""


def test_the_student_in_the_box_needs_no_options(here, capsys, monkeypatch):
    assert main(["generate", "a red circle", "--model", "box-few-steps", "-o", "a.png"]) == 0
    assert capsys.readouterr().err == ""
    made = read_metadata("a.png")
    assert (made["num_inference_steps"], made["guidance_scale"]) == (4, 1.0)
    assert made["model"] == "the student in the box"
    monkeypatch.chdir(utils.BOX / utils.FEW_STEPS)
    argv = ["--model", ".", "-o", str(here / "b.png")]
    assert main(["generate", "a red circle", *argv]) == 0
    assert read_metadata(here / "b.png") == made


def test_a_picture_names_the_parts_that_are_not_the_models_own(here, model):
    tiny_pipeline(1).save_pretrained("other")
    convert_to_single_file(model, "own.safetensors")
    parts = ("text_encoder", "vae", "scheduler")
    options = [f"--{part.replace('_', '-')}=other" for part in parts]
    for name, option in zip(parts, options, strict=True):
        assert draw("generate", model, "a cat", option, "-o", f"{name}.png") == 0
    assert draw("generate", "own.safetensors", "a cat", *options, "-o", "file.png") == 0
    assert draw("generate", model, "a cat", "-o", "own.png") == 0
    for name, expected in {"own": (), "file": parts, **{part: (part,) for part in parts}}.items():
        made = read_metadata(f"{name}.png")
        assert {part: made[part] for part in parts if part in made} == dict.fromkeys(
            expected, "other"
        )
    config = Config(max_length=60, text_encoder_quantization="4bit", ckpt_path=model)
    choice = plan.choose_model(generate_parser().parse_args([]), config)
    assert choice.changes == {"max_length": 60, "text_encoder_quantization": "4bit"}


@pytest.mark.parametrize("part", ["text_encoder", "vae", "scheduler"])
def test_a_part_that_is_given_replaces_the_models_own_whatever_its_name(here, model, part):
    """So does one that is named like the default."""
    default = str(getattr(Config, part))
    option = ["--" + part.replace("_", "-"), default]
    parse = generate_parser().parse_args
    config = Config(ckpt_path=model, **{part: default})
    for argv, given in ((["--model", str(model), *option], None), ([], config), (option, config)):
        choice = plan.choose_model(parse(["a cat", *argv]), given)
        assert choice.changes == {part: default}
        assert part_source(choice.config, part, model) == default
    copied = pickle.loads(pickle.dumps(with_settings(Config(), {"height": 64})))
    assert part_source(copied, part, model) == model


def test_a_sampler_by_name(pictures, model):
    convert_to_single_file(model, "own.safetensors")
    parts = [f"--{part}={model}" for part in ("text-encoder", "vae", "scheduler")]
    commands = [
        ("generate", model, ["a cat"]),
        ("edit", model, ["photo.png", "a cat"]),
        ("inpaint", model, ["photo.png", "mask.png", "a cat"]),
        ("generate", "own.safetensors", ["a cat", *parts]),
    ]
    for command, path, argv in commands:
        pixels = []
        for name in ("a.png", "b.png"):
            sampler = ["--sampler", "ddim"] if name == "b.png" else []
            assert draw(command, path, *argv, "-o", name, "--overwrite", *sampler) == 0
            assert read_metadata(name).get("sampler") == ("ddim" if sampler else None)
            pixels.append(load_image(name).tobytes())
        assert pixels[0] != pixels[1]


def test_a_sampler_that_does_not_suit_the_model_is_refused_before_loading(
    here, model, monkeypatch, capsys
):
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("loaded"))
    flow = tiny_pipeline()
    flow.scheduler = Objective("flow").sampling_scheduler()
    flow.save_pretrained("flow")
    convert_to_single_file(model, "own.safetensors")
    parts = [f"--{part}={model}" for part in ("text-encoder", "vae")]
    for argv in (["--model", "flow"], ["--model", "own.safetensors", *parts, "--scheduler=flow"]):
        assert main(["generate", "a cat", *argv, "--sampler", "ddim", *QUICK]) == 2
        said = capsys.readouterr().err
        assert "--sampler is 'ddim', which can't sample a model that predicts 'flow'" in said


def few_step_copy(model, folder):
    """A copy of a pipeline's folder that says it is for 4 steps without guidance."""
    shutil.copytree(model, folder)
    index = Path(folder, "model_index.json")
    own = {"num_inference_steps": 4, "guidance_scale": 1.0}
    index.write_text(json.dumps(json.loads(index.read_text()) | own))
    return folder


def test_a_folder_says_which_steps_and_guidance_suit_it(here, model):
    quick = few_step_copy(model, "quick")
    drawn = {"a.png": [], "b.png": ["--steps", "3"], "c.png": ["--guidance-scale", "20"]}
    made = {}
    for name, options in drawn.items():
        argv = ["generate", "a cat", "--model", quick, "--device", "cpu", "-o", name, *options]
        assert main(argv) == 0
        made[name] = read_metadata(name)
    settings = [(m["num_inference_steps"], m["guidance_scale"]) for m in made.values()]
    assert settings == [(4, 1.0), (3, 1.0), (4, 20.0)]


def test_a_config_that_differs_from_the_defaults_wins_over_the_folder(here, model):
    quick = few_step_copy(model, "quick")
    args = generate_parser().parse_args(["a cat", "--model", quick])
    given = [{}, {"guidance_scale": 3.0}, {"denoising_steps": 9}]
    chosen = [plan.choose_model(args, Config(**one)).config for one in given]
    settings = [(config.denoising_steps, config.guidance_scale) for config in chosen]
    assert settings == [(4, 1.0), (4, 3.0), (9, 1.0)]


def test_the_parts_of_a_config_belong_to_its_own_checkpoint(here, model):
    """Those of the released weights do not replace those of another model's folder."""
    parser, released = generate_parser(), Config(ckpt_path="released.pt", vae="released")
    chosen = plan.choose_model(parser.parse_args(["a cat", "--model", str(model)]), released)
    assert chosen.config.vae == Config.vae
    named = parser.parse_args(["a cat", "--model", str(model), "--vae", str(model)])
    assert plan.choose_model(named, released).config.vae == str(model)
    own = Config(ckpt_path=str(model), vae=str(model))
    assert plan.choose_model(parser.parse_args(["a cat"]), own).config.vae == str(model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0; expected at least 1"),
        ({"guidance_scale": "high"}, "guidance_scale is 'high' of type str"),
    ],
)
def test_an_unusable_setting_of_a_folder_is_a_mistake(here, model, capsys, entry, message):
    index = Path(few_step_copy(model, "quick"), "model_index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | entry))
    assert draw("generate", "quick", "a cat") == 2
    assert f"quick/model_index.json: {message}" in capsys.readouterr().err


def test_the_architecture_is_read_from_a_checkpoint_file(here, model):
    convert_to_single_file(model, here / "own.safetensors")
    parts = [f"--{part}={model}" for part in ("text-encoder", "vae", "scheduler")]
    assert draw("generate", here / "own.safetensors", "a cat", "-o", "a.png", *parts) == 0
    assert draw("generate", model, "a cat", "-o", "b.png", "--negative-prompt", "") == 0
    assert load_image("a.png").size == load_image("b.png").size == (64, 64)


@pytest.mark.parametrize("sample_size", [8, 128])
def test_a_model_is_drawn_at_its_own_size(pictures, sample_size):
    """Also one of 128 latents, for which the Config has another size."""
    LocalDiTPipeline(**tiny_components(sample_size=sample_size)).save_pretrained("own")
    Path("prompts.jsonl").write_text('{"prompt": "a cat"}\n')

    def size(parser, *argv, make=lambda args: plan.plan(args, "x").model):
        config = make(parser.parse_args([*argv, "--model", "own"])).config
        return config.height, config.width

    side = sample_size * 8
    assert size(generate_parser(), "a cat") == (side, side)
    assert size(generate_parser(), "a cat", "--height", "32") == (32, side)
    scores = ("prompts.jsonl", "-o", "out")
    make = lambda args: evaluate.make_plan(args).model  # noqa: E731
    assert size(evaluate.build_parser(), *scores, make=make) == (side, side)
    assert size(demo.build_parser(), make=demo.page_model) == (side, side)
    for parser, files in ((edit_parser(), 1), (inpaint_parser(), 2)):
        height, width = size(parser, *("photo.png", "mask.png")[:files], "a cat")
        assert height * width == pytest.approx(side**2, rel=0.15)


def test_edit_keeps_the_proportions(pictures, model):
    assert draw("edit", model, "photo.png", "a cat", "-o", "a.png", "--strength", "0.5") == 0
    assert load_image("a.png").size == (96, 48)
    made = read_metadata("a.png")
    assert (made["image"], made["strength"]) == ("photo.png", 0.5)
    assert draw("edit", model, "photo.png", "a cat", "-o", "b.png", "--height", "32") == 0
    assert load_image("b.png").size == (64, 32)


def test_a_strength_of_0_keeps_the_picture(pictures, model):
    for name, strength in (("a.png", "0"), ("b.png", "1")):
        assert draw("edit", model, "photo.png", "a cat", "-o", name, "--strength", strength) == 0
    assert load_image("a.png").tobytes() != load_image("b.png").tobytes()


def test_inpaint_keeps_size_and_pixels(pictures, model):
    large = load_image("photo.png").resize((150, 90))
    large.save("large.png")
    Image.open("mask.png").resize((150, 90), Image.Resampling.NEAREST).save("large_mask.png")
    for name in ("photo", "large"):
        mask = "mask.png" if name == "photo" else "large_mask.png"
        argv = [f"{name}.png", mask, "a cat", "-o", f"{name}_out.png"]
        assert draw("inpaint", model, *argv) == 0
        before, after = (np.asarray(load_image(f"{name}{end}.png")) for end in ("", "_out"))
        assert before.shape == after.shape
        repainted = np.asarray(Image.open(mask)) > 0
        assert (before[~repainted] == after[~repainted]).all()
        assert (before[repainted] != after[repainted]).any()
    made = read_metadata("photo_out.png")
    assert (made["mask"], made["strength"], made["padding_mask_crop"]) == ("mask.png", 1.0, None)


def test_inpaint_can_draw_only_the_surroundings_of_the_mask(pictures, model):
    argv = ["photo.png", "mask.png", "a cat"]
    assert draw("inpaint", model, *argv, "-o", "whole.png") == 0
    assert draw("inpaint", model, *argv, "-o", "near.png", "--padding-mask-crop", "4") == 0
    assert read_metadata("near.png")["padding_mask_crop"] == 4
    assert load_image("near.png").size == (96, 48)
    assert load_image("near.png").tobytes() != load_image("whole.png").tobytes()


def save_lora(folder, seed):
    """An adapter with random weights for the tiny model."""
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False)
    pipe.transformer.add_adapter(settings)
    pipe.save_lora_weights(folder, pipe.transformer)


def test_loras_and_their_weights(pictures, model):
    save_lora("one", 0)
    save_lora("two", 1)
    file = "two/pytorch_lora_weights.safetensors"
    drawn = {
        "plain": [],
        "none": ["--lora", "one", "--lora-scale", "0"],
        "one": ["--lora", "one"],
        "both": ["--lora", "one", "--lora", file, "--lora-scale", "1", "--lora-scale", "0.5"],
    }
    for name, options in drawn.items():
        assert draw("generate", model, "a cat", "-o", f"{name}.png", *options) == 0
    pixels = {name: load_image(f"{name}.png").tobytes() for name in drawn}
    assert pixels["plain"] == pixels["none"]
    assert len({pixels["plain"], pixels["one"], pixels["both"]}) == 3
    assert read_metadata("both.png")["loras"] == {"one": 1.0, file: 0.5}
    for command, files in (("edit", ["photo.png"]), ("inpaint", ["photo.png", "mask.png"])):
        for name in ("plain", "one"):
            argv = [*files, "a cat", "-o", f"{command}_{name}.png", *drawn[name]]
            assert draw(command, model, *argv) == 0
        a, b = (load_image(f"{command}_{name}.png").tobytes() for name in ("plain", "one"))
        assert a != b


MISTAKES = [
    ("generate", [], "there is no prompt; give one in quotes"),
    ("generate", ["a", "--prompt-file", "latin.txt"], "prompts and --prompt-file are both given"),
    ("generate", ["--prompt-file", "latin.txt"], "latin.txt is not UTF-8 text"),
    ("generate", ["--prompt-file", "empty.txt"], "empty.txt is empty"),
    (
        "generate",
        ["a", "--height", "100"],
        "--height must be a positive multiple of 16 pixels, got 100",
    ),
    ("generate", ["a", "--steps", "0"], "--num-inference-steps is 0"),
    ("generate", ["a", "--seed", "-1"], "--seed is -1"),
    ("generate", ["a", "--batch-size", "0"], "--batch-size is 0"),
    ("generate", ["a", "--sampler", "eular"], "--sampler is 'eular', and there is no sampler of"),
    ("edit", ["photo.png", "a", "--sampler", "eular"], "samplers that suit this model: dpm++2m, "),
    ("generate", ["a", "--model", "gone.pt"], "--model: there is no gone.pt"),
    ("generate", ["a", "--height", "1" + 400 * "0"], "at least 1 and finite"),
    (
        "generate",
        ["a", "--num-images", "1000000000"],
        "ask for 1,000,000,000 pictures; expected at most 100,000: lower --num-images",
    ),
    ("edit", ["thin.png", "a"], "4 x 3000 pixels can't be drawn in its proportions"),
    ("generate", ["a", "--device", "cuda:77"], "--device is 'cuda:77'"),
    ("generate", ["a", "--device", "meta"], "--device is 'meta'; expected 'cpu', 'cuda'"),
    ("generate", ["a", "--device", "xpu"], "--device is 'xpu'; expected 'cpu', 'cuda'"),
    ("generate", ["a", "--overwrite"], "--overwrite is given, but --output is the folder output"),
    ("generate", ["a", "--offload", "model"], "--offload is 'model'"),
    ("generate", ["a", "-o", "photo.png"], "photo.png already exists"),
    ("generate", ["a", "-o", "a.webp"], "pictures are saved as PNG: a.png"),
    ("generate", ["a", "--lora", "x/y", "--lora", "x/y"], "--lora: x/y is given twice; expected"),
    (
        "generate",
        ["a", "--lora", "photo.png", "--lora", "./photo.png"],
        "./photo.png is given twice",
    ),
    ("generate", ["a", "--lora-scale", "1"], "--lora-scale is given 1 times for 0 LoRAs"),
    ("generate", ["a", "--lora", "x/y", "--lora-scale", "nan"], "--lora-scale is nan; expected a"),
    ("generate", ["a", "--sampler", "heun", "--steps", "4"], "the sampler 'heun' needs at least 5"),
    ("generate", ["a", "--lora", "gone.safetensors"], "--lora: There is no gone.safetensors"),
    ("generate", ["a", "--lora", "photo.png"], "--lora: photo.png is a picture. Expected"),
    ("generate", ["a", "--lora", "folder"], "--lora: folder holds no pytorch_lora_weights"),
    ("edit", ["photo.png", "a", "--lora", "broken.safetensors"], "--lora: broken.safetensors is"),
    ("generate", ["a", "--lora", "own.safetensors"], "own.safetensors is not a LoRA for LocalDiT"),
    (
        "generate",
        ["a", "--model", "box-few-steps", "--steps", "9"],
        "steps is 9, but the LCMSchedule",
    ),
    (
        "generate",
        ["a", "--model", "box", "--sampler", "lcm", "--steps", "51"],
        "has 50 noise levels",
    ),
    (
        "edit",
        ["photo.png", "a", "--model", "box-few-steps", "--steps", "9", "--strength", "1"],
        "the LCMScheduler of this model has 8 noise levels",
    ),
    ("generate", ["a", "--model", "broken.safetensors"], "broken.safetensors"),
    ("edit", ["gone.png", "a"], "gone.png: there is no such image file"),
    ("edit", ["empty.txt", "a"], "empty.txt is not an image"),
    ("edit", ["photo.png"], "there is no prompt"),
    ("edit", ["photo.png", "a", "--strength", "2"], "--strength is 2.0"),
    ("generate", ["a", "b\udcff"], "argument PROMPT: 'b\\udcff' is not UTF-8 text"),
    ("generate", ["a", "--negative-prompt", "\ud83d"], "--negative-prompt: '\\ud83d' is not UTF"),
    ("generate", ["a", "b\0"], "prompt[1] has '\\x00' at position 1, which is not a character"),
    ("generate", ["a", "--negative-prompt", "\0"], "--negative-prompt has '\\x00' at position 0"),
    ("generate", ["--prompt-file", "zeros.txt"], "zeros.txt is not UTF-8 text: it has zero bytes"),
    ("generate", ["a", "b", "-o", "x" * 251 + ".png"], "can't be the name of a file"),
    ("generate", ["--prompt-file", "/dev/zero"], "/dev/zero has more than 50,000,000 bytes"),
    ("inpaint", ["photo.png", "gone.png", "a"], "gone.png: there is no such image file"),
    ("inpaint", ["photo.png", "small.png", "a"], "48 x 48 pixels; expected the picture's 96 x 48"),
    ("inpaint", ["photo.png", "black.png", "a"], "nothing in black.png is white"),
    ("inpaint", ["photo.png", "clear.png", "a"], "clear.png has transparency"),
    (
        "inpaint",
        ["photo.png", "photo.png", "a", "--padding-mask-crop", "-5"],
        "--padding-mask-crop is -5; expected at least 0",
    ),
]


@pytest.mark.parametrize(("command", "argv", "message"), MISTAKES)
def test_mistakes_give_one_line_and_status_2_before_loading(
    pictures, model, monkeypatch, capsys, command, argv, message
):
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("loaded"))
    Path("broken.safetensors").write_bytes(b"\xff" * 100)
    Path("folder").mkdir()
    save_file({"proj_out.weight": torch.zeros(2)}, "own.safetensors")
    before = names(pictures)
    model = [] if "--model" in argv else ["--model", str(model)]
    device = [] if "--device" in argv else ["--device", "cpu"]
    assert main([command, *argv, *model, *device]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"localdit {command}: error: ") and said.err.count("\n") == 1
    assert message in said.err
    assert names(pictures) == before


def test_later_failures_give_one_line_and_status_1(here, model, capsys):
    from tests.checkpoint.flat import flat_state, tiny_model

    state = flat_state(tiny_model(caption_channels=16))
    state["proj_out.bias"][0] = float("nan")
    save_file(state, "nan.safetensors")
    parts = [f"--{part}={model}" for part in ("text-encoder", "vae", "scheduler")]
    assert draw("generate", "nan.safetensors", "a cat", *parts) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not finite" in said
    assert draw("generate", "nan.safetensors", "a cat", *parts, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "--text-encoder: there is no folder nowhere"),
        (".", "--text-encoder: . lacks files; expected tokenizer_config.json and"),
    ],
)
def test_the_error_about_a_missing_part_names_the_option(here, model, capsys, source, message):
    convert_to_single_file(model, here / "own.safetensors")
    parts = [f"--{part}={model}" for part in ("vae", "scheduler")]
    argv = [*parts, "--text-encoder", source]
    assert draw("generate", "own.safetensors", "a cat", *argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_folder_that_was_saved_without_a_part_needs_another_one(here, model, capsys, part):
    pipe = LocalDiTPipeline.from_pretrained(model)
    setattr(pipe, part, None)
    pipe.save_pretrained("lacking")
    option = f"--{part.replace('_', '-')}"
    assert draw("generate", "lacking", "a cat", "-o", "a.png") == 2
    said = capsys.readouterr().err
    assert f"was saved without its {part.replace('_', ' ')}" in said
    assert f"give {option} FOLDER" in said and names(here) == ["lacking"]
    assert draw("generate", "lacking", "a cat", f"{option}={model}", "-o", "a.png") == 0


def test_valid_sizes_depend_on_the_model(here, model, capsys):
    """A model of 4 latents per token takes other sizes than one of 2; found before loading."""
    shutil.copytree(model, "four")
    config = Path("four/transformer/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size": 4}))
    assert draw("generate", "four", "a cat", "--height", "48") == 2
    said = capsys.readouterr().err
    assert "--height must be a positive multiple of 32 pixels, got 48; the nearest" in said


def test_from_the_command_to_the_pipeline_it_takes_five_calls(here, model, monkeypatch):
    frames = []

    def spy(self, **kwargs):
        frame = sys._getframe()
        while frame:
            frames.append((frame.f_globals["__name__"], frame.f_code.co_name))
            frame = frame.f_back
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalDiTPipeline, "__call__", spy)
    assert draw("generate", model, "a cat") == 130
    own = [name for module, name in frames if module.startswith("localdit.")]
    assert own == ["_run", "draw", "generate", "main"]
