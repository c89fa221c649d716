"""Loaded checkpoints compute what the original models did; others are refused."""

import json
import logging
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from localdit.checkpoint import inspect_checkpoint, load_transformer
from localdit.checkpoint.loading import empty_model
from localdit.models import LocalDiTTransformer2DModel

from .flat import flat_state, output, released_state, tiny_model

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
ATTN1 = "transformer_blocks.0.attn1"


@pytest.fixture
def write(tmp_path):
    def write(state, name="w.safetensors"):
        path = tmp_path / name
        (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
        return path

    return write


# --- what the reference computed ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "global"])
def test_reference_checkpoints_compute_what_the_reference_did(kind):
    model = LocalDiTTransformer2DModel.from_single_file(
        REFERENCE / f"reference_{kind}.checkpoint.safetensors"
    )
    assert not model.training
    tensors = load_file(REFERENCE / f"reference_{kind}.io.safetensors")
    errors = {}
    for grid in sorted({name.split(".")[0] for name in tensors}):
        given = {n.split(".")[1]: t for n, t in tensors.items() if n.startswith(f"{grid}.")}
        expected = given.pop("output")
        conditions = {name: given.pop(name) for name in ("resolution", "aspect_ratio")}
        latents = given.pop("latents")
        with torch.no_grad():
            sample = model(latents, added_cond_kwargs=conditions, **given).sample
        errors[grid] = (sample - expected).abs().max().item()
    print(f"{kind}: max abs error {errors}")
    assert len(errors) == 3
    assert max(errors.values()) < 1e-5


def test_the_report_counts_the_reference():
    report = inspect_checkpoint(REFERENCE / "reference_global.checkpoint.safetensors")
    model = LocalDiTTransformer2DModel(**report.config)
    assert report.live_values == sum(p.numel() for p in model.parameters())
    assert (len(report.dead_names), report.dead_values) == (40, 15_000)
    assert report.config["use_global"] and report.config["layer_types"] is None
    assert not report.folded_layers + report.drawn_layers + report.zeroed_layers


def test_the_released_file_has_the_published_counts(tmp_path):
    """Its names and shapes over 2 GB without data: only the header is read."""
    header, end = {}, 0
    for name, tensor in released_state_at_full_size().items():
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "LocalDiT-1024.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    report = inspect_checkpoint(path)
    assert report.live_values == 398_780_368
    assert report.dead_values == 119_543_040
    assert report.folded_layers == report.zeroed_layers == tuple(range(18))
    assert report.config == inspect_defaults()
    drawn = inspect_checkpoint(path, global_context="draw", seed=0)
    assert (
        sum(p.numel() for p in empty_model(LocalDiTTransformer2DModel, **drawn.config).parameters())
        == 518_662_672
    )


def released_state_at_full_size():
    with torch.device("meta"):
        return released_state(LocalDiTTransformer2DModel())


def inspect_defaults():
    config = {
        n: v
        for n, v in empty_model(LocalDiTTransformer2DModel).config.items()
        if not n.startswith("_")
    }
    return {**config, "cross_attention_dim": 1152, "use_additional_conditions": True}


# --- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"use_global": True}, {"use_global": True, "layer_types": ["local", "local_global"]}],
)
def test_every_kind_of_attention_round_trips(kind, name, write):
    model = tiny_model(**kind)
    loaded = load_transformer(write(flat_state(model), name))
    assert torch.equal(output(loaded), output(model))
    assert loaded.config.use_global == model.config.use_global
    assert loaded.config.layer_types == model.config.layer_types


def test_our_own_names(write):
    model = tiny_model(use_global=True)
    loaded = load_transformer(write(model.state_dict(), "w.pt"))
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "ema_model."])
def test_prefixes(prefix, write):
    model = tiny_model()
    state = {prefix + name: tensor for name, tensor in flat_state(model).items()}
    path = write({"ema": {**state, "decay": 0.9}}, "w.pt")
    assert torch.equal(output(load_transformer(path)), output(model))
    report = inspect_checkpoint(path)
    assert (report.prefix, report.wrapper) == (prefix, "ema")


def test_dead_tensors_are_dropped_and_reported(write, caplog):
    model = tiny_model()
    state = {**released_state(model), **flat_state(model)}
    with caplog.at_level(logging.INFO, logger="localdit"):
        loaded = load_transformer(path := write(state))
    assert torch.equal(output(loaded), output(model))
    dead = 2 * 5 * (24 * 24 + 24)  # q, k, v and the fused pair, in two layers
    assert f"{dead:,} dead values dropped (16 tensors" in caplog.text
    assert inspect_checkpoint(path).dead_values == dead


