"""`localdit info` of files, folders, pictures and the machine."""

import json
import shutil
from importlib import metadata

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from localdit.cli import main
from localdit.cli.info import window_attention_path
from localdit.images import save_image
from localdit.machine import processor
from localdit.training.checkpointing import verified_folder
from tests.checkpoint.flat import flat_state, released_state, tiny_model


@pytest.fixture
def info(capsys):
    """The output of `localdit info --json`."""

    def run(*argv):
        shows_machine = "--verify" not in argv and "a.png" not in argv
        device = ["--device", "cpu"] if shows_machine else []
        assert main(["info", "--json", *device, *map(str, argv)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_released_kind_of_file(here, info):
    model = tiny_model(window_size=4)
    save_file(released_state(model), "w.safetensors")
    facts = info("w.safetensors")["w.safetensors"]
    dead = 2 * 5 * (24 * 24 + 24)
    biases = 2 * 7 * 7 * 2  # what the file lacks
    assert facts["dead"] == dead
    assert facts["live"] == count(model) - biases
    assert facts["parameters"] == facts["live"] + dead
    assert "2 x transformer_blocks.*.attn1.to_q.weight" in facts["dead tensors"]
    assert any(text.startswith("global context, in 2 layers") for text in facts["missing"])
    assert any(text.startswith("relative position bias, in 2") for text in facts["missing"])
    assert any("--text-encoder" in text for text in facts["elsewhere"])


def test_a_file_that_localdit_wrote(here, info):
    model = tiny_model(use_global=True)
    torch.save(flat_state(model), "w.pt")
    facts = info("w.pt")["w.pt"]
    assert facts["kind"] == "checkpoint file (.pt)"
    assert (facts["live"], facts["dead"], facts["missing"]) == (count(model), 0, "nothing")
    assert "with global context" in facts["model"]


def test_layer_types_are_counted(here, info):
    model = tiny_model(layer_types="local full")
    model.save_pretrained("folder")
    assert "2 layers (1 local, 1 full) of 2 heads" in info("folder")["folder"]["model"]


def test_a_lora(here, info):
    name = "transformer.transformer_blocks.{}.attn1.to_qkv.lora_{}.weight"
    state = {name.format(layer, half): torch.zeros(4, 24) for layer in (0, 1) for half in "AB"}
    save_file(state, "lora.safetensors")
    facts = info("lora.safetensors")["lora.safetensors"]
    assert (facts["kind"], facts["rank"], facts["parameters"]) == ("LoRA", "4", 4 * 4 * 24)
    assert facts["changes"] == ["2 x transformer.transformer_blocks.*.attn1.to_qkv"]
    (here / "final").mkdir()
    (here / "lora.safetensors").rename(here / "final/pytorch_lora_weights.safetensors")
    expected = {"file": "pytorch_lora_weights.safetensors", **facts}
    assert info("final")["final"] == expected


def test_a_pipeline(model, info):
    from localdit import LocalDiTPipeline

    found = info(model)
    pipe = LocalDiTPipeline.from_pretrained(model)
    assert found[str(model)]["missing"] == "nothing"
    assert found["transformer"]["parameters"] == count(pipe.transformer)
    assert found["vae"]["parameters"] == count(pipe.vae)
    assert found["transformer"]["dtype"] == "float32"
    assert "3 heads x 8 channels, windows of 2 x 2" in found["transformer"]["model"]
    settings = {"num_inference_steps": 20, "guidance_scale": 7.0}
    assert found[str(model)] | settings == found[str(model)]
    assert found["scheduler"]["samplers"].startswith("dpm++2m, ")


@pytest.mark.parametrize(
    "saved", [{"safe_serialization": False}, {"max_shard_size": "20KB"}], ids=["bin", "shards"]
)
def test_the_weights_of_a_pipeline_are_those_that_load(model, here, info, saved):
    """Also as `.bin` and in shards; other files beside them do not count."""
    from localdit import LocalDiTPipeline

    expected = info(model)
    pipe = LocalDiTPipeline.from_pretrained(model)
    pipe.save_pretrained("saved", **saved)
    pipe.vae.save_pretrained("saved/vae", variant="fp16")
    save_file({"other": torch.zeros(5)}, "saved/transformer/other.safetensors")
    found = info("saved")
    for part in ("transformer", "vae", "text_encoder"):
        for fact in {"missing", "parameters", "dtype"} & expected[part].keys():
            assert found[part][fact] == expected[part][fact], (part, fact)
    for file in here.glob("saved/text_encoder/*model*"):
        file.unlink()
    assert "parameters" not in info("saved")["text_encoder"]


def test_a_pipeline_without_all_its_parts(model, here, info):
    shutil.copytree(model, "part")
    shutil.rmtree("part/text_encoder")
    (here / "part/transformer/diffusion_pytorch_model.safetensors").unlink()
    found = info("part")
    assert found["part"]["missing"] == ["text_encoder"]
    assert found["transformer"]["missing"] == "all weights"


def test_a_transformer_with_dead_and_missing_tensors(here, info):
    tiny_model().save_pretrained("t")
    state = tiny_model().state_dict()
    bias = state.pop("proj_out.bias")
    save_file(state | {"stale": bias}, "t/diffusion_pytorch_model.safetensors")
    facts = info("t")["t"]
    assert (facts["dead"], facts["dead tensors"]) == (bias.numel(), ["1 x stale"])
    assert facts["missing"] == "'proj_out.bias'"


def test_a_picture_shows_its_settings(here, info):
    save_image(Image.new("RGB", (4, 4)), "a.png", {"prompt": "a cat", "seed": 12345})
    assert info("a.png") == {"a.png": {"prompt": "a cat", "seed": 12345}}
    assert main(["info", "a.png"]) == 0


def test_the_machine(info, capsys):
    ((title, facts),) = info("--dtype", "bfloat16").items()
    assert title == "machine"
    assert (facts["device"], facts["chosen"]) == ("cpu", "as requested")
    assert facts["name"].endswith(processor())
    assert facts["dtype"] == "bfloat16"
    assert facts["window attention"] == "torch" and "not on cpu" in facts["because"]
    assert facts["versions"]["torch"] == metadata.version("torch")


def test_the_text_output(here, capsys):
    save_image(Image.new("RGB", (4, 4)), "a.png", {"prompt": "a cat", "seed": 12345})
    assert main(["info", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png\n  prompt  a cat\n  seed    12345\n"
    save_image(Image.new("RGB", (4, 4)), "a.png", {"a": True, "b": [], "c": 1000, "d": [1, False]})
    assert main(["info", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == ["  a  True", "  b  none", "  c  1,000", "  d  1", "     False"]


def test_the_reason_for_the_implementation():
    backend, why = window_attention_path(torch.device("cpu"), torch.float32, 4, 16, 72)
    assert backend == "torch" and "CUDA" in why
    assert (
        "not in torch.float64"
        in window_attention_path(torch.device("cpu"), torch.float64, 4, 16, 72)[1]
    )


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["gone.pt"], 2, "there is no gone.pt"),
        (["--device", "cuda:77"], 2, "--device is 'cuda:77'"),
        (["picture.png", "--device", "cpu"], 2, "which is not shown for a PNG; leave"),
        (["picture.png", "--dtype", "float32"], 2, "--dtype is for the description of this"),
        ([".", "--verify", "--device", "cuda"], 2, "which is not shown with --verify; leave"),
        (["."], 1, "has no 'config.json'"),
        (["run"], 1, "run is the folder of a training run. Name its result, run/final, or one of"),
        (["page.pt"], 1, "a web page"),
        (["deep"], 1, "model_index.json is no JSON object"),
    ],
)
def test_mistakes_and_damaged_files(here, capsys, argv, status, message):
    (here / "page.pt").write_text("<html>404</html>")
    (here / "run").mkdir()
    (here / "run/config.json").write_text('{"data_root": "pictures"}')
    (here / "deep").mkdir()
    (here / "deep/model_index.json").write_text('{"a": ' * 100_000)
    (here / "picture.png").touch()
    assert main(["info", *argv]) == status
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert message in said.err


def test_verify_compares_a_folder_with_its_manifest(here, capsys, info):
    with verified_folder(here / "final", 6) as folder:
        (folder / "transformer").mkdir()
        (folder / "transformer/weights").write_bytes(b"weights")
        (folder / "vae").symlink_to(here)
    facts = info("--verify", "final")["final"]
    assert facts.pop("links, which are not verified") == ["vae"]
    assert facts == {"verified": "1 files agree with manifest.json", "bytes": 7, "step": 6}
    (here / "final/more").write_text("more")
    assert info("--verify", "final")["final"]["added later, which resuming does not read"] == [
        "more"
    ]
    (here / "final/transformer/weights").write_bytes(b"weight5")
    assert main(["info", "--verify", "final"]) == 1
    assert "error: final: transformer/weights is damaged" in capsys.readouterr().err
    for wrong in (["vae"], [], ["final/transformer/weights"]):
        (here / "vae").mkdir(exist_ok=True)
        assert main(["info", "--verify", *wrong]) == 2
        assert "--verify expects a training checkpoint" in capsys.readouterr().err
