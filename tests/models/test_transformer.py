import copy
import json

import pytest
import torch

from localdit.checkpoint.layout import LAYER_TYPES
from localdit.models import (
    PRESETS,
    FullAttnProcessor,
    LocalAttnProcessor,
    LocalDiTTransformer2DModel,
    LocalGlobalAttnProcessor,
)
from localdit.models.attention import PROCESSORS
from localdit.models.windows import Route

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 5,
    "caption_channels": 16,
    "sample_size": 32,
}


def make(**changes):
    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(**{**SMALL, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(height=16, width=16, batch_size=2, dtype=torch.float32, conditions=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32 and then cast: other dtypes give other random numbers.
    mask = torch.ones(batch_size, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    result = {
        "hidden_states": torch.randn(batch_size, 4, height, width, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch_size, 7, 16, generator=generator).to(dtype),
        "timestep": torch.tensor([900, 20, 300, 7])[:batch_size],
        "encoder_attention_mask": mask,
    }
    if conditions:
        result["added_cond_kwargs"] = {
            "resolution": torch.tensor([[8.0 * height, 8.0 * width]] * batch_size),
            "aspect_ratio": torch.tensor([[width / height]] * batch_size),
        }
    return result


def run(model, **kwargs):
    with torch.no_grad():
        return model(**kwargs).sample


@pytest.mark.parametrize(("use_global", "count"), [(False, 398_794_480), (True, 518_662_672)])
def test_size_of_the_released_model(use_global, count):
    with torch.device("meta"):
        model = LocalDiTTransformer2DModel(use_global=use_global)
    assert sum(p.numel() for p in model.parameters()) == count
    bias = sum(p.numel() for n, p in model.named_parameters() if "local_rel_pos_bias" in n)
    assert bias == 14_112


def test_presets_build():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            LocalDiTTransformer2DModel(**config)
        assert name in ("released", "released-f32", "released-f16", "tiny")


@pytest.mark.parametrize(
    ("name", "pixels_per_latent"), [("released-f32", 32), ("released-f16", 16)]
)
def test_presets_for_compact_latents_differ_from_the_released_model_in_two_layers(
    name, pixels_per_latent
):
    """A pixel of a picture of 1024 x 1024 has the same position, and the size is a condition."""
    with torch.device("meta"):
        released, compact = (LocalDiTTransformer2DModel(**PRESETS[n]) for n in ("released", name))
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (released, compact)]
    assert shapes[0].keys() == shapes[1].keys()
    different = {n for n, shape in shapes[0].items() if shapes[1][n] != shape}
    assert different == {"pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"}
    assert released.use_additional_conditions and compact.use_additional_conditions
    assert compact.config.sample_size * pixels_per_latent == released.config.sample_size * 8 == 1024
    positions = [
        model.pos_embed._axis(64 * 16 // token, torch.empty(1, 1, 1152))
        for model, token in ((released, 16), (compact, pixels_per_latent))
    ]
    assert torch.equal(positions[0][:: pixels_per_latent // 16], positions[1])


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("conditions", [False, True])
def test_setting_the_sample_size_equals_a_new_model_of_that_size(size, conditions):
    changes = {"use_additional_conditions": conditions, "sample_size": 128}
    model = make(**changes)
    model.set_sample_size(size)
    fresh = make(**changes | {"sample_size": size})
    given = inputs(8, 24, conditions=conditions)
    assert torch.equal(model(**given).sample, fresh(**given).sample)
    assert model.config.sample_size == size
    again = LocalDiTTransformer2DModel.from_config(model.config)
    assert again.use_additional_conditions is conditions
    assert torch.equal(again.eval()(**given).sample.isfinite().all(), torch.tensor(True))


def test_portrait_after_landscape_equals_a_new_model():
    model = make()
    landscape, portrait = inputs(24, 32), inputs(32, 24)
    run(model, **landscape)
    assert torch.equal(run(model, **portrait), run(make(), **portrait))


@pytest.mark.parametrize("use_global", [False, True])
@pytest.mark.parametrize("size", [(2, 2), (16, 24), (18, 10), (2, 30)])
def test_any_grid(use_global, size):
    sample = run(make(use_global=use_global), **inputs(*size))
    assert sample.shape == (2, 4, *size)
    assert sample.isfinite().all()


def test_rows_of_a_batch_do_not_mix():
    model, whole = make(use_global=True), inputs()
    alone = {name: x[1:] if isinstance(x, torch.Tensor) else x for name, x in whole.items()}
    torch.testing.assert_close(run(model, **alone)[0], run(model, **whole)[1], atol=1e-5, rtol=1e-5)


def test_masked_text_tokens_do_not_matter():
    model, kwargs = make(), inputs()
    changed = copy.deepcopy(kwargs)
    changed["encoder_hidden_states"][0, 4:] = 100.0
    assert torch.equal(run(model, **kwargs), run(model, **changed))
    changed["encoder_hidden_states"][0, 3] = 100.0
    assert not torch.equal(run(model, **kwargs), run(model, **changed))
    bias = (1.0 - kwargs["encoder_attention_mask"].float())[:, None] * -10000.0
    as_bias = {**kwargs, "encoder_attention_mask": bias}
    assert torch.equal(run(model, **kwargs), run(model, **as_bias))


def test_one_timestep_for_the_whole_batch():
    model, kwargs = make(), inputs()
    kwargs["timestep"] = torch.tensor([500, 500])
    for single in (torch.tensor(500), torch.tensor([500]), 500):
        assert torch.equal(run(model, **kwargs), run(model, **{**kwargs, "timestep": single}))


def test_size_conditions_are_required_and_used():
    model = make(use_additional_conditions=True)
    with pytest.raises(ValueError, match="'resolution' .*'aspect_ratio'"):
        model(**inputs())
    kwargs = inputs(conditions=True)
    before = run(model, **kwargs)
    kwargs["added_cond_kwargs"]["aspect_ratio"] *= 2
    assert not torch.equal(before, run(model, **kwargs))
    assert LocalDiTTransformer2DModel(**{**SMALL, "sample_size": 128}).use_additional_conditions
    assert not make().use_additional_conditions


def test_return_tuple():
    model, kwargs = make(), inputs()
    with torch.no_grad():
        (sample,) = model(**kwargs, return_dict=False)
    assert torch.equal(sample, run(model, **kwargs))


@pytest.mark.parametrize("compiled", [False, True])
def test_features_are_what_blocks_return(compiled):
    model, seen = make(num_layers=2), []
    hooks = [
        block.register_forward_hook(lambda block, _, output: seen.append(output))
        for block in model.transformer_blocks
    ]
    expected = run(model, **inputs())
    for hook in hooks:
        hook.remove()
    if compiled:
        model.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        sample, *features = model(**inputs(), return_dict=False, feature_blocks=(0, 1))
    assert seen[1].shape == (2, 64, model.inner_dim)
    tolerance = 1e-5 if compiled else 0
    for found, wanted in zip([sample, *features], [expected, *seen], strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("use_global", [False, True])
def test_a_rectangle_of_tokens_takes_blocks_as_a_map_of_its_own(use_global):
    """Compute the blocks one by one, sample by sample, on pieces that are cut out as pictures."""
    model = make(num_layers=4, use_global=use_global)
    calls = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args: calls.append(args))
        for block in model.transformer_blocks
    ]
    corners, height, width = [(4, 0), (8, 4)], 8, 12
    grid = torch.arange(16 * 16).view(16, 16)
    tokens = [grid[y : y + height, x : x + width].flatten() for y, x in corners]
    route = Route(range(1, 3), height, width, torch.stack(tokens))
    kwargs = inputs(32, 32)
    with torch.no_grad():
        sample, *features = model(**kwargs, return_dict=False, feature_blocks=(0, 1), route=route)
        for hook in hooks:
            hook.remove()
        x, text, bias, modulation, *size = calls[0]
        assert size == [16, 16]
        x = model.transformer_blocks[0](x, text, bias, modulation, 16, 16)
        torch.testing.assert_close(calls[1][0], route.take(x), rtol=0, atol=0)
        torch.testing.assert_close(features[0], route.take(x), rtol=0, atol=0)
        maps = x.view(2, 16, 16, -1)
        for number, (top, left) in enumerate(corners):
            one = slice(number, number + 1)
            piece = maps[one, top : top + height, left : left + width].flatten(1, 2)
            for block in model.transformer_blocks[1:3]:
                piece = block(piece, text[one], bias[one], modulation[one], height, width)
            maps[one, top : top + height, left : left + width] = piece.view(1, height, width, -1)
        torch.testing.assert_close(calls[3][0], maps.flatten(1, 2), rtol=1e-5, atol=1e-4)
    assert calls[3][4:] == (16, 16)
    torch.testing.assert_close(features[1].shape, route.take(x).shape)
    assert (sample - run(model, **kwargs)).abs().max() > 0.01


def test_more_channels_out_than_in():
    assert run(make(out_channels=8), **inputs()).shape == (2, 8, 16, 16)
    assert make(out_channels=None).out_channels == 4


def test_without_caption_projection():
    model = make(caption_channels=None, cross_attention_dim=16)
    assert model.caption_projection is None
    assert run(model, **inputs()).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "layer_norm"}, "'layer_norm'.*'ada_norm_single'"),
        ({"cross_attention_dim": 32}, "is 32, .*= 24"),
        ({"attention_head_dim": 16, "use_additional_conditions": True}, "is 32; .*multiple of 3"),
        ({"window_size": 0}, "`window_size` is 0.*at least 1"),
        ({"layer_types": ["local"]}, "names 1 layers, but `num_layers` is 5.*types that repeat"),
        ({"layer_types": " "}, "`layer_types` is ' '; .* a string of types that repeat"),
        ({"layer_types": "local ful"}, "'local ful'; .*local, local_pooled, local_global, full"),
        ({"layer_types": "local local_global"}, "`use_global` is False"),
        ({"layer_types": ["local"] * 4 + ["local_global"]}, "`use_global` is False"),
        ({"layer_types": ["local"] * 5, "use_global": True}, "has no 'local_global'"),
        ({"layer_types": ["local"] * 4 + ["window"]}, "`layer_types` is .*types are local"),
        ({"shift_schedule": "swin"}, "'swin'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LocalDiTTransformer2DModel(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 15, 16)}, "15 x 16 .*multiple of 2"),
        ({"hidden_states": torch.zeros(2, 4, 0, 16)}, "0 x 16"),
        ({"attention_mask": torch.ones(2, 64)}, "not supported"),
        ({"cross_attention_kwargs": {"gligen": 1.0}}, "not supported"),
        ({"feature_blocks": (1, 5), "return_dict": False}, "expected indices of the 5 blocks"),
        ({"feature_blocks": (1, 2)}, "pass `return_dict=False`"),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make()(**{**inputs(), **changes})


def test_shift_schedules_and_layer_types_reach_the_layers():
    def shifts(model):
        return [block.attn1.shift_size for block in model.transformer_blocks]

    assert shifts(make()) == [0, 1, 2, 3, 0]
    assert shifts(make(shift_schedule="alternating")) == [0, 2, 0, 2, 0]

    types = ["local", "full", "local_global", "local", "local"]
    model = make(layer_types=types, use_global=True)
    processors = [block.attn1.processor for block in model.transformer_blocks]
    kinds = [LocalAttnProcessor, FullAttnProcessor, LocalGlobalAttnProcessor]
    assert [type(p) for p in processors] == [*kinds, LocalAttnProcessor, LocalAttnProcessor]
    assert [b.attn1.global_context is not None for b in model.transformer_blocks] == [
        kind == "local_global" for kind in types
    ]
    assert run(model, **inputs()).isfinite().all()


def test_a_pattern_of_layer_types_repeats_and_is_saved_as_a_list(tmp_path):
    model = make(layer_types="local local_pooled full")
    types = ["local", "local_pooled", "full", "local", "local_pooled"]
    assert [type(block.attn1.processor) for block in model.transformer_blocks] == [
        PROCESSORS[kind] for kind in types
    ]
    assert tuple(PROCESSORS) == LAYER_TYPES
    model.save_pretrained(tmp_path)
    # Loaders of earlier versions know lists.
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == types
    again = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(again, **inputs()), run(model, **inputs()))
    assert make(layer_types="full local_pooled", num_layers=1).config.layer_types == ["full"]
    assert make().config.layer_types is None


def test_pooled_keys_need_no_weights_of_their_own(tmp_path):
    """A folder of a local model becomes one with pooled keys by its configuration alone."""
    local, pooled = make(), make(layer_types="local_pooled")
    assert local.state_dict().keys() == pooled.state_dict().keys()
    local.save_pretrained(tmp_path)
    changed = LocalDiTTransformer2DModel.from_pretrained(tmp_path, layer_types="local_pooled")
    assert torch.equal(run(changed, **inputs()), run(pooled, **inputs()))
    # A full model has no relative position bias; the table starts at zero.
    full = make(layer_types="full")
    missing, unexpected = pooled.load_state_dict(full.state_dict(), strict=False)
    assert {name.rsplit(".")[-1] for name in missing} == {"local_rel_pos_bias"} and not unexpected


def test_processors_swap_for_the_whole_model():
    model, kwargs = make(use_global=True), inputs()
    with_global = run(model, **kwargs)
    model.set_attn_processor(LocalAttnProcessor())
    local = run(model, **kwargs)
    model.set_attn_processor(FullAttnProcessor())
    full = run(model, **kwargs)
    assert not torch.equal(with_global, local) and not torch.equal(local, full)
    processors = {name: LocalGlobalAttnProcessor() for name in model.attn_processors}
    cross = {n: p for n, p in model.attn_processors.items() if n.endswith("attn2.processor")}
    assert len(cross) == 5
    model.set_attn_processor({**processors, **cross})
    assert torch.equal(run(model, **kwargs), with_global)
    with pytest.raises(ValueError, match="use_global=True"):
        make().set_attn_processor(LocalGlobalAttnProcessor())


def test_one_window_over_the_whole_map_is_full_attention():
    model, kwargs = make(window_size=8, num_layers=1), inputs(16, 16)
    model.transformer_blocks[0].attn1.local_rel_pos_bias.data.zero_()
    local = run(model, **kwargs)
    model.set_attn_processor(FullAttnProcessor())
    torch.testing.assert_close(run(model, **kwargs), local, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_global", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_global):
    gradients = []
    for checkpointing in (False, True):
        model = make(use_global=use_global).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs(18, 10)).sample.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_training_after_inference_mode():
    model, kwargs = make(), inputs(22, 14)
    with torch.inference_mode():
        model(**kwargs)
    model.train()(**kwargs).sample.sum().backward()
    assert model.pos_embed.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("use_global", [False, True])
def test_save_and_load(tmp_path, use_global):
    model = make(use_global=use_global, shift_schedule="alternating")
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    public = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in public} == public
    assert torch.equal(run(loaded, **inputs()), run(model, **inputs()))


def test_save_and_load_sharded_and_as_a_variant(tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="50KB", variant="fp16")
    assert len(list(tmp_path.glob("*fp16*.safetensors"))) > 1
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(run(loaded, **inputs()), run(model, **inputs()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_global", [False, True])
def test_half_precision(tmp_path, dtype, use_global):
    model = make(use_global=use_global)
    exact = run(model, **inputs())
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    half = run(loaded, **inputs(dtype=dtype))
    assert half.dtype is dtype
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_layerwise_casting():
    model = make()
    exact = run(model, **inputs())
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert model.transformer_blocks[0].ff.net[2].weight.dtype is torch.float8_e4m3fn
    assert run(model, **inputs()).isfinite().all()
    assert (run(model, **inputs()) - exact).norm() < 0.5 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("use_global", [False, True])
def test_compiles_as_one_graph(use_global):
    model, kwargs = make(num_layers=2, use_global=use_global), inputs(20, 12)
    eager = run(model, **kwargs)
    compiled = torch.compile(model, fullgraph=True)
    assert (run(compiled, **kwargs) - eager).norm() < 1e-5 * eager.norm()
