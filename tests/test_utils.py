"""`load_model` from every kind of source, and its errors about missing parts."""

import importlib.metadata
import importlib.util
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

import localdit
from localdit import utils
from localdit.checkpoint import convert_to_single_file
from localdit.config import Config
from localdit.models import LocalDiTTransformer2DModel
from localdit.pipelines import LocalDiTPipeline
from localdit.utils import DOWNLOAD_COMMAND, load_model, model_in_the_box
from tests.tiny import tiny_components

SIZES = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "sample_size": 8,
    "window_size": 2,
    "caption_channels": 16,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders laid out as the released model's sources: checkpoints, T5, VAE and scheduler."""
    root = tmp_path_factory.mktemp("hub")
    parts = tiny_components(use_additional_conditions=False)
    LocalDiTPipeline(**parts).save_pretrained(root / "pipeline")
    parts["transformer"].save_pretrained(root / "transformer")
    weights = parts["transformer"].state_dict()
    save_file(weights, root / "weights.safetensors")
    torch.save(weights, root / "weights.pt")
    parts["text_encoder"].save_pretrained(root / "t5")
    parts["tokenizer"].save_pretrained(root / "t5")
    parts["vae"].save_pretrained(root / "repository" / "vae")
    parts["scheduler"].save_pretrained(root / "repository" / "scheduler")
    return root


def local_config(hub, checkpoint, **changes):
    sources = {
        "ckpt_path": hub / checkpoint,
        "text_encoder": hub / "t5",
        "vae": str(hub / "repository"),
        "scheduler": hub / "repository",
    }
    return Config(**(SIZES | sources | changes))


@pytest.mark.parametrize(
    "checkpoint", ["pipeline", "transformer", "weights.safetensors", "weights.pt"]
)
def test_every_kind_of_checkpoint_gives_the_same_model(hub, checkpoint):
    config = Config(ckpt_path=hub / "pipeline")
    if checkpoint != "pipeline":
        config = local_config(hub, checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = load_model(config, device="cpu")
    parts = tiny_components(use_additional_conditions=False)
    for name in ("transformer", "vae", "text_encoder"):
        loaded = getattr(pipe, name)
        assert loaded.dtype == torch.float32
        assert not loaded.training
        expected = parts[name].state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for key, tensor in loaded.state_dict().items():
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)
    assert pipe.transformer.config.window_size == 2
    scheduler = pipe.scheduler.config
    assert pipe.scheduler.__class__.__name__ == "DPMSolverMultistepScheduler"
    assert (scheduler.beta_start, scheduler.beta_end) == (0.0001, 0.02)
    assert (scheduler.beta_schedule, scheduler.prediction_type) == ("linear", "epsilon")
    assert pipe.tokenizer("a red circle").input_ids[-1] == 1


def test_other_local_layouts(hub):
    """A pipeline folder also holds a T5, and a VAE may have a separate folder."""
    config = local_config(
        hub,
        "transformer",
        text_encoder=hub / "pipeline",
        vae=hub / "repository" / "vae",
        scheduler=hub / "repository" / "scheduler",
    )
    assert load_model(config, device="cpu").vae.config.latent_channels == 4


@pytest.mark.parametrize(("named", "loaded"), [
    ("LCMScheduler", "LCMScheduler"),
    ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
    ("UNet2DModel", "DPMSolverMultistepScheduler"),
    (None, "DPMSolverMultistepScheduler"),
])  # fmt: skip
def test_the_scheduler_is_the_one_that_its_folder_names(hub, tmp_path, named, loaded):
    config = {"prediction_type": "epsilon"} | ({"_class_name": named} if named else {})
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    pipe = load_model(local_config(hub, "weights.safetensors", scheduler=tmp_path), device="cpu")
    assert type(pipe.scheduler).__name__ == loaded


def same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    return all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.parametrize("shared", [False, True])
def test_parts_that_the_config_names_replace_those_of_a_pipeline_folder(hub, tmp_path, shared):
    other = tiny_components(seed=1, use_additional_conditions=False)
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        other[name].save_pretrained(tmp_path / name)
    scheduler = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    folder = hub / "pipeline"
    if shared:  # a student that takes the other parts from its teacher
        teacher = shutil.copytree(folder, tmp_path / "teacher")
        folder = teacher / "student"
        folder.mkdir()
        for name in ("transformer", "scheduler"):
            (teacher / name).rename(folder / name)
        index = json.loads((hub / "pipeline/model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_shares_parts": True}))
    before = load_model(Config(ckpt_path=folder), device="cpu")
    for name in ("vae", "text_encoder", "scheduler"):
        pipe = load_model(Config(ckpt_path=folder, **{name: tmp_path}), device="cpu")
        for part in ("vae", "text_encoder"):
            expected = other[part] if part == name else getattr(before, part)
            assert same_weights(getattr(pipe, part), expected)
        euler = name == "scheduler"
        assert type(pipe.scheduler).__name__.startswith("Euler" if euler else "DPMSolver")
        assert same_weights(pipe.transformer, before.transformer)


