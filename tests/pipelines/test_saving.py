import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import diffusers
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from huggingface_hub import ModelCard
from huggingface_hub.utils import EntryNotFoundError

from localdit.config import Config
from localdit.models import FullAttnProcessor, LocalDiTTransformer2DModel
from localdit.models.conversion import convert_to_single_file
from localdit.pipelines import (
    LocalDiTImg2ImgPipeline,
    LocalDiTInpaintPipeline,
    LocalDiTPipeline,
    saving,
)
from localdit.pipelines.model_card import make_model_card
from localdit.utils import load_model
from tests.tiny import tiny_components, tiny_pipeline

KINDS = [LocalDiTPipeline, LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "remote code"])
def remote_code(request):
    return request.param


@pytest.fixture(scope="module")
def folder(remote_code, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder, remote_code=remote_code)
    return folder


def weights(pipe):
    models = (pipe.transformer, pipe.vae, pipe.text_encoder)
    return torch.cat([p.detach().flatten().float() for m in models for p in m.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_loads_the_folder_of_every_other(folder, kind):
    assert type(loaded := kind.from_pretrained(folder)) is kind
    assert torch.equal(weights(loaded), weights(tiny_pipeline()))


def test_load_model_loads_it(folder):
    loaded = load_model(Config(ckpt_path=folder), device="cpu")
    assert torch.equal(weights(loaded), weights(tiny_pipeline()))


def test_paths_may_start_with_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = tiny_pipeline()
    pipe.save_pretrained("~/whole")
    pipe.transformer.save_pretrained(Path("~/transformer"))
    convert_to_single_file(pipe.transformer, "~/one.safetensors")
    again = LocalDiTPipeline.from_pretrained("~/whole")
    assert torch.equal(weights(again), weights(pipe))
    for transformer in (
        LocalDiTTransformer2DModel.from_pretrained("~/transformer"),
        LocalDiTTransformer2DModel.from_pretrained("~", subfolder="transformer"),
        LocalDiTPipeline.from_single_file("~/one.safetensors", config="~/whole").transformer,
    ):
        whole = LocalDiTPipeline(**tiny_components() | {"transformer": transformer})
        assert torch.equal(weights(whole), weights(pipe))
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
    pipe.save_lora_weights("~/lora", pipe.transformer)
    again.load_lora_weights("~/lora")
    assert not list((tmp_path / "here").iterdir())


def test_saving_again_gives_the_same_folder(folder, remote_code, tmp_path):
    again = tmp_path / "again"
    LocalDiTPipeline.from_pretrained(folder).save_pretrained(again, remote_code=remote_code)
    files = [{file.relative_to(top) for file in top.rglob("*")} for top in (folder, again)]
    assert files[0] == files[1]
    before, after = (json.loads((top / "model_index.json").read_text()) for top in (folder, again))
    assert after.pop("_name_or_path", None) in (None, str(folder))
    assert before == after


def test_diffusers_loads_it(folder, remote_code, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    trust = {"trust_remote_code": True} if remote_code else {}
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, **trust)
    assert type(loaded) is LocalDiTPipeline
    assert torch.equal(weights(loaded), weights(tiny_pipeline()))


def test_remote_code_is_not_run_unless_it_is_trusted(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, remote_code=True)
    (tmp_path / "pipeline_localdit.py").write_text("raise SystemExit('run')")
    LocalDiTPipeline.from_pretrained(tmp_path)
    if "trust_remote_code" not in inspect.signature(get_class_from_dynamic_module).parameters:
        pytest.skip("this Diffusers trusts code in local folders")
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)


def test_a_folder_can_lose_its_code(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, remote_code=True)
    assert (tmp_path / "pipeline_localdit.py").exists()
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "pipeline_localdit.py").exists()
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is LocalDiTPipeline


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LocalDiTPipeline, LocalDiTInpaintPipeline])
def test_a_process_that_never_imported_localdit_loads_it_with_trust(kind, tmp_path):
    kind(**tiny_components()).save_pretrained(tmp_path / "saved", remote_code=True)
    code = (
        "import sys, diffusers; assert 'localdit' not in sys.modules;"
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path / 'saved')!r},"
        " trust_remote_code=True);"
        "print(type(pipe).__name__, sum(p.double().sum().item() for p in pipe.vae.parameters()),"
        " type(pipe.transformer).__module__)"
    )
    root = Path(saving.__file__).parents[2]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    name, total, module = run.stdout.split()
    expected = sum(p.double().sum().item() for p in tiny_components()["vae"].parameters())
    assert (name, module) == (kind.__name__, "localdit.models.transformer")
    assert float(total) == pytest.approx(expected)