def test_unfused_projections_are_fused_and_fused_ones_split(write):
    model = tiny_model()
    state = flat_state(model)
    for layer in range(2):
        block = f"transformer_blocks.{layer}"
        for kind in ("weight", "bias"):
            fused = state.pop(f"{block}.attn1.to_qkv.{kind}")
            for name, rows in zip(("to_q", "to_k", "to_v"), fused.chunk(3), strict=True):
                state[f"{block}.attn1.{name}.{kind}"] = rows.clone()
            pair = [state.pop(f"{block}.attn2.{name}.{kind}") for name in ("to_k", "to_v")]
            state[f"{block}.attn2.to_kv.{kind}"] = torch.cat(pair)
    loaded = load_transformer(write(state))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in loaded.state_dict().items())
    del state[f"{ATTN1}.to_k.bias"]
    with pytest.raises(ValueError, match=rf"lacks '{ATTN1}.to_k.bias': .* 1 are missing"):
        load_transformer(write(state))


def test_full_attention_is_declared_not_guessed(write):
    model = tiny_model(layer_types=["full", "local"])
    path = write(flat_state(model))
    with pytest.raises(ValueError, match=f"lacks '{ATTN1}.local_rel_pos_bias'"):
        load_transformer(path)
    loaded = load_transformer(path, layer_types=["full", "local"])
    assert torch.equal(output(loaded), output(model))
    model = tiny_model(layer_types=["full", "full"])
    loaded = load_transformer(write(flat_state(model)), layer_types=["full", "full"])
    assert torch.equal(output(loaded), output(model))


def test_weights_of_local_layers_load_with_pooled_keys(write):
    model = tiny_model(layer_types="local local_pooled")
    path = write(flat_state(model))
    assert load_transformer(path).config.layer_types is None  # tensors alone don't show it
    loaded = load_transformer(path, layer_types="local local_pooled")
    assert loaded.config.layer_types == ["local", "local_pooled"]
    assert torch.equal(output(loaded), output(model))
    released = write(released_state(tiny_model()), "released.safetensors")
    report = inspect_checkpoint(released, layer_types="local_pooled", window_size=2)
    assert report.folded_layers == report.zeroed_layers == (0, 1)


def test_without_size_conditions_and_without_caption_projection(write):
    model = tiny_model(sample_size=16, caption_channels=None, cross_attention_dim=10)
    loaded = load_transformer(write(flat_state(model)), sample_size=16, interpolation_scale=None)
    assert loaded.config.caption_channels is None
    assert loaded.config.cross_attention_dim == 10
    assert loaded.use_additional_conditions is False
    assert load_transformer(write(flat_state(model))).config.sample_size == 128


# --- untrained global context ------------------------------------------------------------------


@pytest.fixture
def released(write):
    return write(released_state(tiny_model(window_size=4)))


def test_folding_halves_the_values_and_nothing_else(released):
    model = load_transformer(released)
    source = load_file(released)
    half = torch.tensor([1.0, 1.0, 0.5]).repeat_interleave(24)
    for name, tensor in model.state_dict().items():
        if name.endswith("local_rel_pos_bias"):
            assert not tensor.any()
            continue
        expected = source[name]
        if ".to_qkv." in name:
            expected = expected * (half[:, None] if expected.ndim == 2 else half)
        assert torch.equal(tensor, expected), name
    assert not model.config.use_global


def test_folding_is_the_mean_over_random_global_contexts(released):
    """Per layer, because the rest of the model is not linear. The mean of n draws is off by about
    sigma / sqrt(n)."""
    hidden_states = torch.randn(1, 64, 24, generator=torch.Generator().manual_seed(2))
    draws = []
    with torch.no_grad():
        for seed in range(64):
            model = load_transformer(released, global_context="draw", seed=seed)
            attn = model.transformer_blocks[1].attn1
            draws.append(attn(hidden_states, attn.grid(8, 8)))
        attn = load_transformer(released).transformer_blocks[1].attn1
        grid = attn.grid(8, 8)
        folded = attn(hidden_states, grid)
        attn.to_qkv.weight[48:] *= 2
        attn.to_qkv.bias[48:] *= 2
        unfolded = attn(hidden_states, grid)
    draws = torch.stack(draws)
    standard_error = draws.std(0) / len(draws) ** 0.5

    def deviation(expected):
        return ((draws.mean(0) - expected) / standard_error).square().mean()

    print(f"squared deviation {deviation(folded):.2f}, without folding {deviation(unfolded):.0f}")
    # Of order one if the expectation is right, and far larger if it is not.
    assert 0.3 < deviation(folded) < 2.5
    assert deviation(unfolded) > 30
    # In expectation two draws are twice as far from each other as either is from the mean.
    to_mean = (draws - folded).square().mean()
    apart = (draws[::2] - draws[1::2]).square().mean()
    assert 1.6 < apart / to_mean < 2.4


