from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localdit.checkpoint import convert_to_single_file
from localdit.config import Config
from localdit.models import LocalDiTTransformer2DModel
from localdit.pipelines import LocalDiTInpaintPipeline, LocalDiTPipeline
from tests.tiny import tiny_components


@pytest.fixture(scope="module")
def parts():
    return tiny_components()


@pytest.fixture(scope="module", params=["safetensors", "pt", "pth"])
def checkpoint(request, parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("flat") / "model.safetensors"
    convert_to_single_file(parts["transformer"], path)
    if request.param == "safetensors":
        return path
    torch.save(load_file(path), path.with_suffix(f".{request.param}"))
    return path.with_suffix(f".{request.param}")


@pytest.fixture
def settings(checkpoint, parts):
    """The arguments that do not follow from the tensors of a file."""
    if checkpoint.suffix == ".safetensors":
        return {}
    names = ("num_attention_heads", "attention_head_dim", "sample_size")
    return {name: parts["transformer"].config[name] for name in names}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_parts_come_from_a_pipelines_folder(checkpoint, settings, parts, tmp_path):
    LocalDiTPipeline(**tiny_components(seed=1)).save_pretrained(tmp_path)
    pipe = LocalDiTInpaintPipeline.from_single_file(checkpoint, config=tmp_path, **settings)
    assert type(pipe) is LocalDiTInpaintPipeline
    assert torch.equal(weights(pipe.transformer), weights(parts["transformer"]))
    other = tiny_components(seed=1)
    assert torch.equal(weights(pipe.vae), weights(other["vae"]))
    given = LocalDiTPipeline.from_single_file(
        checkpoint, config=tmp_path, vae=parts["vae"], **settings
    )
    assert given.vae is parts["vae"]


def test_the_parts_may_be_given(checkpoint, settings, parts):
    others = {name: part for name, part in parts.items() if name != "transformer"}
    pipe = LocalDiTPipeline.from_single_file(
        checkpoint, torch_dtype=torch.bfloat16, **others, **settings
    )
    assert pipe.transformer.dtype == torch.bfloat16
    assert all(pipe.components[name] is part for name, part in others.items())


def test_the_parts_are_those_of_the_released_model_by_default(
    checkpoint, settings, parts, tmp_path, monkeypatch
):
    LocalDiTPipeline(**parts).save_pretrained(tmp_path)

    monkeypatch.setattr(
        "localdit.pipelines.saving.Config",
        lambda: Config(text_encoder=tmp_path, vae=tmp_path, scheduler=tmp_path),
    )
    pipe = LocalDiTPipeline.from_single_file(checkpoint, **settings)
    assert torch.equal(weights(pipe.text_encoder), weights(parts["text_encoder"]))
    assert pipe("a cat", num_inference_steps=1, output_type="pt").images.isfinite().all()


def test_missing_parts_are_reported_before_anything_is_loaded(parts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="give from_single_file a pipeline as `config`, or the parts"):
        LocalDiTPipeline.from_single_file("there/is/none.pt", local_files_only=True)


def test_unknown_arguments_are_refused(checkpoint, settings, parts):
    others = {name: part for name, part in parts.items() if name != "transformer"}
    with pytest.raises(TypeError, match="tokenisor"):
        LocalDiTPipeline.from_single_file(checkpoint, tokenisor=None, **others, **settings)


def test_a_file_of_the_hub_is_downloaded(parts, tmp_path, monkeypatch):
    convert_to_single_file(parts["transformer"], tmp_path / "model.safetensors")
    asked = []

    def hf_hub_download(repository, name, **options):
        asked.append((repository, name, options))
        return str(tmp_path / Path(name).name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    model = LocalDiTTransformer2DModel.from_single_file(
        "https://huggingface.co/someone/boats/blob/v2/weights/model.safetensors",
        local_files_only=True,
    )
    assert torch.equal(weights(model), weights(parts["transformer"]))
    options = {"revision": "v2", "local_files_only": True}
    assert asked == [("someone/boats", "weights/model.safetensors", options)]
    with pytest.raises(ValueError, match="not a file on the Hugging Face hub"):
        LocalDiTTransformer2DModel.from_single_file("https://example.org/model.safetensors")
