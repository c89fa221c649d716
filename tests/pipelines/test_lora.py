"""LoRA of a pipeline: the features of Diffusers' own pipelines, and the refusals."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTPipeline, lora, saving
from tests.tiny import tiny_pipeline

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
TARGETS = ["to_qkv", "to_k", "to_out.0", "ff.net.0.proj"]
NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipe():
    return tiny_pipeline()


def close(one, other):
    """Equal but for rounding: a layer with an adapter applies GELU in a separate pass."""
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def draw(pipe, scale=None):
    options = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    return pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).images


def add(pipe, name="default", seed=0, **changes):
    """Add an adapter with random weights to the transformer."""
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | changes
    pipe.transformer.add_adapter(peft.LoraConfig(**settings, init_lora_weights=False), name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folders of two adapters, "first" and "second", of different rank and targets."""
    root = tmp_path_factory.mktemp("lora")
    other = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "ff.net.2"]}
    for seed, (name, change) in enumerate({"first": {}, "second": other}.items()):
        pipe = tiny_pipeline()
        add(pipe, seed=seed, **change)
        LocalDiTPipeline.save_lora_weights(root / name, pipe.transformer)
    return root


def test_a_saved_and_loaded_adapter_gives_the_same_picture(pipe, tmp_path):
    bare = draw(pipe)
    add(pipe, rank_pattern={"to_k": 3}, alpha_pattern={"to_k": 9})
    expected = draw(pipe)
    assert (expected - bare).abs().max() > 1e-2
    pipe.save_lora_weights(tmp_path, pipe.transformer)
    settings = pipe.transformer.peft_config["default"]
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), bare)

    for source in (tmp_path, str(tmp_path / NAME)):
        other = tiny_pipeline()
        other.load_lora_weights(source, adapter_name="style")
        assert torch.equal(draw(other), expected)
        assert other.transformer.peft_config["style"].to_dict() == settings.to_dict()


def test_an_adapter_saved_twice_gives_the_same_file(pipe, tmp_path):
    add(pipe, target_modules=[*TARGETS, "to_q", "to_v", "ff.net.2"])
    pipe.save_lora_weights(tmp_path, pipe.transformer)
    with safe_open(tmp_path / NAME, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    targets = settings["transformer.target_modules"]
    assert targets == sorted(targets)
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (2, 6)


def test_tensors_of_a_training_script_are_saved_as_diffusers_saves_them(pipe, tmp_path):
    add(pipe)
    expected = draw(pipe)
    layers, settings = lora.adapter_of(pipe.transformer)
    for safe in (True, False):
        folder = tmp_path / str(safe)
        LocalDiTPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=settings if safe else None,
            safe_serialization=safe,
        )
        other = tiny_pipeline()
        other.load_lora_weights(folder)
        assert torch.equal(draw(other), expected) == safe  # a `.bin` says nothing of alpha
    assert (tmp_path / "False/pytorch_lora_weights.bin").is_file()


def test_a_dict_is_loaded_and_not_changed(pipe, files):
    tensors = load_file(files / "second" / NAME)
    names = list(tensors)
    pipe.load_lora_weights(tensors)
    assert list(tensors) == names
    assert pipe.get_active_adapters() == ["default_0"]


def test_several_adapters_add_up_by_their_weights(pipe, files):
    for name in ("first", "second"):
        pipe.load_lora_weights(files / name, adapter_name=name)
    assert pipe.get_list_adapters() == {"transformer": ["first", "second"]}
    pipe.set_adapters(["first", "second"], [0.5, 2.0])
    assert pipe.get_active_adapters() == ["first", "second"]
    layers = dict(pipe.transformer.named_modules())
    assert layers["transformer_blocks.0.attn1.to_qkv"].scaling["first"] == 0.5 * 6 / 2
    assert layers["transformer_blocks.0.ff.net.2"].scaling["second"] == 2.0 * 4 / 4
    both = draw(pipe)

    # Fused one after the other they give the same: both are added to the weights.
    pipe.fuse_lora(adapter_names=["first"])
    pipe.fuse_lora(adapter_names=["second"])
    assert pipe.fused_loras == {"first", "second"}
    close(draw(pipe), both)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0

    pipe.set_adapters("second")
    alone = draw(pipe)
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"transformer": ["second"]}
    close(draw(pipe), alone)
    assert (alone - both).abs().max() > 1e-2
    with pytest.raises(ValueError, match="'first'.* not in the list of present adapters"):
        pipe.set_adapters("first")