# Variants, shards, dtypes, components


def test_misspelt_arguments_are_refused_before_any_work(folder, tmp_path):
    pipe, part = tiny_pipeline(), folder / "transformer"
    for call, message in {
        lambda: pipe.save_pretrained(tmp_path / "x", varient="a"): "'varient'; the closest is 'var",
        lambda: pipe.transformer.save_pretrained(tmp_path / "x", tokn="a"): "closest is 'token'",
        lambda: LocalDiTTransformer2DModel.from_pretrained(
            part, dropot=0.5
        ): "closest is 'dropout'",
        lambda: pipe.load_lora_weights({}, adaptername="a"): "the closest is 'adapter_name'",
    }.items():
        with pytest.raises(TypeError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    model = LocalDiTTransformer2DModel.from_pretrained(part, dropout=0.5, low_cpu_mem_usage=False)
    assert model.config.dropout == 0.5
    again = LocalDiTTransformer2DModel.from_config(str(folder), subfolder="transformer")
    assert again.config.num_layers == model.config.num_layers
    model.save_pretrained(tmp_path, token=None)


def test_variants_are_saved_beside_one_another(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    tiny_pipeline(seed=1).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    names = {file.name for file in tmp_path.glob("*/*.safetensors")}
    assert names == {
        "model.safetensors",
        "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    }
    # Without a dtype, Transformers would take that of the text encoder's latest configuration.
    plain = LocalDiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    half = LocalDiTPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(weights(plain), weights(tiny_pipeline()))
    assert torch.equal(weights(half), weights(tiny_pipeline(seed=1).to(torch.float16)))
    assert half.transformer.dtype == half.vae.dtype == half.text_encoder.dtype == torch.float16


def test_weights_are_split_into_shards_and_joined_again(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert torch.equal(weights(LocalDiTPipeline.from_pretrained(tmp_path)), weights(pipe))
    loaded = load_model(Config(ckpt_path=tmp_path), device="cpu")
    assert torch.equal(weights(loaded), weights(pipe))


@pytest.mark.parametrize("kind", [LocalDiTPipeline, diffusers.DiffusionPipeline])
def test_each_component_may_have_its_dtype(tmp_path, kind):
    tiny_pipeline().save_pretrained(tmp_path)
    dtypes = {"transformer": torch.bfloat16, "vae": torch.float16, "default": torch.float32}
    pipe = kind.from_pretrained(tmp_path, torch_dtype=dtypes)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float16
    assert pipe.text_encoder.dtype == torch.float32
    assert pipe("a cat", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_components_can_be_given_or_left_out(tmp_path, recwarn):
    tiny_pipeline().save_pretrained(tmp_path)
    given = tiny_components(seed=1)["transformer"]
    pipe = LocalDiTPipeline.from_pretrained(
        tmp_path, transformer=given, text_encoder=None, tokenizer=None
    )
    assert pipe.transformer is given
    assert pipe.text_encoder is None
    pipe.save_pretrained(tmp_path / "small")
    assert not (tmp_path / "small" / "text_encoder").exists()
    small = LocalDiTInpaintPipeline.from_pretrained(tmp_path / "small")
    assert small.tokenizer is None


# The hub, without a network


class Hub:
    """A recorder of the calls to the hub; `card` is the card that the repository has."""

    def __init__(self, monkeypatch, card=None):
        self.made, self.uploaded, self.card = [], [], card
        monkeypatch.setattr(saving, "create_repo", self.create_repo)
        monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", self.upload_folder)
        monkeypatch.setattr(ModelCard, "load", self.load_card)

    def create_repo(self, repo_id, **options):
        self.made.append((repo_id, options))
        return type("RepoUrl", (), {"repo_id": f"someone/{repo_id.split('/')[-1]}"})

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {
            str(file.relative_to(folder_path)): file.read_bytes()
            for file in Path(folder_path).rglob("*")
            if file.is_file()
        }
        self.uploaded.append((repo_id, files, options))

    def load_card(self, repo_id, token=None):
        if self.card is None:
            raise EntryNotFoundError("there is no README.md")
        return ModelCard(self.card)


def test_a_pipeline_is_pushed_with_its_card(monkeypatch):
    hub = Hub(monkeypatch)
    tiny_pipeline().push_to_hub("boats", private=True, token="t", variant="fp16", remote_code=True)
    assert hub.made == [("boats", {"exist_ok": True, "private": True, "token": "t"})]
    [(repo_id, files, options)] = hub.uploaded
    assert repo_id == "someone/boats"
    assert options["commit_message"] == "Upload LocalDiTPipeline"
    assert options["token"] == "t"
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in files
    assert json.loads(files["model_index.json"])["_class_name"] == [
        "pipeline_localdit",
        "LocalDiTPipeline",
    ]
    assert b"import" in files["pipeline_localdit.py"]
    assert b'from_pretrained("boats", trust_remote_code=True)' in files["README.md"]


def test_saving_can_push_as_well(monkeypatch, tmp_path):
    hub = Hub(monkeypatch)
    tiny_pipeline().save_pretrained(tmp_path / "boats", push_to_hub=True, create_pr=True)
    [(repo_id, files, options)] = hub.uploaded
    assert repo_id == "someone/boats"
    assert options["create_pr"] is True
    assert files["README.md"] == (tmp_path / "boats" / "README.md").read_bytes()
    assert json.loads(files["model_index.json"])["transformer"][0] == "diffusers"


def test_an_existing_card_is_kept(monkeypatch, tmp_path):
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(mine)
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == mine

    theirs = "---\nlicense: cc0-1.0\n---\n# Theirs\n"
    hub = Hub(monkeypatch, card=theirs)
    pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="boats")
    assert hub.uploaded[-1][1]["README.md"].decode() == mine
    pipe.push_to_hub("boats")
    card = ModelCard(hub.uploaded[-1][1]["README.md"].decode())
    assert card.text.strip() == "# Theirs"
    assert card.data.license == "cc0-1.0"
    assert card.data.library_name == "diffusers"


# Folders that only name our classes need no trust.


def test_the_hub_may_serve_our_folders_without_code(folder, remote_code):
    from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

    index = json.loads((folder / "model_index.json").read_text())
    files = [str(file.relative_to(folder)) for file in folder.rglob("*")]
    custom, folders = _get_custom_components_and_folders("someone/boats", index, files)
    assert not custom
    assert {"transformer", "vae", "text_encoder"} <= set(folders)


def test_the_hub_reads_the_cards_header(tmp_path):
    make_model_card(tiny_pipeline(), "someone/boats", "mit", False).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.license == "mit"
    assert {"localdit", "inpainting"} <= set(data.tags)


def test_the_card_describes_the_pipeline():
    pipe = tiny_pipeline()
    text = make_model_card(pipe, "someone/boats", "mit", False).text
    assert text.lstrip().startswith("# boats\n")
    assert 'DiffusionPipeline.from_pretrained("someone/boats")' in text
    count = sum(p.numel() for p in pipe.transformer.parameters())
    for fact in (
        f"parameters of the transformer | {count:,} |",
        "blocks | 2 |",
        "attention windows | 2 x 2 tokens |",
        "64 x 64 pixels",
        "prediction of the transformer | noise |",
        "DPMSolverMultistepScheduler",
        "T5EncoderModel",
    ):
        assert fact in text


def test_the_card_of_a_pipeline_without_text_encoder():
    pipe = tiny_pipeline(use_global=True, layer_types="local_global full")
    pipe.text_encoder = None
    text = make_model_card(pipe, "boats", "mit", True).text
    assert "text encoder" not in text
    assert "2 x 2 tokens, with global context |" in text
    assert "attention of the blocks | 1 local_global, 1 full |" in text
    assert "trust_remote_code=True" in text
    assert "import localdit" not in text


# Whatever state a pipeline is in, its folder draws the same, or is refused.


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a cat",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def with_adapter(part, fuse=False):
    def change(pipe):
        peft = pytest.importorskip("peft")
        targets = ["q"] if part == "text_encoder" else ["to_q", "to_qkv"]
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        if part == "transformer":
            pipe.transformer.add_adapter(config, "a")
        else:
            peft.inject_adapter_in_model(config, getattr(pipe, part), "a")
        if fuse:
            pipe.fuse_lora()

    return change


def quantized(pipe):
    kinds = {torch.nn.Linear}
    pipe.text_encoder = torch.ao.quantization.quantize_dynamic(pipe.text_encoder, kinds)


def with_another_layer(pipe):
    pipe.transformer.transformer_blocks[0] = torch.nn.Sequential(
        pipe.transformer.transformer_blocks[0]
    )


def on_the_meta_device(pipe):
    pipe.vae = pipe.vae.to("meta")


def offloaded(pipe):
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))


def not_finite(pipe):
    pipe.transformer.proj_out.bias.data[0] = torch.nan


def without(part):
    return lambda pipe: setattr(pipe, part, None)


def on_the_disk(pipe, folder):
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(folder),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter("transformer"), "LocalDiTTransformer2DModel has adapters.*save_lora_weights"),
        (with_adapter("transformer", fuse=True), "after `fuse_lora\\(\\)`, their effect stays"),
        (with_adapter("text_encoder"), "T5EncoderModel has adapters"),
        (quantized, "weights of the T5EncoderModel are not in memory.*quantized"),
        (with_another_layer, "lacks 'transformer_blocks.0.*its layers were replaced"),
        (on_the_meta_device, "weights of the AutoencoderKL are not in memory"),
        (offloaded, "LocalDiTTransformer2DModel are not in memory.*remove_all_hooks"),
        (without("transformer"), "has no transformer, which save_pretrained needs"),
        (without("scheduler"), "has no scheduler, which save_pretrained needs"),
    ],
)
def test_what_would_not_load_again_is_not_saved(tmp_path, change, message):
    pipe = tiny_pipeline()
    change(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    if "Transformer2DModel" in message:
        with pytest.raises(ValueError, match=message):
            pipe.transformer.save_pretrained(tmp_path / "folder")


def test_saving_weights_that_are_not_finite_gives_a_warning(tmp_path, caplog):
    pipe = tiny_pipeline()
    not_finite(pipe)
    pipe.save_pretrained(tmp_path / "folder")
    assert (
        "LocalDiTTransformer2DModel has values that are not finite in 'proj_out.bias'"
        in caplog.text
    )


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "transformer", "a.pt"])
def test_a_folder_that_is_none_is_named_and_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().transformer.save_pretrained("transformer")
    convert_to_single_file("transformer", "w.safetensors")
    Path("a.pt").touch()
    for load in (
        LocalDiTPipeline.from_pretrained,
        lambda name: LocalDiTPipeline.from_single_file("w.safetensors", config=Path(name)),
    ):
        with pytest.raises(FileNotFoundError, match="has no 'model_index.json': not the folder"):
            load(name)
    if name != "transformer":
        with pytest.raises(FileNotFoundError, match="has no 'config.json': not the folder of a tr"):
            LocalDiTTransformer2DModel.from_pretrained(name)


