"""The recipes' own code, on the smallest inputs."""

import contextlib
import importlib.util
import itertools
import json
import subprocess
import sys
import tarfile
from argparse import Namespace
from io import BytesIO
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.core.latents import LatentSpace
from localdit.models import LocalDiTTransformer2DModel
from localdit.scenes import sample_scenes
from localdit.scenes.scene import PALETTE
from localdit.training.data.finding import find_samples
from tests.training.workplace import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / "recipes" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its data classes look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("compression", "size"), [(16, (2, 8, 8, 8)), (32, (2, 32, 4, 4))])
def test_each_autoencoder_of_scenes_trains_and_is_scaled(compression, size):
    recipe = load("box/train_autoencoder.py")
    vae = recipe.build_autoencoder(compression)
    drawings = recipe.draw(list(sample_scenes(2, 0)), 256)
    assert drawings.pixels.shape == (2, 256, 256, 3)
    stage = recipe.Stage(1.0, 0.5, 2)
    pixels, _ = recipe.random_crops(drawings, stage, np.random.default_rng(0))
    assert pixels.shape == (2, 3, 128, 128)
    settings = Namespace(
        latent_noise=0.1, whitening_weight=0.02, freeze_encoder=False, edge_weight=10.0
    )
    recipe.training_loss(vae, pixels, None, settings, progress=0.0).backward()
    moved = [parameter for parameter in vae.parameters() if parameter.grad.any()]
    weights = [parameter.detach().clone() for parameter in moved]
    recipe.MuonWithAdamW(list(vae.parameters()), 1e-3).step(1e-3)
    pairs = zip(weights, moved, strict=True)
    assert moved and all((old != new).any() for old, new in pairs)
    assert all(parameter.grad is None for parameter in vae.parameters())
    before = recipe.reconstruct(vae, pixels)
    recipe.set_scale(vae, pixels)
    latents = LatentSpace(vae).encode(pixels)
    assert latents.shape == size
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(recipe.reconstruct(vae, pixels), before, atol=1e-3, rtol=0)


def test_samplers_are_scored_in_a_table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/box"))
    options = "--count 1 --side 64 --steps 1 --samplers ddim euler"
    argv = ["score_samplers.py", "--pipeline", str(ROOT / "localdit/box"), *options.split()]
    monkeypatch.setattr(sys, "argv", argv)
    load("box/score_samplers.py").main()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "`ddim`",
        "`euler`",
    ]


@pytest.mark.parametrize("cells", [16, 8])
def test_crops_of_generated_latents_are_those_of_their_pixels(cells):
    recipe = load("box/train_autoencoder.py")
    drawings = recipe.draw(list(sample_scenes(3, 0)), 256)
    step = 256 // cells
    latents = torch.stack([recipe.to_tensor(one[None])[0] for one in drawings.pixels])
    drawings = recipe.Drawings(
        drawings.pixels, drawings.centres, latents[:, :, ::step, ::step].contiguous()
    )
    stage = recipe.Stage(1.0, 0.5, 8)
    pixels, cut = recipe.random_crops(drawings, stage, np.random.default_rng(0))
    assert cut.shape == (8, 3, cells // 2, cells // 2)
    assert torch.equal(cut, pixels[:, :, ::step, ::step])


def test_the_decoder_gets_a_level_at_full_resolution():
    recipe = load("box/train_autoencoder.py")
    vae = recipe.build_autoencoder(16)
    finer = recipe.with_full_resolution(vae)
    weights, expected = finer.state_dict(), vae.state_dict()
    new = {name for name in weights if name not in expected}
    assert {name.split(".")[1] for name in new} == {"up_blocks", "conv_out"}
    assert all(name.startswith(("decoder.up_blocks.0.", "decoder.conv_out.")) for name in new)
    changed = {name for name in weights.keys() - new if weights[name].shape != expected[name].shape}
    assert {name.rpartition(".")[0] for name in changed} == {"decoder.norm_out"}
    assert all(
        torch.equal(weights[name], expected[name]) for name in weights.keys() - new - changed
    )
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(finer.encode(pixels).latent, vae.encode(pixels).latent)
    assert finer.decode(finer.encode(pixels).latent).sample.shape == pixels.shape
    assert recipe.with_full_resolution(finer) is finer


def test_errors_at_edges_count_more():
    recipe = load("box/train_autoencoder.py")
    target = torch.zeros(1, 3, 4, 6)
    target[..., 3:] = 1.0
    target += 0.01 * torch.arange(4.0)[:, None]  # a gradient has no edge
    for pictures in (target, target.transpose(2, 3)):
        edges = recipe.at_edges(pictures)
        at = edges[0, 0] if pictures is target else edges[0, 0].T
        assert at.tolist() == [[0, 0, 1, 1, 0, 0]] * 4
        near, far = (
            [
                recipe.reconstruction_loss(pictures + 0.1 * where, pictures, 1.0, weight).item()
                for weight in (0.0, 10.0)
            ]
            for where in (edges, 1.0 - edges)
        )
        assert near[1] / near[0] > 8 > 5 > far[1] / far[0]


def test_both_compact_runs_have_the_same_shape():
    shape = json.loads((ROOT / "recipes/compact/shape.json").read_text())
    box = json.loads((ROOT / "localdit/box/transformer/config.json").read_text())
    with torch.device("meta"):
        new, trained = (LocalDiTTransformer2DModel.from_config(one) for one in (shape, box))
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (new, trained)]
    different = {n for n, size in shapes[0].items() if shapes[1][n] != size}
    assert different == {"pos_embed.proj.weight"}  # 32 channels either way, but in other patches
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


