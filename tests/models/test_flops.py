import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localdit.models import (
    FullAttnProcessor,
    LocalDiTTransformer2DModel,
    attention,
    backends,
)
from localdit.models.flops import forward_flops
from localdit.models.windows import Route

SIZES = [(16, 16), (8, 24), (18, 10)]  # latents; the last is padded: 9 x 5 tokens in windows of 4


def make(**overrides):
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 16,
        "window_size": 4,
        "caption_channels": 20,
        **overrides,
    }
    return LocalDiTTransformer2DModel(**settings)


def inputs(model, height, width, text_tokens=7):
    conditions = None
    if model.use_additional_conditions:
        conditions = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    text = torch.randn(1, text_tokens, model.config.caption_channels or model.inner_dim)
    return torch.randn(1, 4, height, width), text, torch.tensor([5]), conditions


def counted(model, height, width):
    """The operations that PyTorch counts; it needs the two products of attention separately."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs(model, height, width))
    return counter.get_total_flops()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("layer_type", ["local", "local_pooled", "local_global", "full"])
def test_flops_agree_with_pytorchs_count(layer_type, height, width):
    layers = {"layer_types": [layer_type] * 2, "use_global": layer_type == "local_global"}
    model = make(**layers)
    assert forward_flops(model, height, width, 7) == counted(model, height, width)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_additional_conditions": True},
        {"caption_channels": None},
        {"patch_size": 1, "window_size": 3},
        {"activation_fn": "geglu"},
        {"out_channels": 8},
        {"layer_types": ["full", "local_global"], "use_global": True},
        {"layer_types": "local_pooled full", "window_size": 3},
    ],
    ids=str,
)
def test_flops_follow_the_configuration(settings):
    model = make(**settings)
    assert forward_flops(model, 8, 12, 7) == counted(model, 8, 12)
    assert forward_flops(model.config, 8, 12, 7) == counted(model, 8, 12)


@pytest.mark.parametrize("layer_type", ["local", "local_global", "full"])
def test_tokens_that_skip_blocks_save_operations(layer_type):
    kinds = {
        "layer_types": ["local", *[layer_type] * 3],
        "use_global": layer_type == "local_global",
    }
    model = make(num_layers=4, **kinds)
    route = Route(range(1, 3), 4, 8, torch.arange(32)[None])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs(model, 16, 24), route=route)
    found = forward_flops(model.config, 16, 24, 7, route)
    assert found == counter.get_total_flops() < forward_flops(model.config, 16, 24, 7)


def test_flops_follow_the_processors():
    model = make()
    within_windows = forward_flops(model, 16, 16, 7)
    model.set_attn_processor(FullAttnProcessor())
    assert forward_flops(model, 16, 16, 7) == counted(model, 16, 16) > within_windows


def test_a_training_step_takes_three_times_as_many(monkeypatch):
    for module in (attention, backends):  # what the backward pass computes again does not count
        monkeypatch.setattr(module, "recomputed", lambda function, *args: function(*args))
    model = make()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs(model, 16, 16))[0].sum().backward()
    # Latents, text and time need no gradients.
    forward = forward_flops(model, 16, 16, 7)
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=0.02)
    assert counter.get_total_flops() < 3 * forward


def test_the_released_model_saves_what_windows_save():
    # 64 x 64 tokens of 1152 channels: 4 n (n - 16) dim operations a layer less.
    config = {"use_additional_conditions": False}
    full = forward_flops({**config, "layer_types": ["full"] * 18}, 128, 128, 120)
    local = forward_flops(config, 128, 128, 120)
    assert full - local == 18 * 4 * 4096 * (4096 - 16) * 1152
    # With averages of 16 x 16 tiles, each token attends to 256 more.
    pooled = forward_flops({**config, "layer_types": "local_pooled"}, 128, 128, 120)
    assert pooled - local == 18 * 4 * 4096 * 256 * 1152