def test_a_full_disk_is_an_error_of_the_system(tmp_path, full_disk):
    pipe, folder = tiny_pipeline(), tmp_path / "folder"
    for size in (1000, 9000):  # of the tokenizer, of weights
        with full_disk(size), pytest.raises(OSError, match="File too large: .*folder"):
            pipe.save_pretrained(folder)
    with full_disk(9000), pytest.raises(OSError, match="File too large"):
        pipe.transformer.save_pretrained(folder)
    with full_disk(9000), pytest.raises(OSError, match="File too large"):
        pipe.save_lora_weights(folder, {"a": torch.zeros(10_000)})
    with full_disk(9000), pytest.raises(OSError, match="File too large: .*w.safetensors"):
        convert_to_single_file(pipe.transformer, folder / "w.safetensors")


WAYS = {
    "whole": {},
    "in parts": {"max_shard_size": "20KB"},
    "in larger parts": {"max_shard_size": "30KB"},
    "pickled": {"safe_serialization": False},
    "fp16": {"variant": "fp16"},
    "fp16 in parts": {"variant": "fp16", "max_shard_size": "20KB"},
}


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
@pytest.mark.parametrize("later", WAYS)
@pytest.mark.parametrize("earlier", WAYS)
def test_a_folder_that_is_saved_again_has_the_new_weights(tmp_path, earlier, later, whole):
    """Those of another variant or library stay, and so does any other file."""

    def weights(pipe):
        parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
        return [next(part.parameters()).flatten()[0].item() for part in parts[: 3 if whole else 1]]

    folder = tmp_path if whole else tmp_path / "transformer"
    tiny_pipeline(2).save_pretrained(tmp_path)  # the other parts of a transformer
    others = [
        tmp_path / "transformer" / "model_notes.bin",
        tmp_path / "transformer" / "pytorch_model.bin",
        tmp_path / "text_encoder" / "diffusion_pytorch_model.bin",
    ]
    for other in others:
        other.touch()
    expected = {}
    for seed, way in enumerate((earlier, later)):
        pipe = tiny_pipeline(seed)
        (pipe if whole else pipe.transformer).save_pretrained(folder, **WAYS[way])
        expected[WAYS[way].get("variant")] = weights(pipe)
    for variant, values in expected.items():
        loaded = LocalDiTPipeline.from_pretrained(tmp_path, variant=variant)
        assert weights(loaded) == values
    assert all(other.exists() for other in others)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("later", ["whole", "in parts"])
