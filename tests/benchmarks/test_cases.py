import pytest
import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel

from benchmarks.cases import DENOISERS, LOCALDIT, PIXART, SANA, Case
from benchmarks.runs import (
    build,
    compile_blocks,
    make_inputs,
    make_model,
    make_run,
    weight_bytes,
)
from localdit.models import PRESETS, LocalDiTTransformer2DModel

INPUTS = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")


def test_equal_depth_is_measured_directly():
    case = Case(pixels=64, layers=3)
    for denoiser in case.denoisers:
        assert case.measured_layers(denoiser) == [3] == [case.target_layers(denoiser)]


def test_own_depth_is_derived_from_every_kind_of_block():
    """LocalDiT's window shifts repeat every four blocks, so it needs a multiple of four."""
    case = Case(pixels=64, depth="own", layers=1)
    assert [case.target_layers(denoiser) for denoiser in case.denoisers] == [18, 28]
    assert case.measured_layers(LOCALDIT["local"]) == [0, 4]
    assert case.measured_layers(PIXART) == [0, 1]
    training = Case(pixels=64, task="training", depth="own", layers=1)
    assert training.measured_layers(LOCALDIT["local"]) == [1, 5]
    assert training.measured_layers(PIXART) == [1, 2]
    five = Case(pixels=64, depth="own", layers=5)
    assert five.measured_layers(LOCALDIT["local"]) == [0, 8]
    assert five.measured_layers(PIXART) == [0, 5]


def test_own_depth_can_be_measured_in_full():
    case = Case(pixels=64, depth="own", layers=None)
    assert not case.derived
    assert [case.measured_layers(denoiser) for denoiser in case.denoisers] == [[18], [28]]


def test_a_token_is_16_pixels_wide():
    assert [Case(pixels=pixels).tokens for pixels in (512, 4096)] == [1024, 65536]


@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=lambda d: d.name)
def test_a_model_without_blocks_runs(denoiser):
    case = Case(pixels=64)
    model = make_model(denoiser, 0, case)
    with torch.inference_mode():
        out = model(**make_inputs(denoiser, case))[0]
    side = 64 // denoiser.latents.pixels
    assert out.shape == (1, denoiser.latents.channels, side, side)
    assert out.isfinite().all()


def test_weight_bytes_count_parameters_and_positions():
    case = Case(pixels=64)
    model = make_model(PIXART, 1, case)
    count = sum(p.numel() for p in model.parameters())
    positions = 16 * 1152  # for 4 x 4 tokens
    assert weight_bytes(model) == 4 * (count + positions)
    assert weight_bytes(make_model(PIXART, 1, Case(64, "bfloat16"))) == 2 * (count + positions)
    mixed = make_model(PIXART, 1, Case(64, "bfloat16", task="training"))
    assert weight_bytes(mixed) == 4 * (count + positions)


def test_a_case_makes_its_models():
    case = Case(pixels=64, contexts=("local", "global"))
    models = [make_model(denoiser, 1, case) for denoiser in case.denoisers]
    assert [type(model) for model in models] == [
        LocalDiTTransformer2DModel,
        LocalDiTTransformer2DModel,
        PixArtTransformer2DModel,
    ]
    assert [model.config.get("use_global") for model in models] == [False, True, None]


def test_sana_is_the_released_one():
    """Sana_600M_1024px has 0.59B parameters, and LocalDiT f32 is the preset without sizes."""
    with torch.device("meta"):
        models = [build(one, one.own_layers, 1024) for one in (SANA, LOCALDIT["f32"])]
        preset = LocalDiTTransformer2DModel(
            **PRESETS["released-f32"]
            | {"caption_channels": 2304, "use_additional_conditions": False}
        )
    assert isinstance(models[0], SanaTransformer2DModel)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (*models, preset)]
    assert sizes[0] == 591_747_872
    assert sizes[1] == sizes[2]
    own = Case(pixels=1024, depth="own", layers=None, against="sana", contexts=("f32",))
    assert [(d.name, own.target_layers(d)) for d in own.denoisers] == [
        ("LocalDiT f32", 18), ("Sana-0.6B", 28),
    ]  # fmt: skip
    inputs = [make_inputs(denoiser, Case(pixels=1024)) for denoiser in own.denoisers]
    shapes = [{name: one[name].shape for name in INPUTS} for one in inputs]
    assert shapes[0] == shapes[1]
    assert shapes[0]["hidden_states"] == (1, 32, 32, 32)


@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=lambda d: d.name)
def test_every_block_is_compiled(denoiser):
    model = make_model(denoiser, 2, Case(pixels=64))
    compile_blocks(model)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)


@pytest.mark.parametrize("denoiser", [LOCALDIT["local"], SANA], ids=lambda d: d.name)
def test_a_training_step_changes_the_weights(denoiser):
    case = Case(pixels=64, task="training", layers=1)
    model = make_model(denoiser, 1, case)
    before = model.proj_out.weight.detach().clone()
    make_run(model, denoiser, case, [])()
    assert not torch.equal(model.proj_out.weight, before)


def test_one_block_is_enough_for_every_weight_to_be_trained():
    """Own depths in training need at least one block: with none, some weights get no gradient."""
    case = Case(pixels=64, task="training")
    for layers, trained in ((0, False), (1, True)):
        model = make_model(PIXART, layers, case)
        model(**make_inputs(PIXART, case))[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters()) == trained