def test_a_comparison_scores_anew_with_other_settings(monkeypatch, tmp_path):
    compare, box = load("compact/compare.py"), load("box/score.py")
    calls = []

    def run(command, **_):
        options = dict(zip(command[2::2], command[3::2], strict=True))
        folder = options.pop("--output")
        argv = ["score.py", *itertools.chain(*options.items()), "--output", str(folder)]
        monkeypatch.setattr(sys, "argv", argv)
        known = vars(box.parse_args())
        calls.append(known)
        report = {"settings": known, "pictures": [{"score": {"all": True}}]}
        (folder / "score.json").write_text(json.dumps(report, default=str))

    monkeypatch.setattr(compare.subprocess, "run", run)
    settings = {"side": 256, "count": 200, "num_inference_steps": 20, "guidance_scale": 2.0}
    (tmp_path / "score.json").write_text('{"count": 200, "pictures": []}')  # of older scripts
    for changes in ({}, {}, {"guidance_scale": 3.0}, {"num_inference_steps": 4}, {"side": 64}):
        args = Namespace(**settings | changes)
        assert compare.score(tmp_path / "checkpoint-1", tmp_path, args) == 1
    compare.score(tmp_path / "other/checkpoint-1", tmp_path, args)
    assert [call["guidance_scale"] for call in calls] == [2, 3, 2, 2, 2]
    assert calls[-1]["pipeline"] == tmp_path / "other/checkpoint-1"


def test_scores_of_the_study_are_kept_for_their_settings_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/study"))
    score = load("study/score.py")
    monkeypatch.setattr(score, "report", lambda drawn, *_: {"right": {}, "distances": {}})
    path = tmp_path / "scores/true-pictures-0.json"

    def scored(*more):
        argv = ["score.py", "--output", str(tmp_path), "--count", "2", *more]
        monkeypatch.setattr(sys, "argv", argv)
        before = path.stat().st_mtime_ns if path.is_file() else None
        with contextlib.suppress(SystemExit):
            score.main()
        return path.stat().st_mtime_ns != before

    path.parent.mkdir()
    path.write_text('{"steps": {}, "time": {}}')  # of older scripts
    assert [scored(), scored()] == [True, False]
    assert [scored("--guidance-scale", "3"), scored("--guidance-scale", "3")] == [True, False]
    assert [scored("--real", "9"), scored("--real", "9")] == [True, False]


def test_an_ablation_of_other_settings_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/study"))
    monkeypatch.delitem(sys.modules, "score", raising=False)  # that of another recipe
    ablation = load("study/ablation.py")
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--output", str(tmp_path)])
    args = ablation.parse_args()
    args.pictures = None
    figures = dict.fromkeys(ablation.DIGITS, 1.0)
    chosen = ablation.score.settings(args, "model", "steps", "batch_size", "learning_rate")
    path = tmp_path / "ablation/AdamW-0.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": chosen, **figures}))
    assert ablation.measure("AdamW", 0, args) == figures
    args.steps = 7
    with pytest.raises(SystemExit, match="AdamW-0.json was measured with the settings .* Give the"):
        ablation.measure("AdamW", 0, args)


@pytest.fixture(scope="module")
def study():
    return load("study/scenes.py")


def test_true_drawings_of_the_study_are_right(study):
    for scene in study.sample_many(100, 1):
        assert study.is_right(study.draw(scene), scene), scene