def test_drawing_follows_the_seed_and_keeps_the_global_generator(released):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = load_transformer(released, global_context="draw", seed=1)
    torch.rand(3)
    again = load_transformer(released, global_context="draw", seed=1)
    other = load_transformer(released, global_context="draw", seed=2)
    assert first.config.use_global
    assert torch.equal(output(first), output(again))
    assert not torch.equal(output(first), output(other))
    qkv = f"{ATTN1}.to_qkv.weight"
    assert torch.equal(first.state_dict()[qkv], load_file(released)[qkv])
    assert not first.transformer_blocks[0].attn1.global_context.global_rel_pos_bias.any()
    torch.random.set_rng_state(before)
    load_transformer(released, global_context="draw", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_nothing_is_drawn_if_nothing_is_missing(write, released):
    for kind in ({}, {"use_global": True}):
        path = write(flat_state(tiny_model(**kind)), "trained.pt")
        assert inspect_checkpoint(path).folded_layers == ()
        with pytest.raises(ValueError, match="no global context to draw"):
            load_transformer(path, global_context="draw", seed=0)
    with pytest.raises(ValueError, match="`seed` goes with"):
        load_transformer(released, global_context="draw")
    with pytest.raises(ValueError, match="`seed` goes with"):
        load_transformer(released, seed=0)
    with pytest.raises(ValueError, match="'halve'; choose 'fold' or 'draw'"):
        load_transformer(released, global_context="halve")


# --- arguments ---------------------------------------------------------------------------------


def test_the_caller_gives_what_the_tensors_do_not_determine(write):
    model = tiny_model(do_rope=False, shift_schedule="alternating", sample_size=64)
    state = flat_state(tiny_model())
    loaded = load_transformer(
        write(state),
        do_rope=False,
        shift_schedule="alternating",
        sample_size=64,
        num_layers=2,  # agrees with the tensors
        out_channels=None,  # leaves it to them
    )
    model = LocalDiTTransformer2DModel(**{**model.config, "use_additional_conditions": True})
    model.load_state_dict(tiny_model().state_dict())
    assert torch.equal(output(loaded), output(model.eval()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"layer_types": "local pooled"},
            r"`layer_types` is \['local', 'pooled'\]; .* local_pooled",
        ),
        ({"layer_types": "full"}, r"`layer_types` is \['full', 'full'\], but"),
        ({"num_layers": 3}, r"`num_layers` is 3, but 'transformer_blocks.\*' in .* implies 2"),
        ({"window_size": 4}, "`window_size` is 4, but .*local_rel_pos_bias' in .* implies 2"),
        ({"attention_head_dim": 16}, "`attention_head_dim` is 16.*norm_q.weight'.* implies 12"),
        ({"caption_channels": None}, "`caption_channels` is None, but .* implies 6"),
        ({"use_additional_conditions": False}, "`use_additional_conditions` is False"),
        ({"use_global": True}, r"`use_global` is True, but the tensors 'transformer_blocks.\*"),
        ({"layer_types": ["full", "full"]}, r"`layer_types` is \['full', 'full'\], but"),
    ],
)
def test_an_argument_that_contradicts_the_tensors_is_refused(override, message, write):
    with pytest.raises(ValueError, match=message):
        load_transformer(write(flat_state(tiny_model())), **override)


def test_unknown_arguments_and_dtypes_are_refused(write):
    path = write(flat_state(tiny_model()))
    with pytest.raises(TypeError, match="'num_layer'; the closest is 'num_layers'"):
        load_transformer(path, num_layer=2)
    with pytest.raises(ValueError, match="`torch_dtype` is torch.int8; choose one of"):
        load_transformer(path, torch_dtype=torch.int8)


# --- strict loading ----------------------------------------------------------------------------


def without(state, *parts):
    return {n: t for n, t in state.items() if not any(part in n for part in parts)}


