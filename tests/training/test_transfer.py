import json
import math
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import PixArtTransformer2DModel

from localdit import LocalDiTPipeline
from localdit.checkpoint import convert_to_single_file
from localdit.core.latents import LatentFormat
from localdit.models import LocalDiTTransformer2DModel
from localdit.training.encode.__main__ import main as encode
from localdit.training.initialization import initialize_weights
from localdit.training.options import parse_args
from localdit.training.transfer import LATENT_LAYERS, start_from_other_latents
from tests.tiny import tiny_pipeline
from tests.training.workplace import lines, load_main, make_workplace, options, weights

COMPACT = LatentFormat(channels=32, pixels_per_latent=32)
SIDE = 128  # of the pictures to train on


def make_localdit(**overrides):
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 2, "sample_size": 16,
        "window_size": 2, "caption_channels": 16, "use_additional_conditions": True,
    }  # fmt: skip
    model = LocalDiTTransformer2DModel(**settings | overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def transferred(trained, latents=COMPACT, patch_size=1, image_size=SIDE):
    return start_from_other_latents(trained, "source", latents, patch_size, image_size)


@pytest.mark.parametrize(
    "overrides", [{}, {"use_global": True}, {"layer_types": ["full", "local"]}], ids=str
)
def test_all_weights_but_the_layers_for_latents_are_the_same_bits(overrides):
    trained = make_localdit(**overrides)
    transformer, report = transferred(trained)
    before, after = trained.state_dict(), transformer.state_dict()
    assert before.keys() == after.keys() == {*report.copied, *report.fresh}
    assert all(torch.equal(before[name], after[name]) for name in report.copied)
    assert set(report.fresh) == {
        "pos_embed.proj.weight", "pos_embed.proj.bias", "proj_out.weight", "proj_out.bias",
    }  # fmt: skip
    assert not any(tensor.is_meta for tensor in (*after.values(), *transformer.buffers()))
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    kept = transformer.config
    changed = {"in_channels", "out_channels", "patch_size", "sample_size", "interpolation_scale"}
    assert all(kept[n] == v for n, v in trained.config.items() if n not in changed and n[0] != "_")
    assert {name: kept[name] for name in changed} == {
        "in_channels": 32, "out_channels": 32, "patch_size": 1, "sample_size": 4,
        "interpolation_scale": 0.5,
    }  # fmt: skip


def test_new_layers_start_as_in_a_new_model():
    transformer, _ = transferred(make_localdit())
    patches = transformer.pos_embed.proj
    assert patches.weight.shape == (96, 32, 1, 1)
    bound = math.sqrt(6 / (96 + 32))
    assert bound * 0.95 < patches.weight.abs().max() <= bound
    for zero in (patches.bias, transformer.proj_out.weight, transformer.proj_out.bias):
        assert (zero == 0).all()
    assert transformer.proj_out.weight.shape == (32, 96)
    new = LocalDiTTransformer2DModel(**{n: v for n, v in transformer.config.items() if n[0] != "_"})
    initialize_weights(new)
    assert new.pos_embed.proj.weight.std().item() == pytest.approx(
        patches.weight.std().item(), rel=0.1
    )


@pytest.mark.parametrize(
    ("sample_size", "scale", "latents", "patch_size", "image_size", "expected"),
    [
        (128, None, COMPACT, 1, 1024, 1),  # the released model: 64 tokens over 0 to 32
        (128, None, COMPACT, 1, 2048, 2),
        (128, None, LatentFormat(32, 16), 1, 1024, 2),  # tokens of the same pixels
        (128, None, LatentFormat(16, 8), 2, 1024, 2),
        (16, None, COMPACT, 1, 256, 1),  # the model in the box: 8 tokens over 0 to 8
        (64, 4.0, COMPACT, 1, 512, 2),
    ],
)
def test_a_picture_spans_the_same_positions(
    sample_size, scale, latents, patch_size, image_size, expected
):
    trained = make_localdit(sample_size=sample_size, interpolation_scale=scale, num_layers=1)
    transformer, _ = transferred(trained, latents, patch_size, image_size)
    assert transformer.config.interpolation_scale == expected
    ends = []
    for model in (trained, transformer):
        embed = model.pos_embed
        ends.append(embed.base_size / embed.interpolation_scale)
    assert ends[0] == ends[1]
    transformer.set_sample_size(transformer.config.sample_size)  # as training does
    assert transformer.pos_embed.interpolation_scale == expected


def test_conditions_on_the_size_are_kept():
    released = make_localdit(sample_size=128, use_additional_conditions=None)
    without = make_localdit(sample_size=16, use_additional_conditions=None)
    assert transferred(released)[0].use_additional_conditions
    assert not transferred(without)[0].use_additional_conditions


def test_the_report_says_what_is_new():
    _, report = transferred(make_localdit(sample_size=128))
    text = str(report)
    assert text.startswith("Started from LocalDiT, source\n")
    assert "fresh: 4 parameters (pos_embed.proj.weight" in text
    assert "32 channels, 32 x 32 pixels each; a token is 32 x 32 pixels, a window 64 x 64" in text
    assert "before: 4 channels, tokens of 2 x 2 latents" in text
    assert "a picture of 128 x 128 pixels spans 0 to 32" in text
    assert "interpolation_scale is 0.125" in text


# In train.py


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Pictures and the encoders of compact latents; transformers for other latents."""
    folder = make_workplace(tmp_path_factory.mktemp("compact"), "dc")
    trained = tiny_pipeline(seed=3)
    trained.save_pretrained(folder / "other")
    convert_to_single_file(trained.transformer, folder / "other.safetensors")
    PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=3, cross_attention_dim=24,
        sample_size=8, caption_channels=16, out_channels=8, use_additional_conditions=True,
    ).save_pretrained(folder / "pixart/transformer")  # fmt: skip
    return folder


@pytest.fixture
def train(workplace, tmp_path, monkeypatch):
    main = load_main()

    def run(name, *more, expect=0):
        AcceleratorState._reset_state(reset_partial_state=True)
        common = ["--image-size", SIDE, "--max-train-steps", 3, "--max-upscale", 3]
        argv = ["train.py", *options(workplace, tmp_path / name, *common, *more)]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == expect
        return tmp_path / name

    return run


def config_of(pipeline):
    return json.loads((pipeline / "transformer/config.json").read_text())


@pytest.mark.parametrize(
    "source",
    ["other/transformer", pytest.param("other.safetensors", marks=pytest.mark.slow)],
)
def test_training_starts_from_a_transformer_of_other_latents(train, workplace, source, capsys):
    """It keeps the weights, resumes to the same bits, and leaves pipelines that draw."""
    start = ["--transformer", workplace / source, "--new-latents", 1]
    still = train("still", *start, "--learning-rate", "1e-12", "--max-train-steps", 1)
    assert "Started from LocalDiT" in capsys.readouterr().out
    expected = tiny_pipeline(seed=3).transformer.state_dict()
    found = {name: tensor for (_, name), tensor in weights(still / "final/transformer").items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.startswith(LATENT_LAYERS):
            assert torch.allclose(found[name], tensor, atol=1e-9), name
    config = config_of(still / "final")
    assert (config["in_channels"], config["out_channels"], config["patch_size"]) == (32, 32, 1)
    assert (config["sample_size"], config["interpolation_scale"]) == (4, 1)

    whole = train("whole", *start, "--save-interval", 2)
    train("part", *start, "--max-train-steps", 2)
    part = train("part", *start, "--resume", "auto")
    after, resumed = weights(whole / "final"), weights(part / "final")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in after.items())
    assert lines(whole)[-1]["loss"] == lines(part)[-1]["loss"]
    pipeline = LocalDiTPipeline.from_pretrained(whole / "final")
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a red picture", num_inference_steps=2).images
    assert image.size == (SIDE, SIDE)
    # The result is a transformer of its latents: it trains on without the option.
    train("on", "--transformer", whole / "final/transformer")


def test_training_starts_from_a_pixart_of_other_latents(train, workplace, capsys):
    shape = ["--transformer-config", workplace / "shape.json"]
    pixart = ["--transformer", workplace / "pixart", *shape]
    run = train("run", *pixart, "--new-latents", 1, "--learning-rate", "1e-12")
    out = capsys.readouterr().out
    assert "Started from PixArt" in out and "a token is 32 x 32 pixels" in out
    assert "pos_embed.proj.weight" in out.split("fresh:")[1].split("\n")[0]
    theirs = PixArtTransformer2DModel.from_pretrained(workplace / "pixart/transformer").state_dict()
    ours = {name: tensor for (_, name), tensor in weights(run / "final/transformer").items()}
    for ours_name, theirs_name in [
        ("transformer_blocks.0.ff.net.2.weight", "transformer_blocks.0.ff.net.2.weight"),
        ("transformer_blocks.1.attn2.to_k.weight", "transformer_blocks.2.attn2.to_k.weight"),
        ("scale_shift_table", "scale_shift_table"),
    ]:
        assert torch.allclose(ours[ours_name], theirs[theirs_name], atol=1e-8), ours_name
    assert ours["pos_embed.proj.weight"].shape == (24, 32, 1, 1)
    assert ours["proj_out.weight"].abs().max() < 1e-8
    train("no", *pixart, expect=1)
    assert "for the latents of another VAE, give --new-latents" in capsys.readouterr().err


def test_encoded_data_of_other_latents_trains(train, workplace, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    encode([
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        "--output", f"{tmp_path}/encoded", "--image-size", str(SIDE), "--window-size", "2",
        "--num-workers", "0", "--max-upscale", "3", "--patch-size", "1", "--crop", "center",
    ])  # fmt: skip
    start = ["--transformer", workplace / "other/transformer", "--new-latents", 1]
    direct = train("direct", *start, "--crop", "center")
    ahead = train("ahead", *start, "--data-root", tmp_path / "encoded")
    for a, b in zip(lines(direct), lines(ahead), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # text in bfloat16


def test_positions_follow_the_largest_stage(train, workplace, tmp_path):
    stages = [{"image-size": 64, "max-train-steps": 2}, {"image-size": 128, "max-train-steps": 1}]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    run = train(
        "run", "--transformer", workplace / "other/transformer", "--new-latents", 1,
        "--stages", tmp_path / "stages.json", "--save-interval", 2,
    )  # fmt: skip
    for name, side in (("checkpoint-2", 2), ("final", 4)):
        config = config_of(run / name)
        assert (config["sample_size"], config["interpolation_scale"]) == (side, 1)


def test_other_latents_are_refused_without_the_option(train, workplace, capsys):
    train("run", "--transformer", workplace / "other/transformer", expect=1)
    error = capsys.readouterr().err
    assert "takes latents of 4 channels, the VAE gives 32" in error
    assert "--new-latents" in error


def test_a_teacher_of_other_latents_is_refused(train, workplace, capsys):
    teacher = workplace / "other/transformer"
    train(
        "run", "--method", "knowledge-distillation", "--teacher", teacher, "--transformer", teacher,
        "--new-latents", 1, expect=1,
    )  # fmt: skip
    assert "VAE gives 32: name a teacher of these latents" in capsys.readouterr().err


def test_a_run_is_resumed_with_the_same_patches(train, workplace, capsys):
    start = ["--transformer", workplace / "other/transformer"]
    run = train("run", *start, "--new-latents", 1)
    train("run", "--transformer", run / "final/transformer", "--resume", "auto", expect=1)
    assert "of a run with --new-latents 1, not without --new-latents" in capsys.readouterr().err


def test_picture_sizes_are_multiples_of_the_new_tokens(train, workplace, capsys):
    start = ["--transformer", workplace / "other/transformer", "--new-latents", 4]
    train("run", *start, "--image-size", 96, expect=1)
    assert "expected a multiple of 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "name them with --transformer"),
        (["--transformer", ".", "--lora-rank", "4"], "leave out one of them"),
        (["--transformer", ".", "--new-latents", "0"], "--new-latents is 0; expected more than 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--data-root", "x", "--new-latents", "1", *more])
    assert message in capsys.readouterr().err