def test_a_disabled_adapter_has_no_effect(pipe, files):
    bare = draw(pipe)
    pipe.load_lora_weights(files / "first")
    adapted = draw(pipe)
    pipe.disable_lora()
    close(draw(pipe), bare)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), adapted)


def test_the_scale_of_a_call_equals_a_weight_of_set_adapters(pipe, files):
    bare = draw(pipe)
    pipe.load_lora_weights(files / "first", adapter_name="first")
    close(draw(pipe, scale=0.0), bare)
    half = draw(pipe, scale=0.5)
    assert pipe.cross_attention_kwargs == {"scale": 0.5}
    pipe.set_adapters("first", 0.5)
    assert torch.equal(draw(pipe), half)
    pipe.set_adapters("first", 1.0)
    pipe.fuse_lora(lora_scale=0.5)
    close(draw(pipe), half)
    for wrong in ({"scale": "much"}, {"gligen": 1}):
        with pytest.raises(ValueError, match="cross_attention_kwargs"):
            pipe("a cat", cross_attention_kwargs=wrong)


def test_a_scale_without_an_active_adapter_gives_a_warning(pipe, files, caplog):
    def warned(scale):
        caplog.clear()
        draw(pipe, scale=scale)
        return "The scale in cross_attention_kwargs has no effect" in caplog.text

    assert warned(0.5) and not warned(1.0)
    pipe.load_lora_weights(files / "first")
    assert not warned(0.5)
    pipe.disable_lora()
    assert warned(0.5)
    pipe.enable_lora()
    assert not warned(0.5)
    pipe.fuse_lora()
    assert warned(0.5)
    pipe.unfuse_lora()
    assert not warned(0.5)


def test_pipelines_that_share_a_transformer_share_its_adapters(pipe, files):
    pipe.load_lora_weights(files / "first", adapter_name="style")
    edit = LocalDiTImg2ImgPipeline.from_pipe(pipe)
    assert edit.get_active_adapters() == ["style"]
    image = torch.zeros(1, 3, 64, 64)
    one, none = (
        edit(
            "a cat",
            image,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            cross_attention_kwargs={"scale": scale},
        ).images
        for scale in (1.0, 0.0)
    )
    assert (one - none).abs().max() > 1e-2


def test_adapters_move_and_swap_in_place(pipe, files):
    expected = {}
    for name in ("first", "second"):
        other = tiny_pipeline()
        add(other, seed=len(expected))
        other.save_lora_weights(files / f"same-{name}", other.transformer)
        expected[name] = draw(other)
    pipe.load_lora_weights(files / "same-first", adapter_name="style")
    assert torch.equal(draw(pipe), expected["first"])
    layer = pipe.transformer.transformer_blocks[0].attn1.to_qkv
    pipe.load_lora_weights(files / "same-second", adapter_name="style", hotswap=True)
    assert pipe.transformer.transformer_blocks[0].attn1.to_qkv is layer
    close(draw(pipe), expected["second"])
    pipe.set_lora_device(["style"], "meta")
    assert layer.lora_A["style"].weight.device.type == "meta"
    assert layer.base_layer.weight.device.type == "cpu"


def test_adapters_of_different_rank_swap_if_prepared(pipe, files):
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(files / "first", adapter_name="style")
    wider = tiny_pipeline()
    add(wider, r=8, lora_alpha=2)
    wider.save_lora_weights(files / "wider", wider.transformer)
    pipe.load_lora_weights(files / "wider", adapter_name="style", hotswap=True)
    close(draw(pipe), draw(wider))


