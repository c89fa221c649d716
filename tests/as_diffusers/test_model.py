"""The requirements of Diffusers' shared tests of models."""

import inspect
import json

import pytest
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel
from torch._dynamo.testing import CompileCounter

from localdit.models import (
    FullAttnProcessor,
    LocalAttnProcessor,
    LocalDiTTransformer2DModel,
    LocalGlobalAttnProcessor,
)
from tests.as_diffusers.cases import distance, scramble

LAYERS = {
    "local": {},
    "with global context": {"use_global": True},
    "with pooled keys": {"layer_types": "local_pooled"},
    "mixed": {"use_global": True, "layer_types": ["local", "local_global", "full"]},
}


def make(**options):
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 3,
        "sample_size": 8,
        "window_size": 2,
        "caption_channels": 16,
        "use_additional_conditions": True,
    }
    return scramble(LocalDiTTransformer2DModel(**settings | options)).eval()


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def model(request):
    return make(**request.param)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, 3:] = 0
    return {
        "hidden_states": torch.randn(2, 4, 6, 10, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 6, 16, generator=generator).to(dtype),
        "timestep": torch.tensor([7, 900]),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {
            "resolution": torch.tensor([[48.0, 80.0]] * 2),
            "aspect_ratio": torch.tensor([[80 / 48]] * 2),
        },
    }


@torch.no_grad()
def run(model, dtype=torch.float32):
    return model(**inputs(dtype), return_dict=False)[0]


# Calling


def test_the_call_is_that_of_diffusers_pixart():
    from diffusers import PixArtTransformer2DModel

    ours, theirs = (
        list(inspect.signature(kind.forward).parameters)
        for kind in (LocalDiTTransformer2DModel, PixArtTransformer2DModel)
    )
    assert ours == theirs


def test_the_same_input_gives_the_same_output(model):
    assert torch.equal(run(model), run(model))
    with torch.no_grad():
        assert torch.equal(run(model), model(**inputs()).sample)


def test_conditions_of_one_row_apply_to_the_batch(model):
    one_row = {name: rows[:1] for name, rows in inputs()["added_cond_kwargs"].items()}
    with torch.no_grad():
        output = model(**{**inputs(), "added_cond_kwargs": one_row}).sample
    assert torch.equal(output, run(model))


def test_attributes_of_the_configuration_are_deprecated_and_others_are_not(model, recwarn):
    model.of_my_own = 5
    assert model.of_my_own == 5
    assert model.save_pretrained is not None
    assert not [warning for warning in recwarn if "direct" in str(warning.message)]
    with pytest.warns(FutureWarning, match="config attribute"):
        assert model.num_layers == 3
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_saved_model_loads_unchanged(model, dtype, low_cpu_mem_usage, tmp_path):
    model.to(dtype)
    expected = run(model, dtype)
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(
        tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(run(loaded, dtype), expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_weights_load_unchanged(model, variant, parallel, tmp_path, monkeypatch):
    if parallel:
        monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    size = model.get_memory_footprint()
    model.save_pretrained(tmp_path, max_shard_size=int(0.4 * size), variant=variant)
    (index,) = tmp_path.glob("*.index*.json")
    files = set(json.loads(index.read_text())["weight_map"].values())
    assert len(files) >= 3
    assert files == {file.name for file in tmp_path.glob("*.safetensors")}
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(run(loaded), run(model))


def test_a_configuration_makes_the_same_model(model):
    again = LocalDiTTransformer2DModel.from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again.eval()), run(model))


# Training


def gradients(model):
    model.train()
    model(**inputs()).sample.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_weight_is_trained_with_and_without_gradient_checkpointing(model):
    plain = gradients(model)
    assert all(gradient is not None for gradient in plain.values())
    model.zero_grad()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_covers_the_blocks(model):
    calls = []

    def checkpoint(module, *args):
        calls.append(type(module).__name__)
        return module(*args)

    model.enable_gradient_checkpointing(checkpoint)
    gradients(model)
    assert calls == ["LocalDiTBlock"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_in_mixed_precision(model, dtype):
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(**inputs()).sample.square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype is torch.float32
        assert (parameter.grad - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-4, name


def test_diffusers_ema_follows_the_model(model, tmp_path):
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, LocalDiTTransformer2DModel)
    ema.copy_to(model.parameters())
    for old, average, again in zip(before, model.parameters(), loaded.shadow_params, strict=True):
        assert torch.equal(average, again)
        assert 0 <= distance(average, old) <= 1


# Attention


def test_processors_are_set_counted_and_reset(model):
    assert len(model.attn_processors) == 6
    expected, kinds = run(model), [type(p) for p in model.attn_processors.values()]
    model.set_attn_processor(FullAttnProcessor())
    assert distance(run(model), expected) > 1e-3
    model.set_default_attn_processor()
    assert [type(p) for p in model.attn_processors.values()] == kinds
    assert torch.equal(run(model), expected)
    one = dict(list(model.attn_processors.items())[:1])
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor(one)


def test_a_mixed_model_gets_its_default_processors_back():
    model = make(**LAYERS["mixed"])
    model.set_attn_processor(LocalAttnProcessor())
    model.set_default_attn_processor()
    own = [block.attn1.processor for block in model.transformer_blocks]
    kinds = [LocalAttnProcessor, LocalGlobalAttnProcessor, FullAttnProcessor]
    assert [type(processor) for processor in own] == kinds


def test_projections_are_fused_and_unfused(model, tmp_path):
    expected = run(model)
    model.fuse_qkv_projections()
    attentions = [m for m in model.modules() if isinstance(m, AttentionModuleMixin)]
    assert len(attentions) == 6
    assert all(m.fused_projections for m in attentions)
    assert all(hasattr(m, "to_qkv") or hasattr(m, "to_kv") for m in attentions)
    for attention in (block.attn2 for block in model.transformer_blocks):
        attention.to_k.weight.data.zero_()  # not read any more
    torch.testing.assert_close(run(model), expected)
    model.unfuse_qkv_projections()
    assert not any(m.fused_projections for m in attentions)
    assert not any(hasattr(m, "to_kv") for m in attentions)
    assert distance(run(model), expected) > 1e-3


def test_adapters_added_after_fusing_take_effect():
    peft = pytest.importorskip("peft")
    model = make()
    model.fuse_qkv_projections()
    expected = run(model)
    config = peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)
    model.add_adapter(config)
    assert distance(run(model), expected) > 1e-3


def test_backends_of_attention_are_chosen(model):
    expected = run(model)
    with attention_backend("_native_math"):
        within = run(model)
    model.set_attention_backend("_native_math")
    try:
        assert {p._attention_backend.value for p in model.attn_processors.values()} == {
            "_native_math"
        }
        assert torch.equal(run(model), within)
    finally:
        model.set_attention_backend("native")
    model.reset_attention_backend()
    torch.testing.assert_close(within, expected)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("no such one")


# Compiling to graphs; the compiler's backend is not tested


@pytest.fixture
def graphs():
    """Count the graphs of a test, apart from earlier and later ones."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="PyTorch counts the graphs of all blocks together",
)
def test_blocks_with_equal_shifts_share_a_graph(graphs):
    model = make()  # they shift by 0, 1, 0
    expected = run(model)
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(run(model), expected)
    assert graphs.frame_count == 2