def test_the_defaults_of_a_derived_config_leave_a_pipeline_folder_its_parts(hub, tmp_path):
    """They are for checkpoints without parts: the model in the box goes on to work beside them."""

    @dataclass(kw_only=True)
    class Local(Config):
        text_encoder: str | Path = tmp_path
        vae: str | Path = tmp_path
        scheduler: str | Path = tmp_path

    load_model(Local(ckpt_path=hub / "pipeline"), device="cpu")
    with pytest.raises(FileNotFoundError, match=f"Config.scheduler: {tmp_path} lacks files"):
        load_model(Local(**SIZES, ckpt_path=hub / "transformer"), device="cpu")


@pytest.mark.parametrize("name", ["vae", "text_encoder", "scheduler"])
def test_a_missing_part_is_refused_beside_a_whole_pipeline_folder(hub, tmp_path, name):
    config = Config(ckpt_path=hub / "pipeline", **{name: tmp_path})
    with pytest.raises(FileNotFoundError, match=rf"Config\.{name}: {tmp_path} lacks files"):
        load_model(config, device="cpu")


@pytest.mark.parametrize("checkpoint", ["pipeline", "transformer"])
def test_the_sampler_of_the_config_replaces_the_scheduler(hub, checkpoint, monkeypatch):
    config = local_config(hub, checkpoint, sampler="euler")
    assert type(load_model(config, device="cpu").scheduler).__name__ == "EulerDiscreteScheduler"
    monkeypatch.setattr(LocalDiTTransformer2DModel, "from_pretrained", None)
    config.sampler = "eular"
    with pytest.raises(ValueError, match=r"Config\.sampler is 'eular', and there is no sampler"):
        load_model(config, device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(hub, dtype):
    pipe = load_model(local_config(hub, "transformer"), "cpu", dtype)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_config_that_contradicts_the_tensors(hub):
    config = local_config(hub, "weights.safetensors", num_layers=3, use_global=True)
    with pytest.raises(ValueError, match="weights.safetensors is of another model") as raised:
        load_model(config, device="cpu")
    message = str(raised.value)
    assert "the Config with num_layers=3, use_global=True" in message
    assert message.endswith("Config(num_layers=2, use_global=False)")


def test_config_that_contradicts_the_configuration_in_the_file(hub, tmp_path):
    """No tensor shows these values, so a contradiction would go unnoticed."""
    file = tmp_path / "single.safetensors"
    convert_to_single_file(hub / "transformer", file)
    assert load_model(local_config(hub, file), device="cpu").transformer.config.sample_size == 8
    config = local_config(hub, file, sample_size=16, shift_schedule="alternating", eps=1e-5)
    with pytest.raises(ValueError, match="shift_schedule='alternating'") as raised:
        load_model(config, device="cpu")
    expected = "Config(shift_schedule='cyclic', sample_size=8, eps=1e-10)"
    assert str(raised.value).endswith(expected)


def test_a_missing_checkpoint_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        load_model(Config(ckpt_path=tmp_path / "LocalDiT-1024.pt"))
    assert DOWNLOAD_COMMAND in str(raised.value)
    assert DOWNLOAD_COMMAND == (
        "wget https://huggingface.co/DATAGRID-research/DATAGRID-Local-Attention-DiT-v1.0.0-0.52B"
        "/resolve/main/LocalDiT-1024.pt -P output/"
    )
    with pytest.raises(FileNotFoundError, match=r"neither model_index\.json"):
        load_model(Config(ckpt_path=tmp_path))


@pytest.mark.parametrize(
    ("removed", "field", "wanted"),
    [
        ("t5/model.safetensors", "text_encoder", "config.json and model*.safetensors"),
        ("t5/tokenizer_config.json", "text_encoder", "tokenizer_config.json and tokenizer.json"),
        ("repository/vae/config.json", "vae", "vae/config.json and vae/diffusion_pytorch_model"),
        ("repository/scheduler", "scheduler", "scheduler/scheduler_config.json"),
    ],
)
def test_local_copies_are_checked_before_anything_is_loaded(
    hub, tmp_path, monkeypatch, removed, field, wanted
):
    copy = tmp_path / "hub"
    shutil.copytree(hub, copy)
    target = copy / removed
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    monkeypatch.setattr(utils, "_load_transformer", lambda *args: pytest.fail("loaded"))
    with pytest.raises(FileNotFoundError) as raised:
        load_model(local_config(copy, "transformer"), device="cpu")
    message = str(raised.value)
    assert message.startswith(f"Config.{field}: {copy}")
    assert wanted in message


def test_a_missing_folder_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("asked"))
    for source in (tmp_path / "gone", "./gone", "~/gone", "a/b/c", "gone"):
        config = local_config(hub, "transformer", vae=source)
        with pytest.raises(
            FileNotFoundError, match=r"Config\.vae: there is no folder .*gone|a/b/c"
        ):
            load_model(config, device="cpu")