@pytest.mark.slow
def test_a_compiled_transformer_is_not_compiled_again_for_other_adapters(pipe, files, tmp_path):
    wider = tiny_pipeline()
    add(wider, seed=3, r=5)
    wider.save_lora_weights(tmp_path, wider.transformer)
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(files / "first", adapter_name="style")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    first = draw(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_lora_weights(tmp_path, adapter_name="style", hotswap=True)
        close(draw(pipe), draw(wider))
    assert (draw(pipe) - first).abs().max() > 1e-2
    pipe.save_lora_weights(tmp_path / "again", pipe.transformer)
    assert all("lora" in name for name in load_file(tmp_path / "again" / NAME))


def test_loading_leaves_an_offloaded_pipeline_offloaded(pipe, files):
    bare = draw(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    pipe.load_lora_weights(files / "first")
    assert (draw(pipe) - bare).abs().max() > 1e-2


def of_another_model(tensors):
    return {name.replace("attn1.to_qkv", "attn.to_q"): value for name, value in tensors.items()}


def of_a_wider_model(tensors):
    return {name: torch.cat([v, v], 1) if "lora_A" in name else v for name, v in tensors.items()}


def of_a_narrower_output(tensors):
    return {name: v[:-1] if "lora_B" in name else v for name, v in tensors.items()}


def of_a_text_encoder_too(tensors):
    key = "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
    return tensors | {key: torch.zeros(2, 16)}


def of_the_model_alone(tensors):
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


def of_no_adapter(tensors):
    return {"proj_out.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_model, "made for another model: .* no 'transformer_blocks.0.attn.to_q'"),
        (of_a_wider_model, r"another size: .*lora_A.weight is \(2, 48\), but .* is 24 wide"),
        (of_a_narrower_output, r"another size: .*lora_B.weight is .* is \d+ wide"),
        (of_a_text_encoder_too, "also adapts a text encoder .* does not support"),
        (of_the_model_alone, r"is not a LoRA for LocalDiT.*load_lora_adapter\(..., prefix=None\)"),
        (of_no_adapter, "is not a LoRA for LocalDiT: it holds 'proj_out.weight'"),
    ],
)
def test_the_lora_of_something_else_is_refused_and_leaves_nothing(
    pipe, files, tmp_path, change, message
):
    save_file(change(load_file(files / "first" / NAME)), tmp_path / NAME)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {}
    assert not any(hasattr(module, "base_layer") for module in pipe.transformer.modules())


def test_diffusers_warns_about_missing_or_unknown_names_in_a_dict(pipe, files, monkeypatch):
    warnings = []
    for name in ("loaders.peft", "utils.peft_utils"):
        logger = logging.getLogger(f"diffusers.{name}")
        monkeypatch.setattr(logger, "warning", lambda text, *_: warnings.append(text))
    tensors = load_file(files / "first" / NAME)
    missing = next(name for name in tensors if "lora_A" in name)
    changed = {name: value for name, value in tensors.items() if name != missing}
    pipe.load_lora_weights(changed | {f"{missing}.more": torch.zeros(1)})
    assert f"{missing.removeprefix('transformer.')}.more" in warnings[0]
    assert "missing keys" in warnings[0]
    pipe.unload_lora_weights()
    bare = draw(pipe)
    pipe.load_lora_weights({"lora_of_something": torch.zeros(1)})
    assert warnings[1].startswith("No LoRA keys associated to LocalDiTTransformer2DModel")
    assert torch.equal(draw(pipe), bare)


@pytest.mark.parametrize("name", ["nosuch/lora", "nosuch/lora-v1.0"])
def test_a_lora_that_cannot_be_fetched_is_named(pipe, name):
    here = {"weight_name": "lora.safetensors", "local_files_only": True}
    with pytest.raises(OSError, match=f"(?s)The LoRA {name} could not be fetched .* local file"):
        pipe.load_lora_weights(name, **here)


def test_files_without_weights_are_refused(pipe, files, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"transformer.lora": Evil()}, tmp_path / "evil.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "empty.safetensors").touch()
    whole = (files / "first" / NAME).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    for name, message in {
        "evil.bin": "Only tensors in plain dicts .* nothing in it was executed",
        "old.bin": "a bare pickle, which is never opened",
        "empty.safetensors": "is an empty file",
        "cut.safetensors": "truncated or damaged",
    }.items():
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="choose one with `weight_name`"):
        pipe.load_lora_weights(tmp_path)
    for other in ({"weight_name": "other.safetensors"}, {"subfolder": "other"}):
        with pytest.raises(ValueError, match="is a file, so `weight_name` and `subfolder`"):
            pipe.load_lora_weights(files / "first" / NAME, **other)
    pipe.load_lora_weights(files / "first" / NAME, weight_name=NAME)
    (tmp_path / "none").mkdir()
    nowhere = ["nowhere.safetensors", "no/where.bin", "no such/lora", "./nowhere"]
    for path in (tmp_path / "none", tmp_path / "nowhere", *nowhere):
        with pytest.raises(FileNotFoundError):
            pipe.load_lora_weights(path)