@pytest.mark.parametrize("earlier", ["whole", "in parts"])
def test_a_folder_keeps_its_weights_if_saving_again_fails(tmp_path, full_disk, earlier, later):
    tiny_pipeline().save_pretrained(tmp_path, **WAYS[earlier])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = tiny_pipeline(1)
    for part, folder in ((other, tmp_path), (other.transformer, tmp_path / "transformer")):
        with full_disk(9000), pytest.raises(OSError, match="File too large"):
            part.save_pretrained(folder, **WAYS[later])
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_weights_that_are_offloaded_to_the_disk_are_not_saved(tmp_path):
    pipe = tiny_pipeline()
    on_the_disk(pipe, tmp_path / "weights")
    with pytest.raises(ValueError, match="LocalDiTTransformer2DModel are not in memory"):
        pipe.save_pretrained(tmp_path / "folder")


def fuse_and_unload(pipe):
    with_adapter("transformer", fuse=True)(pipe)
    pipe.unload_lora_weights()


def fuse_projections(pipe):
    pipe.transformer.fuse_qkv_projections()
    pipe.vae.fuse_qkv_projections()


def fuse_both(pipe):
    with_adapter("transformer", fuse=True)(pipe)
    fuse_projections(pipe)
    pipe.unload_lora_weights()


