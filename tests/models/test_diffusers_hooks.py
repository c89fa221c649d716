"""Adapters on every layer of the transformer: called in bands and in training, and fused."""

import copy

import pytest
import torch
from torch import nn

from localdit.models import cpu
from tests.models import test_transformer
from tests.models.test_transformer import make, run

peft = pytest.importorskip("peft")

SHAPE = {"use_global": True, "num_layers": 3, "layer_types": ["local_global", "local", "full"]}
TARGETS = [
    name
    for name, module in make(**SHAPE).named_modules()
    if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1
]
ATTENTION = ["to_qkv", "to_q", "to_k", "to_v", "to_out.0"]


def inputs(height=16, width=16):
    """Compare in float64, with a tolerance for rounding only."""
    return test_transformer.inputs(height, width, dtype=torch.float64)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def adapted(targets, rank=2, alpha=5.0):
    """A model with an adapter of random weights, and the same model without."""
    bare = make(**SHAPE).double()
    model = copy.deepcopy(bare)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False
    )
    model.add_adapter(config)
    return model.double().eval(), bare


def merged_by_hand(model, bare, scale=1.0):
    """The model without an adapter whose weights are `W + scale alpha / r B A`."""
    merged = copy.deepcopy(bare)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, module in merged.named_modules():
            if hasattr(layers[name], "lora_A"):
                a, b = (
                    getattr(layers[name], half)["default"].weight for half in ("lora_A", "lora_B")
                )
                change = torch.tensordot(b.flatten(1), a, dims=1)
                module.weight += scale * layers[name].scaling["default"] * change
    return merged


def test_all_kinds_of_layers_are_among_the_targets():
    kinds = {name.split(".", 2)[-1] for name in TARGETS if name.startswith("transformer_blocks.0")}
    assert kinds == {
        "attn1.to_qkv",
        "attn1.to_out.0",
        "attn1.global_context.to_global_kv",
        *(
            f"attn1.global_context.query_feat_extract.{i}.conv.{layer}"
            for i in range(2)
            for layer in ("2.fc.0", "2.fc.2", "3")
        ),
        *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_the_adapter_of_each_layer_changes_the_picture_and_learns(target):
    model, bare = adapted(target.replace(".", "[.]"))
    change = run(model, **inputs(8, 8)) - run(bare, **inputs(8, 8))
    assert change.abs().max() > 1e-7
    model(**inputs(8, 8)).sample.square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == {target}
    assert all(grad.abs().max() > 0 for grad in trained.values())


def test_adapters_on_all_layers_are_a_change_of_their_weights(monkeypatch):
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 60 * 24 * 4)  # blocks in bands, and a map of several
    model, bare = adapted(TARGETS)
    given = inputs(26, 14)
    expected = run(merged_by_hand(model, bare), **given)
    assert (expected - run(bare, **given)).abs().max() > 0.1
    close(run(model, **given), expected)
    monkeypatch.undo()
    close(model(**given).sample, expected)


def test_fusing_an_adapter_keeps_the_result_and_can_be_undone():
    model, bare = adapted(TARGETS)
    given = inputs(16, 16)
    apart = run(model, **given)
    weight = model.transformer_blocks[0].attn1.to_qkv.base_layer.weight
    before = weight.clone()
    model.fuse_lora()
    assert not torch.equal(weight, before)
    close(run(model, **given), apart)
    model.unfuse_lora()
    close(weight, before)
    close(run(model, **given), apart)


def test_fusing_projections_leaves_adapters_alone():
    model, _ = adapted(ATTENTION)
    apart = run(model, **inputs())
    model.fuse_qkv_projections()
    assert torch.equal(run(model, **inputs()), apart)


def test_adapters_work_in_fused_projections_and_leave_them_fused():
    model, bare = adapted(["to_k", "to_v"])
    fused = copy.deepcopy(bare)
    fused.fuse_qkv_projections()
    without = run(fused, **inputs())
    fused.add_adapter(model.peft_config["default"])
    missing = fused.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert all("to_kv" in name for name in missing)
    close(run(fused, **inputs()), run(model, **inputs()))
    fused.unload_lora()
    assert torch.equal(run(fused, **inputs()), without)


def test_fused_adapters_stay_in_fused_projections_after_unloading():
    model, _ = adapted(["to_k", "to_v"])
    fused = copy.deepcopy(model)
    fused.unload_lora()
    fused.fuse_qkv_projections()
    fused.add_adapter(model.peft_config["default"])
    fused.load_state_dict(model.state_dict(), strict=False)
    fused.fuse_lora()
    fused.unload_lora()
    close(run(fused, **inputs()), run(model, **inputs()))


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_a_scale_holds_for_one_call(scale):
    model, bare = adapted(ATTENTION)
    layer = model.transformer_blocks[0].attn1.to_qkv
    layer.set_scale("default", 0.7)
    scaling, full = layer.scaling["default"], run(model, **inputs())
    arguments = inputs() | {"cross_attention_kwargs": {"scale": scale}}
    expected = run(merged_by_hand(model, bare, scale), **inputs())
    close(run(model, **arguments), expected)
    assert layer.scaling["default"] == scaling
    assert torch.equal(run(model, **inputs()), full)
    with pytest.raises(ValueError, match="nor anything in `cross_attention_kwargs` but 'scale'"):
        run(model, **arguments | {"cross_attention_kwargs": {"scale": scale, "other": 1}})
    assert layer.scaling["default"] == scaling


def test_recomputed_blocks_give_adapters_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        model, _ = adapted(ATTENTION)
        if recompute:
            model.enable_gradient_checkpointing()
        model.train()(**inputs()).sample.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        close(one, other)
