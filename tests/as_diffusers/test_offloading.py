"""Offloading of weights, and casting layer by layer.

Offloading is meant for accelerators. Given the CPU as one its hooks do all that they do there, and
weights that lie ready for no one are turned to NaN here: whoever reads one past the hooks shows.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

from localdit.models import LocalDiTTransformer2DModel
from tests.as_diffusers.cases import KINDS, distance, draw
from tests.as_diffusers.cases import make as make_pipeline
from tests.as_diffusers.test_model import LAYERS, gradients, make, run

CPU = torch.device("cpu")


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def model(request):
    return make(**request.param)


@pytest.fixture
def poisoned(monkeypatch):
    """Set groups of weights to NaN while they are offloaded."""
    kept = {}

    def tensors(group):
        for module in group.modules:
            yield from module.parameters()
            yield from module.buffers()
        yield from (*group.parameters, *group.buffers)

    def offload(group):
        for tensor in tensors(group):
            if tensor.is_floating_point() and id(tensor) not in kept:
                kept[id(tensor)] = tensor, tensor.data
                tensor.data = torch.full_like(tensor.data, torch.nan)

    def onload(group):
        for tensor in tensors(group):
            if id(tensor) in kept:
                tensor.data = kept.pop(id(tensor))[1]

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    return kept


GROUPS = {
    "one block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "two blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaf": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups_of_weights_are_loaded_when_needed(model, poisoned, groups):
    expected = run(model)
    model.enable_group_offload(CPU, **groups)
    assert len(poisoned) == len(list(model.parameters()))
    assert torch.equal(run(model), expected)
    assert torch.equal(run(model), expected)
    assert len(poisoned) == len(list(model.parameters()))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups_of_weights_are_offloaded_to_disk(model, groups, tmp_path):
    expected = run(model)
    model.enable_group_offload(CPU, offload_to_disk_path=str(tmp_path), **groups)
    assert list(tmp_path.glob("*.safetensors"))
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_groups_and_casting_together(model, groups):
    expected = run(model)
    model.enable_group_offload(CPU, **groups)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert distance(run(model), expected) < 0.05 * expected.abs().max()


def test_each_module_loads_its_weights(model):
    """Between calls weights are on the meta device, where nothing can be computed with them."""
    expected = run(model)
    cpu_offload(model, execution_device=CPU)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(run(model), expected)


def test_weights_are_offloaded_to_disk(model, tmp_path):
    expected = run(model)
    disk_offload(model, tmp_path, execution_device=CPU)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("part", [0.5, 0.7, 0.9])
def test_a_model_is_spread_over_memory_and_disk(model, part, tmp_path):
    expected = run(model)
    most = {"cpu": int(part * model.get_memory_footprint())}
    weights, offloaded = tmp_path / "weights", tmp_path / "offloaded"
    model.save_pretrained(weights)
    loaded = LocalDiTTransformer2DModel.from_pretrained(
        weights, device_map="auto", max_memory=most, offload_folder=offloaded
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(run(loaded), expected)


def test_blocks_stay_whole_when_a_model_is_spread(model):
    """A block reads its table of shifts and scales in between its layers."""
    half = {0: model.get_memory_footprint() // 2, 1: model.get_memory_footprint()}
    places = infer_auto_device_map(model, half, no_split_module_classes=model._no_split_modules)
    assert set(places.values()) == {0, 1}
    assert all(name.count(".") <= 1 for name in places if name.startswith("transformer_blocks"))


def test_casting_stores_linear_layers_small_and_keeps_the_sensitive_ones(model):
    expected = run(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stored = {name: p.dtype for name, p in model.named_parameters()}
    small = {name for name, dtype in stored.items() if dtype is torch.float8_e4m3fn}
    assert any(".to_qkv." in name for name in small)
    assert not any("norm" in name or "pos_embed" in name or "adaln" in name for name in small)
    linear = sum(n.endswith("weight") and ("attn" in n or "ff" in n) for n in small)
    assert linear >= 3 * 7
    assert distance(run(model), expected) < expected.abs().max()


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_training_works_with_casting(storage):
    model = make()
    model.enable_layerwise_casting(storage, torch.float32)
    with torch.autocast("cpu"):
        assert all(g.isfinite().all() for g in gradients(model).values())


# Pipelines


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


def test_pipelines_offload_whole_models(kind):
    pipe = make_pipeline(kind)
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert distance(draw(pipe), expected) == 0
    models = {n for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    assert models == {"text_encoder", "transformer", "vae"}
    assert all(type(getattr(pipe, name)._hf_hook).__name__ == "CpuOffload" for name in models)


def test_pipelines_offload_module_by_module(kind):
    pipe = make_pipeline(kind, use_global=True)
    expected = draw(pipe)
    for name in ("text_encoder", "transformer", "vae"):
        cpu_offload(getattr(pipe, name), CPU, offload_buffers=True)
    for _ in range(2):
        assert distance(draw(pipe), expected) == 0


@pytest.mark.parametrize("excluded", [None, "vae", "text_encoder"])
def test_pipelines_offload_groups(kind, poisoned, excluded):
    pipe = make_pipeline(kind, use_global=True)
    expected = draw(pipe)
    pipe.enable_group_offload(CPU, CPU, offload_type="leaf_level", exclude_modules=excluded)
    assert len(poisoned) > 50
    for _ in range(2):
        assert distance(draw(pipe), expected) == 0


def test_single_components_of_a_pipeline_offload_groups(kind, poisoned):
    pipe = make_pipeline(kind)
    expected = draw(pipe)
    blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
    pipe.transformer.enable_group_offload(CPU, **blocks)
    apply_group_offloading(pipe.text_encoder, CPU, **blocks)
    assert distance(draw(pipe), expected) == 0


def test_pipelines_work_with_layerwise_casting(kind):
    pipe = make_pipeline(kind).to(dtype=torch.bfloat16)
    expected = draw(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert pipe.transformer.dtype is torch.bfloat16
    assert distance(draw(pipe), expected) < 0.2
