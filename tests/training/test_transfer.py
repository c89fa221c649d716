import json
import math
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from localdit import LocalDiTPipeline
from localdit.checkpoint import convert_to_single_file
from localdit.core.latents import LatentFormat
from localdit.models import LocalDiTTransformer2DModel
from localdit.training.encode.__main__ import main as encode
from localdit.training.initialization import initialize_weights
from localdit.training.options import parse_args
from localdit.training.transfer import (
    LATENT_LAYERS,
    is_pixart,
    spaced_blocks,
    start_from_other_latents,
    start_from_pixart,
)
from tests.tiny import tiny_pipeline
from tests.training.workplace import lines, load_main, make_workplace, options, weights

COMPACT = LatentFormat(channels=32, pixels_per_latent=32)
SIDE = 128  # of the pictures to train on


def make_trained(**overrides):
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
    trained = make_trained(**overrides)
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
    transformer, _ = transferred(make_trained())
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
    trained = make_trained(sample_size=sample_size, interpolation_scale=scale, num_layers=1)
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
    released = make_trained(sample_size=128, use_additional_conditions=None)
    without = make_trained(sample_size=16, use_additional_conditions=None)
    assert transferred(released)[0].use_additional_conditions
    assert not transferred(without)[0].use_additional_conditions


def test_the_report_says_what_is_new():
    _, report = transferred(make_trained(sample_size=128))
    text = str(report)
    assert text.startswith("Started from LocalDiT, source\n")
    assert "fresh: 4 parameters (pos_embed.proj.weight" in text
    assert "32 channels, 32 x 32 pixels each; a token is 32 x 32 pixels, a window 64 x 64" in text
    assert "before: 4 channels, tokens of 2 x 2 latents" in text
    assert "a picture of 128 x 128 pixels spans 0 to 32" in text
    assert "interpolation_scale is 0.125" in text


# From a PixArt


SHAPE = {"num_attention_heads": 3, "attention_head_dim": 8, "sample_size": 8}


def make_pixart(num_layers=4, **overrides):
    torch.manual_seed(0)
    settings = {
        **SHAPE,
        "num_layers": num_layers,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "out_channels": 8,
        "use_additional_conditions": True,
        **overrides,
    }
    model = PixArtTransformer2DModel(**settings)
    for parameter in model.parameters():  # the biases too
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_localdit(num_layers=4, **overrides):
    torch.manual_seed(1)
    settings = {"caption_channels": 16, "use_additional_conditions": True, "window_size": 2}
    model = LocalDiTTransformer2DModel(
        **{**SHAPE, **settings, **overrides, "num_layers": num_layers}
    )
    initialize_weights(model)
    return model.eval()


@pytest.fixture
def pixart(tmp_path):
    """A PixArt, and the flat file of its weights."""
    model = make_pixart()
    path = tmp_path / "pixart.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def inputs(text_tokens=5):
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 4, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, text_tokens, 16, generator=generator),
        "timestep": torch.tensor([10, 700]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[64.0, 96.0]] * 2),
            "aspect_ratio": torch.tensor([[1.5]] * 2),
        },
        "return_dict": False,
    }


def without_the_differences(model):
    """Remove the norms, and the input that self-attention adds, from a model."""
    for block in model.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            attn.norm_q = attn.norm_k = nn.Identity()
        block.attn1.register_forward_hook(lambda module, args, output: output - args[0])
    return model


