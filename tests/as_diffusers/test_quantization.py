"""Linear layers quantized as Diffusers and Transformers do it, by torchao on a CPU."""

import pytest
import torch
from torch import nn

from localdit.models import LocalDiTTransformer2DModel
from tests.as_diffusers.cases import KINDS, distance, draw
from tests.as_diffusers.cases import make as make_pipeline
from tests.as_diffusers.test_model import LAYERS, inputs, make, run

ao = pytest.importorskip("torchao.quantization")
diffusers = pytest.importorskip("diffusers", minversion="0.36")
BF16 = torch.bfloat16
KEPT = ["pos_embed", "proj_out", "adaln_single"]


def quantized(folder, config=None, **options):
    config = config or ao.Int8WeightOnlyConfig()
    return LocalDiTTransformer2DModel.from_pretrained(
        folder,
        quantization_config=diffusers.TorchAoConfig(config, **options),
        torch_dtype=BF16,
    )


def is_quantized(layer):
    return type(layer.weight) is not nn.Parameter


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def folder(request, tmp_path):
    make(**request.param).save_pretrained(tmp_path / "exact")
    return tmp_path / "exact"


@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_every_linear_layer_is_quantized_and_the_output_stays_close(folder, config):
    exact = run(LocalDiTTransformer2DModel.from_pretrained(folder))
    model = quantized(folder, getattr(ao, config)())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 20
    assert all(map(is_quantized, linear))
    assert (run(model, BF16) - exact).norm() < 0.1 * exact.norm()


def test_layers_can_be_left_out(folder):
    model = quantized(folder, modules_to_not_convert=KEPT)
    assert not is_quantized(model.proj_out)
    assert not is_quantized(model.adaln_single.linear)
    assert is_quantized(model.transformer_blocks[0].attn1.to_qkv)


def test_a_quantized_model_is_saved_and_loaded_quantized(folder, tmp_path):
    model = quantized(folder)
    model.save_pretrained(tmp_path / "small")
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "small", torch_dtype=BF16)
    assert is_quantized(loaded.transformer_blocks[0].attn1.to_qkv)
    assert torch.equal(run(loaded, BF16), run(model, BF16))
    with pytest.raises(ValueError, match="quantized model"):
        loaded.to(torch.float16)


def test_gradients_reach_the_weights_that_are_not_quantized(folder):
    model = quantized(folder).requires_grad_(False)
    tables = [block.scale_shift_table.requires_grad_() for block in model.transformer_blocks]
    model.enable_gradient_checkpointing()
    model.train()(**inputs(BF16)).sample.float().square().mean().backward()
    assert all(table.grad.isfinite().all() and table.grad.any() for table in tables)


def test_quantized_projections_are_not_fused(folder):
    model = quantized(folder)
    expected = run(model, BF16)
    model.fuse_qkv_projections()
    assert torch.equal(run(model, BF16), expected)


@pytest.mark.parametrize("groups", ["leaf_level", "block_level"])
def test_quantized_weights_are_offloaded_in_groups(folder, groups):
    model = quantized(folder)
    expected = run(model, BF16)
    blocks = {"num_blocks_per_group": 1} if groups == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), offload_type=groups, **blocks)
    assert torch.equal(run(model, BF16), expected)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pipelines_quantize_transformer_and_text_encoder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pipe = make_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    config = ao.Int8WeightOnlyConfig()
    mapping = {
        "transformer": diffusers.TorchAoConfig(config),
        "text_encoder": transformers.TorchAoConfig(config),
    }
    loaded = kind.from_pretrained(
        tmp_path,
        quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=mapping),
        torch_dtype=BF16,
    )
    assert is_quantized(loaded.transformer.proj_out)
    assert is_quantized(loaded.text_encoder.encoder.block[0].layer[0].SelfAttention.q)
    assert distance(draw(loaded), draw(pipe)) < 0.2
