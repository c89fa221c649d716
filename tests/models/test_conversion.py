"""Conversion between checkpoint files and Diffusers folders, bit for bit, or nothing is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from localdit.checkpoint import (
    convert_to_diffusers,
    convert_to_single_file,
    inspect_checkpoint,
    load_transformer,
)
from localdit.cli import main
from localdit.models import LocalDiTTransformer2DModel
from tests.checkpoint.flat import flat_state, output, released_state, tiny_model


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(flat_state(tiny_model(use_global=True)), path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_global": True},
        {"use_global": True, "layer_types": ["full", "local_global"], "do_rope": False},
        {"layer_types": ["full", "full"], "sample_size": 32, "shift_schedule": "alternating"},
        {"layer_types": "local_pooled full"},
    ],
)
def test_folder_to_file_to_folder_is_bit_exact(kind, dtype, tmp_path):
    model = tiny_model(**kind).to(dtype)
    model.save_pretrained(tmp_path / "first")
    convert_to_single_file(tmp_path / "first", tmp_path / "w.safetensors")
    assert same(load_file(tmp_path / "w.safetensors"), flat_state(model))
    convert_to_diffusers(tmp_path / "w.safetensors", tmp_path / "second")
    again = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "second", torch_dtype=dtype)
    assert same(again.state_dict(), model.state_dict())
    for name in ("do_rope", "sample_size", "shift_schedule", "layer_types", "window_size"):
        assert again.config[name] == model.config[name]
    if dtype is torch.float32 and model.use_additional_conditions:
        assert torch.equal(output(again), output(model))


def test_a_released_checkpoint_round_trips_once_it_is_folded(tmp_path):
    save_file(released_state(tiny_model(window_size=4)), tmp_path / "released.safetensors")
    report = convert_to_diffusers(tmp_path / "released.safetensors", tmp_path / "folder")
    assert report.folded_layers == (0, 1) and report.dead_values == 2 * 5 * (24 * 24 + 24)
    report = convert_to_single_file(tmp_path / "folder", tmp_path / "w.safetensors")
    assert not report.folded_layers + report.zeroed_layers + report.dead_names
    folded = load_transformer(tmp_path / "released.safetensors")
    assert same(load_transformer(tmp_path / "w.safetensors").state_dict(), folded.state_dict())

    convert_to_diffusers(
        tmp_path / "released.safetensors", tmp_path / "drawn", global_context="draw", seed=3
    )
    assert LocalDiTTransformer2DModel.from_pretrained(tmp_path / "drawn").config.use_global


def test_models_pipeline_folders_and_shards_can_be_converted(tmp_path):
    model = tiny_model()
    convert_to_single_file(model, tmp_path / "a.safetensors")
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="10KB")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    convert_to_single_file(tmp_path / "pipeline", tmp_path / "b.safetensors")
    a, b = (safe_open(tmp_path / f"{name}.safetensors", "pt") for name in "ab")
    assert a.metadata() == b.metadata()
    assert same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


def test_a_model_is_converted_as_it_would_be_saved(tmp_path):
    """Without what `torch.compile` and fused projections add; not at all with adapters."""
    peft = pytest.importorskip("peft")
    model = tiny_model()
    convert_to_single_file(model, tmp_path / "a.safetensors")
    model.fuse_qkv_projections()
    convert_to_single_file(torch.compile(model), tmp_path / "b.safetensors")
    a, b = (load_transformer(tmp_path / f"{name}.safetensors") for name in "ab")
    assert same(a.state_dict(), b.state_dict())
    model.unfuse_qkv_projections()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_qkv"]))
    model.fuse_lora()
    with pytest.raises(ValueError, match="has adapters.*unload_lora_weights"):
        convert_to_single_file(model, tmp_path / "new" / "c.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_paths_may_start_with_the_home_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    convert_to_diffusers("~/w.pt", "~/folder")
    report = convert_to_single_file("~/folder", "~/a.safetensors")
    assert report == inspect_checkpoint("~/a.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"w.pt", "folder", "a.safetensors"}


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.safetensors", "a.png"])
def test_a_folder_is_not_named_like_a_file(checkpoint, tmp_path, capsys, name):
    assert main(["convert", str(checkpoint), str(tmp_path / name)]) == 2
    assert f"{name} is named like a file, but would be a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="named like a file"):
        convert_to_diffusers(checkpoint, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_conversion_can_change_the_dtype(checkpoint, tmp_path):
    convert_to_diffusers(checkpoint, tmp_path / "folder", torch_dtype=torch.float16)
    stored = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    path = tmp_path / "w.safetensors"
    report = convert_to_single_file(tmp_path / "folder", path, torch_dtype=torch.bfloat16)
    assert report.dtype == "bfloat16"


def test_existing_files_are_kept_without_overwrite(checkpoint, tmp_path):
    folder, path = tmp_path / "folder", tmp_path / "w.safetensors"
    convert_to_diffusers(checkpoint, folder)
    convert_to_single_file(folder, path)
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_to_diffusers(checkpoint, folder)
    with pytest.raises(FileExistsError, match="already exists"):
        convert_to_single_file(folder, path)
    (folder / "diffusion_pytorch_model.fp16.safetensors").touch()
    convert_to_diffusers(checkpoint, folder, overwrite=True)
    convert_to_single_file(folder, path, overwrite=True)
    names = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {each.name for each in folder.iterdir()} == names
    assert {each.name for each in tmp_path.iterdir()} == {"folder", "w.safetensors", "w.pt"}


def test_names_may_have_255_bytes(checkpoint, tmp_path):
    folder, path = tmp_path / ("\u00e9" * 127), tmp_path / f"{'a' * 243}.safetensors"
    convert_to_diffusers(checkpoint, folder)
    convert_to_single_file(folder, path)
    assert {each.name for each in tmp_path.iterdir()} == {folder.name, path.name, "w.pt"}


def test_another_folder_is_never_overwritten(checkpoint, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(FileExistsError, match="something else than a LocalDiT transformer"):
        convert_to_diffusers(checkpoint, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"


@pytest.mark.parametrize("name", ["notes.txt", "other.safetensors", "sub/a", ".git/HEAD"])
def test_files_beside_a_transformer_are_not_deleted(checkpoint, tmp_path, capsys, name):
    folder = tmp_path / "folder"
    convert_to_diffusers(checkpoint, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"else than a .*'{name.split('/')[0]}'"):
        convert_to_diffusers(checkpoint, folder, overwrite=True)
    assert main(["convert", str(checkpoint), str(folder), "--overwrite"]) == 2
    assert (folder / name).read_text() == "mine"


def test_a_conversion_does_not_delete_its_input(checkpoint, tmp_path, capsys):
    folder, link = tmp_path / "folder", tmp_path / "link"
    convert_to_diffusers(checkpoint, folder)
    link.symlink_to(folder, target_is_directory=True)
    weights = folder / "diffusion_pytorch_model.safetensors"
    for place in (weights, link / weights.name):
        with pytest.raises(FileExistsError, match="would belong to the model in"):
            convert_to_single_file(folder, place, overwrite=True)
    convert_to_single_file(folder, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").replace(weights)  # a checkpoint of this name
    assert main(["convert", str(weights), str(link), "--overwrite"]) == 2
    assert "which is to be converted" in capsys.readouterr().err
    assert weights.exists()


@pytest.mark.parametrize("appears", ["folder/notes.txt", "folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_during_a_conversion_is_kept(
    checkpoint, tmp_path, monkeypatch, appears, overwrite
):
    folder, path = tmp_path / "folder", tmp_path / "w.safetensors"
    save = LocalDiTTransformer2DModel.save_pretrained

    def meanwhile(self, where):
        save(self, where)
        (tmp_path / appears).parent.mkdir(exist_ok=True)
        (tmp_path / appears).write_text("mine")

    monkeypatch.setattr(LocalDiTTransformer2DModel, "save_pretrained", meanwhile)
    with pytest.raises(FileExistsError, match="not empty|is a file|something else"):
        convert_to_diffusers(checkpoint, folder, overwrite=overwrite)
    assert (tmp_path / appears).read_text() == "mine"

    def write(state, where, metadata):
        save_file(state, where, metadata=metadata)
        path.write_text("mine")

    monkeypatch.setattr("localdit.models.conversion.save_file", write)
    if not overwrite:
        with pytest.raises(FileExistsError, match="already exists"):
            convert_to_single_file(tiny_model(), path)
        assert path.read_text() == "mine"


def test_a_failed_conversion_keeps_the_old_files(checkpoint, tmp_path, monkeypatch):
    folder, path = tmp_path / "folder", tmp_path / "w.safetensors"
    convert_to_diffusers(checkpoint, folder)
    convert_to_single_file(folder, path)
    before = path.read_bytes()

    def fail_half_way(self, where):
        (where / "config.json").write_text("{")
        raise OSError("No space left on device")

    def fail_in_the_file(state, where, metadata):
        Path(where).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(LocalDiTTransformer2DModel, "save_pretrained", fail_half_way)
    monkeypatch.setattr("localdit.models.conversion.save_file", fail_in_the_file)
    with pytest.raises(OSError, match="No space"):
        convert_to_diffusers(checkpoint, folder, overwrite=True)
    with pytest.raises(OSError, match="No space"):
        convert_to_single_file(folder, path, overwrite=True)
    LocalDiTTransformer2DModel.from_pretrained(folder)
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"folder", "w.safetensors", "w.pt"}


def test_dtypes_that_cannot_be_read_back_are_not_written(tmp_path, capsys):
    folder, path = tmp_path / "folder", tmp_path / "w.safetensors"
    tiny_model().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"proj_out.bias": state["proj_out.bias"].to(torch.float8_e4m3fn)}, weights)
    model = tiny_model().to(torch.float8_e4m3fn)
    for there in (False, True):
        for source in (folder, model):
            with pytest.raises(ValueError, match=r"is torch.float8_e4m3fn; .* pass torch_dtype="):
                convert_to_single_file(source, path, overwrite=there)
            assert path.exists() == there
        assert main(["convert", str(folder), str(path), "--overwrite"]) == 2
        assert f"{folder}: 'proj_out.bias' is" in (said := capsys.readouterr().err)
        assert "give --dtype float16" in said
        path.write_bytes(b"mine")
    assert path.read_bytes() == b"mine"
    assert main(["convert", str(folder), str(path), "--overwrite", "--dtype", "float16"]) == 0
    save_file(state | {"proj_out.bias": state["proj_out.bias"].to(torch.int8)}, weights)
    with pytest.raises(ValueError, match=r"'proj_out.bias' is torch.int8; .*float64\.$"):
        convert_to_single_file(folder, path, torch_dtype=torch.float16, overwrite=True)


def test_a_file_is_inspected_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    report = convert_to_single_file(tiny_model(), path)
    assert report == inspect_checkpoint(path) and report.path == path
    before = path.read_bytes()

    def refuse(where):
        raise ValueError("unreadable")

    monkeypatch.setattr("localdit.models.conversion.inspect_checkpoint", refuse)
    with pytest.raises(ValueError, match="unreadable"):
        convert_to_single_file(tiny_model(window_size=4), path, overwrite=True)
    assert path.read_bytes() == before


def test_incomplete_folders_are_refused(tmp_path):
    folder = tmp_path / "folder"
    tiny_model().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    config = json.loads((folder / "config.json").read_text())

    def refused(error, message):
        with pytest.raises(error, match=message):
            convert_to_single_file(folder, tmp_path / "w.safetensors")
        assert not (tmp_path / "w.safetensors").exists()

    state = load_file(weights)
    save_file({n: t for n, t in state.items() if n != "proj_out.bias"}, weights)
    refused(ValueError, "'proj_out.bias' missing, unexpected, or of another shape")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(ValueError, "diffusion_pytorch_model.safetensors is a truncated or damaged")
    weights.unlink()
    refused(FileNotFoundError, "lacks its weights 'diffusion_pytorch_model.safetensors'")
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    refused(ValueError, "holds a 'UNet2DModel'; expected 'LocalDiT")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "has no 'config.json'")
    with pytest.raises(ValueError, match=r"is not named '\*.safetensors'"):
        convert_to_single_file(folder, tmp_path / "w.pt")


def test_the_command_converts_in_both_directions(checkpoint, tmp_path, capsys):
    folder, path = tmp_path / "folder", tmp_path / "w.safetensors"
    assert main(["convert", str(checkpoint)]) == 0
    assert str(inspect_checkpoint(checkpoint)) in capsys.readouterr().out
    assert main(["convert", str(checkpoint), str(folder), "--dtype", "bfloat16"]) == 0
    assert "live values" in (out := capsys.readouterr().out) and f"Wrote {folder}" in out
    assert main(["convert", str(folder), str(path)]) == 0
    expected = {n: t.bfloat16() for n, t in torch.load(checkpoint, weights_only=True).items()}
    assert same(load_file(path), expected)


def test_the_command_reports_mistakes_in_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "page.pt").write_text("<html>404</html>")
    (tmp_path / "folder").mkdir()
    for arguments in (
        [tmp_path / "absent.pt", tmp_path / "new"],
        [tmp_path / "page.pt", tmp_path / "new"],
        [checkpoint, tmp_path / "new", "--global-context", "draw", "--seed", "1"],
        [tmp_path / "folder"],
        [tmp_path / "folder", tmp_path / "w.safetensors"],
        [checkpoint, checkpoint],
        [checkpoint, "--dtype", "float16"],
        [checkpoint, "--overwrite"],
    ):
        assert main(["convert", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("localdit convert: error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_command_distinguishes_failures_from_mistakes(tmp_path, capsys):
    state = flat_state(tiny_model())
    state["proj_out.bias"][0] = float("inf")
    save_file(state, tmp_path / "w.safetensors")
    argv = ["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "new")]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not finite" in said
    assert main([*argv, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_errors_of_the_command_name_its_options(checkpoint, tmp_path, capsys):
    assert main(["convert", str(checkpoint), str(tmp_path / "a"), "--global-context", "draw"]) == 2
    assert "--global-context" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(tmp_path / "a")]) == 0
    assert main(["convert", str(checkpoint), str(tmp_path / "a")]) == 2
    assert "or give --overwrite" in capsys.readouterr().err


# Folders that are damaged, or written to do harm


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "setting",
    [
        {"num_layers": 10**9},
        {"num_attention_heads": 10**9},
        {"attention_head_dim": -24},
        {"patch_size": 2**40},
        {"window_size": 10**9},
        {"sample_size": "big"},
        {"caption_channels": [16] * 1000},
        {"layer_types": ["local"] * 10**5},
        {"layer_types": "xxxxxxxxx"},
        {"norm_eps": None},
        {"dropout": True},
        {"interpolation_scale": 0},
        {"do_rope": "no"},
        {"activation_fn": {"a": {"b": 1}}},
    ],
)
@pytest.mark.parametrize(
    "load",
    [
        LocalDiTTransformer2DModel.from_pretrained,
        lambda folder: convert_to_single_file(folder, folder / "new.safetensors"),
    ],
    ids=["from_pretrained", "convert"],
)
def test_settings_that_the_weights_refute_are_refused(tmp_path, load, setting):
    tiny_model().save_pretrained(tmp_path)
    edit(tmp_path, **setting)
    (name,) = setting
    with pytest.raises(ValueError, match=f"config.json: .*`{name}`"):
        load(tmp_path)


def renamed(state):
    return {name.replace("proj_out", "final"): tensor for name, tensor in state.items()}


def reshaped(state):
    return state | {"proj_out.bias": torch.zeros(3)}


def with_infinity(state):
    return state | {"proj_out.bias": torch.full_like(state["proj_out.bias"], torch.inf)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "proj_out.weight"),
        (reshaped, "'proj_out.bias' missing, unexpected, or of another shape"),
        (with_infinity, "'proj_out.bias' has values that are not finite"),
        (lambda state: state | {"stale": torch.zeros(1)}, "'stale' missing, unexpected"),
        (lambda state: dict(list(state.items())[1:]), "missing, unexpected"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(file)), file)
    for load in (
        LocalDiTTransformer2DModel.from_pretrained,
        lambda folder: LocalDiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False),
        lambda folder: convert_to_single_file(folder, folder / "new.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_an_index_names_files_of_its_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model/diffusion_pytorch_model.safetensors.index.json"
    for names in ({"a": "../b.safetensors"}, {"a": 1}, ["a"]):
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        with pytest.raises(ValueError, match="'weight_map' must name files of this folder"):
            LocalDiTTransformer2DModel.from_pretrained(tmp_path / "model")


def test_copies_of_fused_projections_in_a_folder_are_not_read(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    copy = {"transformer_blocks.0.attn2.to_kv.weight": torch.zeros(1)}
    save_file(load_file(file) | copy, file)  # as earlier versions wrote it
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
