"""The step caches of Diffusers, and compiled blocks, through the pipeline."""

import diffusers.hooks as hooks
import pytest
import torch

from localdit.models import LocalDiTTransformer2DModel, cpu
from localdit.pipelines import LocalDiTPipeline
from localdit.utils import model_in_the_box
from tests.step_caches import cache_config

EVERY = "transformer_blocks\\.\\d+"


CACHES = {
    "first block": lambda pipe: cache_config("FirstBlockCacheConfig", threshold=0.3),
    "magnitude": lambda pipe: cache_config(
        "MagCacheConfig", mag_ratios=[1.0] * 8, num_inference_steps=8, max_skip_steps=1
    ),
    "taylor": lambda pipe: cache_config(
        "TaylorSeerCacheConfig",
        cache_interval=2,
        disable_cache_before_step=3,
        cache_identifiers=[EVERY],
    ),
    "attention": lambda pipe: cache_config(
        "PyramidAttentionBroadcastConfig",
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "text": lambda pipe: cache_config(
        "PyramidAttentionBroadcastConfig",
        cross_attention_block_skip_range=3,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


@pytest.fixture(scope="module")
def box():
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    prompt = "a large red circle at the top left on a blue background"
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 8, **arguments}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, output_type="pt", **arguments).images


@pytest.fixture
def cached(box):
    """Switch a cache on for one test."""
    yield lambda name: box.transformer.enable_cache(CACHES[name](box))
    if box.transformer.is_cache_enabled:
        box.transformer.disable_cache()


def count(monkeypatch, module):
    calls = []
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    return calls


@pytest.mark.parametrize("name", CACHES)
def test_a_step_cache_saves_work_and_keeps_the_picture(box, cached, monkeypatch, name):
    reference = draw(box)
    last = box.transformer.transformer_blocks[-1]
    inner = last.attn2.to_q if name == "text" else last.attn1.to_qkv
    work = count(monkeypatch, inner)
    cached(name)
    picture = draw(box)
    assert 0 < len(work) < 8
    assert 1e-6 < (picture - reference).square().mean().sqrt() < 0.2
    assert torch.equal(draw(box), picture)  # nothing is left over from the call before
    box.transformer.disable_cache()
    assert torch.equal(draw(box), reference)


@pytest.mark.parametrize("name", CACHES)
def test_step_caches_follow_the_guidance_interval_and_the_size(box, cached, name):
    cached(name)
    interval = draw(box, guidance_interval=(0.25, 0.75))
    draw(box, height=64, width=192)
    assert torch.equal(draw(box, guidance_interval=(0.25, 0.75)), interval)


@pytest.mark.parametrize("name", CACHES)
def test_a_failed_call_leaves_no_state(box, cached, name):
    cached(name)
    reference = draw(box)

    def fail(pipeline, index, timestep, tensors):
        if index == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(box, callback_on_step_end=fail, height=64)
    assert torch.equal(draw(box), reference)


def test_a_cache_can_be_switched_on_after_a_call(box, cached):
    draw(box)
    cached("first block")
    assert draw(box).isfinite().all()


def test_the_current_timestep_is_available_during_a_call(box):
    seen = []
    draw(box, callback_on_step_end=lambda pipe, i, t, x: seen.append(pipe.current_timestep == t))
    assert seen == [True] * 8
    assert box.current_timestep is None


def test_skipped_layers_pass_their_input_on(box):
    """Skip-layer guidance finds attention by its processors."""
    options = cache_config(
        "LayerSkipConfig", indices=[0], fqn="transformer_blocks", skip_attention=True
    )
    model = LocalDiTTransformer2DModel.from_pretrained(model_in_the_box() / "transformer")
    attention = model.transformer_blocks[0].attn1
    x = torch.randn(1, 16, model.inner_dim)
    assert not torch.equal(attention(x, attention.grid(4, 4)), x)
    options.skip_attention_scores = options.skip_ff = False
    hooks.apply_layer_skip(model, options)
    assert torch.equal(attention(x, attention.grid(4, 4)), x)


@pytest.mark.parametrize("name", CACHES)
def test_caches_give_the_same_picture_with_bands(box, cached, monkeypatch, name):
    cached(name)
    whole = draw(box)
    monkeypatch.setattr(cpu, "BAND_ON_CPU", 50 * box.transformer.inner_dim * 4)
    torch.testing.assert_close(draw(box), whole, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_picture():
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    pipe.set_progress_bar_config(disable=True)
    reference = draw(pipe)
    pipe.transformer.compile_repeated_blocks()
    compiled = draw(pipe)
    assert pipe.transformer.transformer_blocks[0]._compiled_call_impl is not None
    torch.testing.assert_close(compiled, reference, atol=2e-3, rtol=0)
    assert torch.equal(draw(pipe), compiled)