def test_malformed_settings_are_refused(pipe, files, tmp_path):
    tensors = load_file(files / "first" / NAME)
    save_file(tensors, tmp_path / NAME, {"lora_adapter_metadata": "[1, 2"})
    with pytest.raises(ValueError, match="'lora_adapter_metadata' is no JSON object"):
        pipe.load_lora_weights(tmp_path)


HOSTILE = {  # settings in the metadata of a file, and what the refusal says
    "nested": ("[" * 100_000, "'lora_adapter_metadata' is no JSON object"),
    "list": ([1], "'lora_adapter_metadata' is no JSON object"),
    "unknown": ({"nonsense": 1}, "unknown settings 'nonsense'"),
    "layers": ({"layer_replication": [[0, 10**9]]}, "'layer_replication' = .*expected None"),
    "module": ({"megatron_config": {}, "megatron_core": "antigravity"}, "'megatron_config'"),
    "init": ({"init_lora_weights": "pissa"}, "'init_lora_weights' = 'pissa'.*expected true"),
    "rank": ({"r": 10**12}, f"'r' = {10**12}.*expected 2, the rank of the tensors"),
    "rank of other layers": ({"rank_pattern": {"to_qkv": 3}}, "'rank_pattern' = 3.*expected 2"),
    "no rank": ({"r": "2"}, "'r' = '2'.*expected a rank"),
    "flag": ({"use_rslora": 1}, "'use_rslora' = 1.*true or false"),
    "bias": ({"bias": "all"}, "'bias' = 'all'.*expected 'none'"),
    "dora": ({"use_dora": True}, "'use_dora' = True.*expected False, by its tensors"),
    "infinite": ({"lora_alpha": float("inf")}, "'lora_alpha' = inf.*expected a number"),
    "dropout": ({"lora_dropout": 7}, "'lora_dropout' = 7.*below 1"),
    "slow": ({"alpha_pattern": {"(([a-z0-9_.])*)*$X": 1}}, "not regular expressions"),
    "slow, too": ({"rank_pattern": {"(.|.)" * 40 + "X": 2}}, "not regular expressions"),
}


def rewrite(source, target, settings):
    """Copy a file of an adapter with other settings: changes of them, or the text itself."""
    with safe_open(source, "pt") as file:
        known = json.loads(file.metadata()["lora_adapter_metadata"])
    if isinstance(settings, dict):
        settings = known | {f"transformer.{name}": value for name, value in settings.items()}
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(load_file(source), target, {"lora_adapter_metadata": text})
    return target


@pytest.mark.parametrize(("settings", "message"), HOSTILE.values(), ids=HOSTILE)
def test_settings_that_contradict_the_tensors_are_refused(pipe, files, tmp_path, settings, message):
    file = rewrite(files / "first" / NAME, tmp_path / NAME, settings)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(file)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": "(([a-z0-9_.])*)*$X"},  # would be matched for ever
        {"target_modules": r".*\.(to_qkv|to_k|to_out\.0|proj)"},
        {"target_modules": ["to_q"]},
        {"target_modules": None},
        {"target_modules": {"to_qkv": {}}},
        {"exclude_modules": "((.)*)*X"},
        {"layers_to_transform": [1], "layers_pattern": "((.)*)*X"},
    ],
)
def test_the_tensors_say_which_layers_have_an_adapter(pipe, files, tmp_path, choice):
    pipe.load_lora_weights(files / "first" / NAME)
    expected = draw(pipe)
    other = tiny_pipeline()
    other.load_lora_weights(rewrite(files / "first" / NAME, tmp_path / NAME, choice))
    assert torch.equal(draw(other), expected)


def with_nan(tensors):
    return tensors | {name: tensors[name] * torch.nan for name in [list(tensors)[-1]]}