GLOBAL = flat_state(tiny_model(use_global=True))
LOCAL = flat_state(tiny_model())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(LOCAL, "1.ff.net.2.bias"), "lacks 'transformer_blocks.1.ff.net.2.bias': .* 1 are"),
        ({**LOCAL, "extra.weight": torch.ones(2)}, "has unexpected 'extra.weight'"),
        (without(LOCAL, "0.attn1.norm_q"), "lacks 'transformer_blocks.0.attn1.norm_q.weight'"),
        (without(LOCAL, "0.attn1.processor"), f"lacks '{ATTN1}.local_rel_pos_bias'"),
        (without(GLOBAL, "0.attn1.processor.to_global_kv.bias"), "lacks .*0.attn1.global_context"),
        (without(GLOBAL, "processor.local_rel_pos_bias"), "lacks .*0.attn1.local_rel_pos_bias', '"),
        (
            {**LOCAL, f"{ATTN1}.to_qkv.bias": torch.ones(71)},
            rf"'{ATTN1}.to_qkv.bias' has shape \(71,\); expected \(72,\)",
        ),
        (
            {**LOCAL, "transformer_blocks.1.attn2.to_k.weight": torch.ones(24, 9)},
            r"attn2.to_k.weight' has shape \(24, 9\); expected \(24, 24\)",
        ),
        ({**LOCAL, "proj_out.bias": torch.ones(16).int()}, "'proj_out.bias' is torch.int32; exp"),
        (
            {**LOCAL, "proj_out.bias": torch.full((16,), torch.nan)},
            "'proj_out.bias' has values that are not finite. Expected",
        ),
        ({**LOCAL, "proj_out.bias": -torch.full((16,), torch.inf)}, "'proj_out.bias' has values"),
    ],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_tensors_that_do_not_fit_are_refused_by_name(state, message, name, write):
    with pytest.raises(ValueError, match=message):
        load_transformer(path := write(state, name))
    if "finite" not in message and "has values" not in message:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            inspect_checkpoint(path)


# --- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_dtypes(source, dtype, write):
    state = {name: tensor.to(source) for name, tensor in LOCAL.items()}
    loaded = load_transformer(write(state), torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype or source}
    assert torch.equal(loaded.proj_out.weight, state["proj_out.weight"].to(dtype or source))


def test_mixed_dtypes_widen_and_narrow_ones_do_not_overflow(write):
    state = {**LOCAL, "proj_out.bias": torch.full((16,), 1e5, dtype=torch.bfloat16)}
    path = write(state)
    assert inspect_checkpoint(path).dtype == "float32"
    with pytest.raises(ValueError, match="not finite as torch.float16.*wider `torch_dtype`"):
        load_transformer(path, torch_dtype=torch.float16)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_the_model_outlives_the_file(name, write):
    loaded = load_transformer(path := write(LOCAL, name))
    before = output(loaded)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(output(loaded), before)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])


PEAK = """
import re, sys, torch
from localdit.checkpoint import load_transformer

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = resident("VmRSS")
dtype = getattr(torch, sys.argv[2])
model = load_transformer(sys.argv[1], torch_dtype=dtype)
live = sum(parameter.nbytes for parameter in model.parameters())
print((resident("VmHWM") - before) / live)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_loading_the_released_size_peaks_at_1_3_times_its_live_size(name, write):
    generator = torch.Generator().manual_seed(0)
    shapes = {n: t.shape for n, t in released_state_at_full_size().items()}
    path = write({n: torch.rand(shape, generator=generator) for n, shape in shapes.items()}, name)
    for dtype in ("float32", "bfloat16"):
        peak = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), dtype],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        ).stdout
        print(f"{name} to {dtype}: peak {float(peak):.3f} times the live size")
        assert float(peak) <= 1.3
    path.unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "'localdit_config' is no JSON object"),
        ("[]", "'localdit_config' is no JSON object"),
        ('{"layer_types": "xxxxxxxxx", "sample_size": "big"}', r"`layer_types` is \['xxxxxxxxx', "),
        ('{"sample_size": "big"}', "`sample_size` is 'big'"),
        ('{"sample_size": 1e999}', "`sample_size` is inf"),
        ('{"sample_size": 10000000000}', "`sample_size` is 10000000000.* of at most 65,536"),
        ('{"norm_eps": [[[[1]]]]}', "`norm_eps` is "),
        ('{"layer_types": {"full": 1}}', "`layer_types`"),
    ],
)
def test_unsound_settings_in_a_files_metadata_are_refused(tmp_path, text, message):
    file = tmp_path / "w.safetensors"
    save_file(flat_state(tiny_model()), file, {"localdit_config": text})
    for read in (load_transformer, inspect_checkpoint):
        with pytest.raises(ValueError, match=f"w.safetensors: .*{message}"):
            read(file)
