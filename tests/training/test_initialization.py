import math

import pytest
import torch

from localdit.models import LocalDiTTransformer2DModel
from localdit.training.initialization import initialize_weights


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, num_layers=2, sample_size=8,
        caption_channels=48, use_global=True, use_additional_conditions=True,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    initialize_weights(model)
    return model


def test_linear_layers_are_xavier_uniform(transformer):
    block = transformer.transformer_blocks[1]
    embedding = transformer.pos_embed.proj.weight.flatten(1)
    for weight in (block.attn1.to_qkv.weight, block.ff.net[2].weight, embedding):
        fan_out, fan_in = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert bound * 0.95 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)


def test_conditioning_layers_have_a_small_deviation(transformer):
    for weight in (
        transformer.adaln_single.linear.weight,
        transformer.adaln_single.emb.timestep_embedder.linear_1.weight,
        transformer.adaln_single.emb.resolution_embedder.linear_1.weight,
        transformer.adaln_single.emb.aspect_ratio_embedder.linear_1.weight,
        transformer.caption_projection.linear_2.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.06)


def test_biases_and_outputs_are_zero(transformer):
    for name, parameter in transformer.named_parameters():
        zero = name.endswith((".bias", "rel_pos_bias", "attn2.to_out.0.weight"))
        zero = zero or name == "proj_out.weight"
        assert (parameter == 0).all() == zero, name


def test_an_untrained_model_predicts_zero(transformer):
    conditions = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    sample = transformer(
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 3, 48),
        torch.tensor([10]),
        conditions,
        return_dict=False,
    )[0]
    assert (sample == 0).all()
