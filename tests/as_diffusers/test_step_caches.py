"""Step caches on any pipeline: hooked where they should be, and nothing kept after a call.

What they save and what that costs is tested in `tests/pipelines/test_step_caches.py`.
"""

import pytest
import torch

from tests.as_diffusers.cases import KINDS, distance, draw, make
from tests.step_caches import cache_config

CACHES = {
    "broadcast": lambda pipe: cache_config(
        "PyramidAttentionBroadcastConfig",
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: cache_config(
        "FasterCacheConfig",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "first block": lambda pipe: cache_config("FirstBlockCacheConfig", threshold=0.8),
    "magnitude": lambda pipe: cache_config(
        "MagCacheConfig", mag_ratios=torch.ones(8), num_inference_steps=8
    ),
    "taylor": lambda pipe: cache_config(
        "TaylorSeerCacheConfig",
        cache_interval=3,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
    ),
    "taylor, lite": lambda pipe: cache_config(
        "TaylorSeerCacheConfig",
        cache_interval=3,
        disable_cache_before_step=2,
        use_lite_mode=True,
    ),
}
HOOKS = {
    "broadcast": "pyramid_attention_broadcast",
    "faster": "faster_cache_block",
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("text to image", name) for name in CACHES),
        ("image to image", "first block"),
        ("inpainting", "faster"),
    ],
)
def test_a_cache_changes_the_picture_while_it_is_on(kind, name):
    pipe = make(KINDS[kind], num_layers=3)
    options = {"num_inference_steps": 8, "guidance_scale": 3.0}
    reference = draw(pipe, **options)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    cached = draw(pipe, **options)
    assert 1e-6 < distance(cached, reference) < 0.3
    assert distance(draw(pipe, **options), cached) == 0
    pipe.transformer.disable_cache()
    assert distance(draw(pipe, **options), reference) == 0


def hooked(model, name):
    """Return the hooks of that name in a model's parts, without the model itself."""
    parts = [part for part in model.modules() if part is not model]
    registries = [part._diffusers_hook for part in parts if hasattr(part, "_diffusers_hook")]
    found = [registry.get_hook(name) for registry in registries]
    return [hook for hook in found if hook is not None]


@pytest.mark.parametrize("name", HOOKS)
def test_every_self_attention_is_watched_step_by_step(kind, name):
    pipe = make(kind, num_layers=3)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    watching = hooked(pipe.transformer, HOOKS[name])
    assert len(watching) == 3
    assert all(hook.state.cache is None for hook in watching)

    def look(pipeline, index, timestep, tensors):
        assert all(hook.state.cache is not None for hook in watching)
        assert all(hook.state.iteration == index + 1 for hook in watching)

    draw(pipe, num_inference_steps=4, callback_on_step_end=look)
    assert all(hook.state.cache is None and hook.state.iteration == 0 for hook in watching)


def test_faster_cache_leaves_the_unconditional_half_out():
    pipe = make(KINDS["text to image"])
    batches = []
    inner = pipe.transformer.transformer_blocks[0].forward
    pipe.transformer.transformer_blocks[0].forward = lambda x, *a: (
        batches.append(len(x)),
        inner(x, *a),
    )[1]
    pipe.transformer.enable_cache(CACHES["faster"](pipe))
    draw(pipe, num_inference_steps=8)
    assert set(batches) == {1, 2}
    batches.clear()
    draw(pipe, num_inference_steps=8, guidance_scale=3.0, height=32, width=32)
    assert batches[0] == 2  # each call begins with both