OPPOSITE = [("red", 1, 0), ("blue", 12, 13)]
ACROSS = [("red", 1, 3), ("red", 12, 9)]
TWO = [("red", 1, 1), ("red", 6, 6)]
MIRROR = [("red", 0, 1), ("blue", 4, 6), ("red", 13, 1), ("blue", 9, 6)]


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("corners", OPPOSITE, [("red", 1, 0), ("blue", 12, 0)]),
        ("corners", OPPOSITE, [("red", 1, 0), ("green", 12, 13)]),
        ("pair", ACROSS, [("red", 1, 3), ("green", 12, 9)]),
        ("pair", ACROSS, [("red", 1, 3), ("red", 1, 9)]),
        ("count", TWO, [*TWO, ("red", 11, 11)]),
        ("count", TWO, [("red", 1, 1), ("black", 6, 6)]),
        ("mirror", MIRROR, MIRROR[:3]),
        ("mirror", MIRROR, [*MIRROR[:3], ("blue", 9, 9)]),
        ("mirror", MIRROR, [*MIRROR[:3], ("red", 9, 6)]),
    ],
)
def test_objects_of_the_study_are_judged_by_number_colour_and_place(study, task, right, wrong):
    asked = study.Study(task, tuple(study.Square(*one) for one in right))
    for objects, verdict in ((right, True), (wrong, False)):
        drawn = study.Study("", tuple(study.Square(*one) for one in objects))
        assert study.is_right(study.draw(drawn), asked) is verdict


@pytest.mark.parametrize(
    ("box", "colour"),
    [((7, 1, 9, 3), "white"), ((1, 1, 15, 3), "blue"), ((4, 3, 12, 4), "red")],
    ids=["a gap", "two colours", "a thicker side"],
)
def test_a_broken_frame_is_wrong(study, box, colour):
    asked = study.Study("frame", frame=("red", 1, 2))
    picture = study.draw(asked)
    assert study.is_right(picture, asked)
    picture.paste(PALETTE[colour], box)
    assert not study.is_right(picture, asked)


def test_the_autoencoder_of_the_study_changes_nothing():
    space = LatentSpace(load("study/write_autoencoder.py").build_autoencoder())
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        decoded = (space.decode(space.encode_pixels(pixels)) + 1) * 127.5
    torch.testing.assert_close(decoded, pixels.float(), atol=0.1, rtol=0)


def test_variants_are_scored_at_equal_steps_and_at_equal_time():
    scored = load("study/variants.py").scored_steps({"cheap": 50.0, "dear": 80.0}, 400)
    assert scored == {"cheap": {"steps": 400, "time": 400}, "dear": {"steps": 400, "time": 240}}


def test_the_interval_over_three_seeds_is_students():
    mean, half = load("study/report.py").interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(2.484, abs=1e-3))  # 4.303 / sqrt(3)


def test_the_interval_of_one_seed_is_over_captions_and_pairs_them():
    half = load("study/report.py").over_captions
    right = {"pair": [True] * 50 + [False] * 50, "count": [True] * 100}
    wrong = {"pair": [False] * 100, "count": [True] * 100}
    expected = 196 * (25 / 99 / 100) ** 0.5
    assert half(right) == pytest.approx(
        {"pair": expected, "count": 0, "all tasks": expected / 2}, abs=1e-9
    )
    assert half(right, right)["pair"] == 0
    assert half(right, wrong)["pair"] == pytest.approx(expected)


def test_the_ablation_compares_seed_by_seed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "recipes/study"))
    ablation = load("study/ablation.py")
    figures = dict.fromkeys(ablation.DIGITS, 1.0)
    losses = {"AdamW": (1.0, 5.0), "Muon": (0.5, 4.3)}
    results = {name: [figures | {"loss": loss} for loss in own] for name, own in losses.items()}
    (row,) = (line for line in ablation.table(results).splitlines() if "Muon" in line)
    # Differences of -0.5 and -0.7: a mean of -0.6, and 12.706 times a standard error of 0.1.
    assert row.endswith("| -0.6000 ± 1.2706 |")
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- ablation -->\nold\n<!-- end of ablation -->\nbelow\n")
    ablation.write_into(page, "ablation", "new\n")
    assert page.read_text() == ("above\n<!-- ablation -->\nnew\n<!-- end of ablation -->\nbelow\n")
    with pytest.raises(SystemExit, match="has no comments <!-- results -->"):
        ablation.write_into(page, "results", "new\n")


