"""Names and shapes give the layout and the sizes of the model; foreign files are refused."""

import pytest
import torch

from localdit.checkpoint.layout import (
    Route,
    common_prefix,
    flat_name,
    our_name,
    read_layout,
)
from localdit.checkpoint.reading import TensorInfo

from .flat import flat_state, released_state, tiny_model


def infos(state):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}


def layout_of(state):
    return read_layout(infos(state), "w.pt")


def test_names_translate_both_ways():
    names = list(tiny_model(use_global=True).state_dict())
    flat = [flat_name(name) for name in names]
    assert [our_name(name) for name in flat] == names
    assert [our_name(name) for name in names] == names
    block = "transformer_blocks.1.attn1"
    assert f"{block}.processor.local_rel_pos_bias" in flat
    assert f"{block}.processor.query_feat_extract.1.conv.2.fc.0.weight" in flat
    assert not any("global_context" in name for name in flat)


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["module.a", "module.b"], "module."),
        (["module._orig_mod.a", "module._orig_mod.b"], "module._orig_mod."),
        (["_orig_mod.module.transformer.a"], "_orig_mod.module.transformer."),
        (["ema_model.module.a", "ema_model.module.b"], "ema_model.module."),
        (["module.a", "b"], ""),
        (["transformer_blocks.0.a"], ""),
    ],
)
def test_a_prefix_is_shared_by_all_names(names, prefix):
    assert common_prefix(names) == prefix


def test_sizes_follow_from_the_shapes():
    model = tiny_model(out_channels=8, window_size=3, patch_size=1, num_layers=3)
    facts = {name: each.value for name, each in layout_of(flat_state(model)).facts.items()}
    assert facts == {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "cross_attention_dim": 24,
        "patch_size": 1,
        "window_size": 3,
        "use_additional_conditions": True,
        "caption_channels": 6,
    }


def test_a_released_checkpoint_has_dead_tensors_and_leaves_attention_open():
    layout = layout_of(released_state(tiny_model()))
    assert layout.layer_types == [None, None]
    assert len(layout.dead) == 2 * 8
    assert "transformer_blocks.1.attn1.to_v.bias" in layout.dead
    assert "transformer_blocks.1.attn2.to_kv.weight" in layout.dead
    assert "window_size" not in layout.facts


def test_separate_projections_of_self_attention_are_fused():
    state = flat_state(tiny_model())
    fused = state.pop("transformer_blocks.0.attn1.to_qkv.weight")
    del state["transformer_blocks.0.attn1.to_qkv.bias"]
    for name in ("to_q", "to_k", "to_v"):
        state[f"transformer_blocks.0.attn1.{name}.weight"] = fused[:24]
        state[f"transformer_blocks.0.attn1.{name}.bias"] = fused[:24, 0]
    routes = layout_of(state).routes
    attn = "transformer_blocks.0.attn1."
    assert Route(f"{attn}to_k.bias", f"{attn}to_qkv.bias", (0, 1), (1, 3)) in routes

    del state[f"{attn}to_v.bias"]
    assert layout_of(state).missing == [f"{attn}to_v.bias"]


def test_a_stale_bias_does_not_replace_a_missing_fused_bias():
    state = released_state(tiny_model())
    del state["transformer_blocks.0.attn1.to_qkv.bias"]
    layout = layout_of(state)
    assert "transformer_blocks.0.attn1.to_q.bias" in layout.dead
    assert "transformer_blocks.0.attn1.to_qkv.bias" not in {r.target for r in layout.routes}


def test_a_fused_projection_of_the_text_is_split():
    state = released_state(tiny_model())
    for name in ("to_k", "to_v"):
        for kind in ("weight", "bias"):
            del state[f"transformer_blocks.0.attn2.{name}.{kind}"]
    routes = layout_of(state).routes
    attn = "transformer_blocks.0.attn2."
    assert Route(f"{attn}to_kv.weight", f"{attn}to_v.weight", (1, 2), (0, 1)) in routes


def edited(drop=(), **added):
    state = flat_state(tiny_model())
    for part in drop:
        state = {name: t for name, t in state.items() if part not in name}
    return {**state, **added}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (edited(drop=["norm_q", "norm_k"]), "is a PixArt checkpoint.*PixArtTransformer2DModel"),
        (edited(**{"blocks.0.lora_A": torch.ones(1)}), "LoRA weights"),
        ({"down_blocks.0.resnets.0": torch.ones(1)}, "not a LocalDiT.*found 'down_blocks.0"),
        (edited(drop=["transformer_blocks.0"]), "'transformer_blocks.1', but none of.*0"),
        (edited(drop=["pos_embed.proj.weight"]), "lacks 'pos_embed.proj.weight'"),
        (edited(**{"pos_embed.proj.weight": torch.ones(2)}), "'pos_embed.*expected 4 axes"),
        (edited(**{"proj_out.weight": torch.ones(15, 24)}), "'proj_out.weight' has 15 rows"),
        (
            edited(**{"transformer_blocks.0.attn1.norm_q.weight": torch.ones(7)}),
            "24 channels, which do not divide into heads of the 7",
        ),
        (
            edited(**{"transformer_blocks.0.attn1.processor.local_rel_pos_bias": torch.ones(8, 2)}),
            r"has 8 rows; expected \(2 w - 1\)\^2",
        ),
        (
            edited(**{"transformer_blocks.0.attn1.local_rel_pos_bias": torch.ones(9, 2)}),
            "'transformer_blocks.0.attn1.local_rel_pos_bias' twice",
        ),
    ],
)
def test_foreign_tensors_are_refused_by_name(state, message):
    with pytest.raises(ValueError, match=message):
        layout_of(state)