def test_a_localdit_without_its_differences_is_the_pixart(pixart):
    model, path = pixart
    localdit = make_localdit(layer_types=["full"] * 4, do_rope=False)
    start_from_pixart(localdit, path)
    with torch.no_grad():
        expected = model(**inputs())[0][:, :4]  # noise, without the variance
        found = without_the_differences(localdit)(**inputs())[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_global_context_starts_without_effect(pixart):
    _, path = pixart
    local, with_global = make_localdit(), make_localdit(use_global=True)
    start_from_pixart(local, path)
    report = start_from_pixart(with_global, path)
    with torch.no_grad():
        expected, found = local(**inputs())[0], with_global(**inputs())[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any("query_feat_extract" in name for name in report.fresh)
    with_global(**inputs())[0].square().sum().backward()
    weight = with_global.transformer_blocks[0].attn1.global_context.to_global_kv.weight
    assert weight.grad.chunk(2)[1].abs().max() > 0  # it can learn


def test_blocks_are_evenly_spaced():
    chosen = spaced_blocks(28, 18)
    assert chosen == (0, 2, 3, 5, 6, 8, 10, 11, 13, 14, 16, 17, 19, 21, 22, 24, 25, 27)
    assert spaced_blocks(28, 28) == tuple(range(28))
    assert spaced_blocks(28, 1) == (0,)
    assert spaced_blocks(3, 5) == (0, 0, 1, 2, 2)
    for num_blocks in range(2, 28):
        chosen = spaced_blocks(28, num_blocks)
        assert len(set(chosen)) == num_blocks
        assert (chosen[0], chosen[-1]) == (0, 27)


def test_each_block_comes_from_the_one_reported(tmp_path):
    model = make_pixart(num_layers=5)
    model.save_pretrained(tmp_path)
    localdit = make_localdit(num_layers=3)
    report = start_from_pixart(localdit, tmp_path)
    assert report.blocks == (0, 2, 4)
    assert "blocks: 0, 2, 4 of 0 to 4" in str(report)
    for ours, number in zip(localdit.transformer_blocks, report.blocks, strict=True):
        theirs = model.transformer_blocks[number]
        torch.testing.assert_close(ours.ff.net[2].weight, theirs.ff.net[2].weight)
        torch.testing.assert_close(ours.scale_shift_table, theirs.scale_shift_table)
    ours = {name for name, _ in localdit.named_parameters()}
    assert set(report.copied) | set(report.fresh) == ours
    assert not set(report.copied) & set(report.fresh)
    fresh = {name.split(".", 2)[2] for name in report.fresh}
    assert fresh == {
        "attn1.norm_q.weight",
        "attn1.norm_k.weight",
        "attn2.norm_q.weight",
        "attn2.norm_k.weight",
        "attn1.local_rel_pos_bias",
    }


def test_blocks_can_be_taken_twice(pixart):
    model, path = pixart
    localdit = make_localdit(num_layers=7)
    report = start_from_pixart(localdit, path)
    assert report.blocks == (0, 0, 1, 2, 2, 2, 3)
    for ours, number in zip(localdit.transformer_blocks, report.blocks, strict=True):
        theirs = model.transformer_blocks[number].attn2.to_q.weight
        torch.testing.assert_close(ours.attn2.to_q.weight, theirs)


@pytest.mark.parametrize("layout", ["model", "pipeline", "shards", "half", "pt"])
def test_all_kinds_of_checkpoints_load_the_same_weights(pixart, tmp_path, layout):
    model, path = pixart
    expected = make_localdit()
    start_from_pixart(expected, path)
    source = tmp_path / "source"
    if layout == "pt":
        source.mkdir()
        torch.save({"state_dict": model.state_dict()}, source / "weights.pt")
        source = source / "weights.pt"
    elif layout == "pipeline":
        model.save_pretrained(source / "transformer")
    elif layout == "shards":
        model.save_pretrained(source, max_shard_size="50KB")
        assert len(list(source.glob("*.safetensors"))) > 1
    elif layout == "half":
        save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, tmp_path / "half")
        source = tmp_path / "half"
    else:
        model.save_pretrained(source)
    assert is_pixart(source)
    found = make_localdit()
    start_from_pixart(found, source)
    for (name, ours), (_, theirs) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        tolerance = 1e-2 if layout == "half" else 0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0, msg=name)