@pytest.fixture
def emoji_package(tmp_path):
    sheet = Image.new("RGBA", (36, 18))
    sheet.paste((255, 0, 0, 255), (19, 1, 27, 17))  # left half of the second emoji
    entries = [
        {
            "name": "HEART",
            "sheet_x": 1,
            "sheet_y": 0,
            "category": "Symbols",
            "has_img_google": True,
        },
        {
            "name": "STAR",
            "sheet_x": 0,
            "sheet_y": 0,
            "category": "Symbols",
            "has_img_google": False,
        },
    ]
    with BytesIO() as png:
        sheet.save(png, "PNG")
        files = {
            "emoji.json": json.dumps(entries).encode(),
            "img/google/sheets/16.png": png.getvalue(),
        }
    path = tmp_path / "emoji-datasource-google-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return path


def test_emoji_are_cut_from_their_sheet_on_white(emoji_package):
    ((is_held_out, example),) = load("study/pictures.py").emoji(emoji_package)
    assert is_held_out
    assert example[1:] == ("heart, noto", "Symbols")
    pixels = np.asarray(example.picture)
    assert (pixels[:, :8] == (255, 0, 0)).all() and (pixels[:, 8:] == 255).all()


def test_packages_of_unknown_emoji_are_refused(emoji_package):
    other = emoji_package.rename(emoji_package.with_name("emoji-datasource-apple-1.0.0.tgz"))
    with pytest.raises(ValueError, match="apple.*expected a package of google or twitter emoji"):
        list(load("study/pictures.py").emoji(other))


def test_parts_of_photographs_take_turns_and_come_back(tmp_path):
    study = load("study/pictures.py")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (150, 200, 3), np.uint8))
    photographs = {"noise": noise, "chelsea": Image.new("RGB", (160, 160), "blue")}
    parts = list(study.photograph_parts(photographs, 4, seed=1))
    assert [part.label for part in parts] == ["noise", "chelsea"] * 2
    assert parts[1].caption == "a part of a photograph, cat"
    assert (np.asarray(parts[1].picture) == (0, 0, 255)).all()
    assert (np.asarray(parts[0].picture) != np.asarray(parts[2].picture)).any()
    study.write(parts, tmp_path)
    for part, again in zip(parts, study.read(tmp_path), strict=True):
        assert again[1:] == part[1:]
        assert (np.asarray(again.picture) == np.asarray(part.picture)).all()


def test_a_finished_part_of_a_recipe_is_kept_for_its_settings_alone(tmp_path):
    def once(*command):
        script = f'set -eu; out="{tmp_path}"; . recipes/once.sh; once part "$@"; echo goes on'
        return subprocess.run(
            ["bash", "-c", script, "bash", *command], cwd=ROOT, capture_output=True, text=True
        )

    assert once("false").returncode == 1  # not finished
    assert once("echo", "8").stdout == "8\ngoes on\n"
    assert once("echo", "8").stdout == "goes on\n"
    other = once("echo", "16")
    assert (other.returncode, other.stdout) == (1, "")
    assert "made with other settings:\n  echo 8\nnow: echo 16\nGive the same" in other.stderr
    (tmp_path / "part.done").write_text("")  # as earlier versions left it
    assert once("echo", "16").stdout == "goes on\n"


DRAWING = ["box/draw_scenes.py", "lora/draw_frames.py", "photographs/collect.py", "study/scenes.py"]


@pytest.mark.parametrize("path", DRAWING)
def test_recipes_draw_into_no_folder_of_other_files(path, tmp_path, monkeypatch):
    (tmp_path / "metadata.jsonl").write_text("mine")
    monkeypatch.setattr(sys, "argv", [path, "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="has files that this version did not draw"):
        load(path).main()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("path", ["box/draw_scenes.py", "lora/draw_frames.py", "study/scenes.py"])
def test_recipes_draw_at_least_one_picture(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [path, "--output", str(tmp_path / "data"), "--count", "-1"])
    with pytest.raises(ValueError, match="is -1; expected at least 1"):
        load(path).main()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("path", ["box/draw_scenes.py", "lora/draw_frames.py"])
def test_drawn_data_is_listed_once_all_of_it_is_there(path, tmp_path, monkeypatch):
    recipe = load(path)
    monkeypatch.setattr(recipe, "Pool", ThreadPool, raising=False)
    metadata = tmp_path / "data/metadata.jsonl"

    def draw(count):
        argv = [path, "--output", f"{tmp_path}/data", "--count", str(count), "--side", "32"]
        monkeypatch.setattr(sys, "argv", argv)
        recipe.main()

    for count in (3, 2):  # fewer pictures leave none of the former ones in the list
        draw(count)
        assert len(find_samples(tmp_path / "data").samples) == count
    monkeypatch.setattr("localdit.scenes.describe_often", None)
    with pytest.raises(TypeError):
        draw(3)
    assert not metadata.exists()