def of_two_ranks(tensors):
    return {name: t[:, :1].contiguous() if "lora_B" in name else t for name, t in tensors.items()}


def of_one_half(tensors):
    return dict(list(tensors.items())[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "has values that are not finite"),
        (of_two_ranks, "two halves of different rank"),
        (of_one_half, "lacks one half of the adapter of 'transformer"),
    ],
)
def test_unsound_tensors_are_refused(pipe, files, tmp_path, change, message):
    save_file(change(load_file(files / "first" / NAME)), tmp_path / NAME)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters() == {}


def kohya(tensors, alpha):
    """Return an adapter's tensors with kohya's names."""
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, half = name.removeprefix("transformer.").partition(".lora_")
        layer = "lora_unet_" + layer.replace(".", "_")
        renamed[f"{layer}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = tensor
        if alpha is not None:
            renamed[f"{layer}.alpha"] = torch.tensor(alpha)
    return renamed


@pytest.mark.parametrize(("alpha", "scale"), [(6.0, 1), (3.0, 0.5), (None, 1 / 3)])
def test_kohyas_names_are_converted(pipe, files, tmp_path, alpha, scale):
    pipe.load_lora_weights(files / "first" / NAME, adapter_name="a")  # rank 2, alpha 6
    pipe.set_adapters("a", scale)
    save_file(kohya(load_file(files / "first" / NAME), alpha), tmp_path / "kohya.safetensors")
    other = tiny_pipeline()
    other.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="a")
    close(draw(other), draw(pipe))
    other.load_lora_weights(files / "second" / NAME, adapter_name="b")  # adapters can be added


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_transformer_blocks_0_attn1_to_qkv.hada_w1_a", "'.*hada_w1_a' among kohya's"),
        ("lora_unet_transformer_blocks_0_attn1_to_qkv.dora_scale", "'.*dora_scale' among"),
        ("lora_unet_down_blocks_0_conv1.lora_down.weight", "another model: .* 'down_blocks_0_conv"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "also adapts a text encoder"),
    ],
)
def test_what_else_kohyas_files_hold_is_refused_by_name(pipe, files, tmp_path, name, message):
    tensors = kohya(load_file(files / "first" / NAME), 6.0) | {name: torch.ones(2, 2)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path / "kohya.safetensors")


def test_saving_a_missing_adapter_or_into_a_file_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="adapters are none; none was named"):
        pipe.save_lora_weights(tmp_path, pipe.transformer)
    add(pipe, "first"), add(pipe, "second")
    with pytest.raises(ValueError, match="adapters are 'first', 'second'; none was named"):
        pipe.save_lora_weights(tmp_path, pipe.transformer)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; expected a folder"):
        pipe.save_lora_weights(tmp_path / "file", pipe.transformer, adapter_name="first")
    pickled = {"adapter_name": "second", "safe_serialization": False}
    with pytest.raises(ValueError, match="safe_serialization=False has no place for the adapter's"):
        pipe.save_lora_weights(tmp_path, pipe.transformer, **pickled)
    pipe.save_lora_weights(tmp_path, pipe.transformer, adapter_name="second")
    assert load_file(tmp_path / NAME)
    pipe.save_lora_weights(tmp_path, load_file(tmp_path / NAME), safe_serialization=False)
    assert (tmp_path / NAME.replace(".safetensors", ".bin")).is_file()


def test_without_peft_the_error_is_one_line(pipe, files, monkeypatch):
    monkeypatch.setattr(saving, "USE_PEFT_BACKEND", False)
    with pytest.raises(ImportError, match=r"^LoRA needs peft .*: pip install 'localdit\[lora\]'$"):
        pipe.load_lora_weights(files / "first")


@pytest.mark.slow
def test_everything_else_works_without_peft():
    script = """
import importlib.util, sys
real = importlib.util.find_spec
is_peft = lambda name: name.split(".")[0] == "peft"
importlib.util.find_spec = lambda name, *more: None if is_peft(name) else real(name, *more)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if is_peft(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from tests.tiny import tiny_pipeline
pipe = tiny_pipeline()
pipe("a cat", num_inference_steps=1)
assert "peft" not in sys.modules
try:
    pipe.load_lora_weights("somewhere")
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("LoRA needs peft")