def test_size_conditions_are_copied_if_both_models_have_them(tmp_path):
    make_pixart(use_additional_conditions=False).save_pretrained(tmp_path)
    without, conditioned = make_localdit(use_additional_conditions=False), make_localdit()
    start_from_pixart(without, tmp_path)
    report = start_from_pixart(conditioned, tmp_path)
    assert any("resolution_embedder" in name for name in report.fresh)
    with torch.no_grad():  # the conditions start without effect
        found = conditioned(**inputs())[0]
        expected = without(**{**inputs(), "added_cond_kwargs": None})[0]
    torch.testing.assert_close(found, expected)

    make_pixart().save_pretrained(tmp_path)
    report = start_from_pixart(make_localdit(use_additional_conditions=False), tmp_path)
    assert len(report.unused) == 8
    assert "unused: 'adaln_single.emb." in str(report)


def test_noise_and_variance_are_copied_if_both_models_have_them(pixart):
    model, path = pixart
    localdit = make_localdit(out_channels=8)
    start_from_pixart(localdit, path)
    torch.testing.assert_close(localdit.proj_out.weight, model.proj_out.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_head_dim": 16}, r"with 'scale_shift_table \(2, 24\) instead of \(2, 48\)"),
        (
            {"caption_channels": 12},
            r"caption_projection.linear_1.weight \(24, 16\) instead of \(24, 12\)",
        ),
        ({"patch_size": 1}, r"pos_embed.proj.weight"),
        ({"caption_channels": None}, "tensors that a LocalDiT of this configuration lacks: 'cap"),
        ({"out_channels": 2}, r"proj_out.weight \(32, 24\) instead of \(8, 24\)"),
    ],
)
def test_other_shapes_are_named(pixart, settings, message):
    with pytest.raises(ValueError, match=message):
        start_from_pixart(make_localdit(**settings), pixart[1])


def test_missing_and_unknown_tensors_are_named(pixart, tmp_path):
    model, _ = pixart
    state = model.state_dict()
    path = tmp_path / "other.safetensors"
    save_file({k: v for k, v in state.items() if k != "transformer_blocks.2.ff.net.2.bias"}, path)
    with pytest.raises(ValueError, match=r"without 'transformer_blocks\.2\.ff\.net\.2\.bias'"):
        start_from_pixart(make_localdit(), path)
    save_file({**state, "transformer_blocks.1.attn3.to_q.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"lacks: 'transformer_blocks\.1\.attn3"):
        start_from_pixart(make_localdit(), path)
    save_file({**state, "pos_embed.pos_embed": torch.zeros(1, 16, 24)}, path)
    assert start_from_pixart(make_localdit(), path).unused == ("pos_embed.pos_embed",)


def test_another_number_of_heads_is_refused(tmp_path):
    make_pixart(num_attention_heads=2, attention_head_dim=12).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 attention heads, the LocalDiT has 3"):
        start_from_pixart(make_localdit(), tmp_path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no weights"):
        start_from_pixart(make_localdit(), tmp_path)
    assert not is_pixart(tmp_path)
    make_localdit().save_pretrained(tmp_path)
    assert not is_pixart(tmp_path)
    with pytest.raises(ValueError, match="is not a PixArt with Diffusers' names"):
        start_from_pixart(make_localdit(), tmp_path)
    with pytest.raises(FileNotFoundError):
        start_from_pixart(make_localdit(), tmp_path / "no.safetensors")


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


def test_a_resumed_run_keeps_its_scale_of_positions(train, workplace, tmp_path, capsys):
    start = ["--transformer", workplace / "other/transformer", "--new-latents", 1]
    run = train("run", *start, "--max-train-steps", 1)
    scale = config_of(run / "final")["interpolation_scale"]
    train("run", *start, "--image-size", 64, "--max-train-steps", 2, "--resume", "auto")
    assert config_of(run / "final")["interpolation_scale"] == scale
    assert (config_of(run / "final")["sample_size"], SIDE) == (2, 128)
    stages = [{"max-train-steps": 2}, {"image-size": 192, "max-train-steps": 1}]
    (tmp_path / "larger.json").write_text(json.dumps(stages))
    larger = ["--stages", tmp_path / "larger.json", "--resume", "auto"]
    train("run", *start, *larger)
    assert (config_of(run / "final")["interpolation_scale"], scale) == (1, 1)
    assert "picture of 192 x 192 pixels spans 0 to 6, one of" in capsys.readouterr().out


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
