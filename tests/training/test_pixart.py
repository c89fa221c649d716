import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from localdit.models import LocalDiTTransformer2DModel
from localdit.training.initialization import initialize_weights
from localdit.training.pixart import is_pixart, spaced_blocks, start_from_pixart

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
    """A PixArt and the flat file that holds it."""
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
    """The model as it would be without norms and its input added in self-attention."""
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