def test_the_error_when_the_hub_is_unreachable(hub, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    config = Config(ckpt_path=hub / "transformer")
    with pytest.raises(OSError, match="could not be fetched") as raised:
        load_model(config, device="cpu")
    message = str(raised.value)
    assert "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers" in message
    assert "scheduler/scheduler_config.json" in message
    assert "Network is unreachable" in message
    assert "Config(scheduler='/path/to/that/folder')" in message
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_the_hub_in_offline_mode(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = local_config(hub, "transformer", text_encoder="google/flan-t5-xxl")
    with pytest.raises(OSError, match="google/flan-t5-xxl could not be fetched") as raised:
        load_model(config, device="cpu")
    assert "tokenizer_config.json and tokenizer.json or spiece.model" in str(raised.value)


def test_impossible_devices_dtypes_and_options_are_refused(hub, monkeypatch):
    def attempt(**changes):
        device, dtype = changes.pop("device", "cpu"), changes.pop("dtype", None)
        load_model(local_config(hub, "transformer", **changes), device, dtype)

    for device in ("cuda", "mps", "cpu:3", "abacus", "meta", "xpu", torch.device("meta")):
        with pytest.raises(ValueError, match=f"device is '{device}'"):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
            attempt(device=device)
    for dtype in ("float64", torch.int8, "half-ish"):
        with pytest.raises(ValueError, match="expected 'float32', 'bfloat16' or 'float16'"):
            attempt(dtype=dtype)
    for offload in ("model", "sequential"):
        with pytest.raises(ValueError, match=rf"Config\.offload is '{offload}'"):
            attempt(offload=offload)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'4bit' needs bitsandbytes: pip install bitsandbytes"):
        attempt(text_encoder_quantization="4bit")


def test_sequential_offload_and_quantization_exclude_each_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    config = Config(offload="sequential", text_encoder_quantization="8bit")
    with pytest.raises(ValueError, match="can't move a quantized text encoder"):
        load_model(config, device="cuda")
    with pytest.raises(ValueError, match="device is 'cuda:1', but PyTorch finds no such device"):
        load_model(config, device="cuda:1")


@pytest.mark.parametrize(("device", "bf16"), [("cuda", True), ("cuda", False), ("mps", None)])
def test_default_device_and_dtype(monkeypatch, device, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    resolved = utils.resolve_device(None)
    assert resolved.type == device
    expected = torch.bfloat16 if bf16 else torch.float16
    assert utils.resolve_dtype(None, resolved) == expected


@pytest.mark.parametrize(
    ("offload", "expected"), [("model", "model"), ("sequential", "sequential")]
)
def test_the_pipeline_is_offloaded(hub, monkeypatch, offload, expected):
    calls = []
    monkeypatch.setattr(utils, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for kind in ("model", "sequential"):
        monkeypatch.setattr(
            LocalDiTPipeline,
            f"enable_{kind}_cpu_offload",
            lambda self, device, kind=kind: calls.append((kind, device.type)),
        )
    pipe = load_model(local_config(hub, "transformer", offload=offload))
    assert calls == [(offload, "cuda")]
    assert pipe.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("checkpoint", "changes", "subfolder"),
    [
        ("pipeline", {"text_encoder": Config.text_encoder}, "text_encoder"),
        ("pipeline", {}, ""),  # the Config's own
        ("transformer", {}, ""),
    ],
)
def test_transformers_quantizes_the_text_encoder(hub, monkeypatch, checkpoint, changes, subfolder):
    from transformers import T5EncoderModel

    seen = {}
    encoder = tiny_components()["text_encoder"]

    def from_pretrained(**options):
        seen.update(options)
        return encoder

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find_spec(name)
    )
    # Transformers 4 looks at the installed version as well.
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: "1.0" if n == "bitsandbytes" else version(n)
    )
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", from_pretrained)
    config = local_config(hub, checkpoint, text_encoder_quantization="4bit", **changes)
    pipe = load_model(config, device="cpu")
    assert pipe.text_encoder is encoder
    quantization = seen["quantization_config"]
    assert quantization.load_in_4bit
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert seen["device_map"] == {"": torch.device("cpu")}
    assert seen["subfolder"] == subfolder


def test_the_model_in_the_box_is_a_folder_of_the_package(monkeypatch, tmp_path):
    assert Path(localdit.__file__).parent / "box" == utils.BOX
    monkeypatch.setattr(utils, "BOX", tmp_path / "box")
    with pytest.raises(FileNotFoundError, match="has no model in it"):
        model_in_the_box()
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "model_index.json").write_text("{}")
    assert model_in_the_box() == tmp_path / "box"
    with pytest.raises(FileNotFoundError, match="few_steps is missing"):
        model_in_the_box(few_steps=True)