def cached(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


def compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compiled_blocks(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


def group_offloaded(pipe):
    for part in (pipe.transformer, pipe.vae):
        part.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )


def cast_by_layers(pipe):
    pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)


def swapped_processors(pipe):
    pipe.transformer.set_attn_processor(FullAttnProcessor())
    pipe.transformer.set_default_attn_processor()


@pytest.mark.parametrize(
    "change",
    [
        fuse_and_unload,
        fuse_projections,
        fuse_both,
        cached,
        compiled,
        compiled_blocks,
        group_offloaded,
        cast_by_layers,
        swapped_processors,
    ],
)
@pytest.mark.parametrize("kind", [LocalDiTPipeline, diffusers.DiffusionPipeline])
def test_what_is_saved_draws_the_same(tmp_path, change, kind):
    pipe = tiny_pipeline()
    change(pipe)
    pipe.save_pretrained(tmp_path)
    expected = draw(pipe)  # after saving, which leaves the pipeline as it was
    loaded = kind.from_pretrained(tmp_path, torch_dtype=torch.float32)
    torch.testing.assert_close(draw(loaded), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [LocalDiTPipeline, diffusers.DiffusionPipeline])
def test_a_pipeline_spread_by_a_device_map_is_saved(tmp_path, kind):
    tiny_pipeline().save_pretrained(tmp_path / "one")
    pipe = kind.from_pretrained(tmp_path / "one", device_map="cpu")
    pipe.save_pretrained(tmp_path / "two")
    assert torch.equal(weights(kind.from_pretrained(tmp_path / "two")), weights(tiny_pipeline()))
