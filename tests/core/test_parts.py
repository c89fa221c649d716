import copy
import json
import re

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file

from localdit import Config, load_model
from localdit.core.encoders import Encoders, encoder_classes, load_encoders, weights_fingerprint
from localdit.core.parts import ENCODERS
from localdit.pipelines import LocalDiTPipeline
from tests.tiny import tiny_components, tiny_pipeline, tiny_tokenizer


@pytest.fixture
def encoders():
    parts = tiny_components()
    return Encoders(parts["tokenizer"], parts["text_encoder"], parts["vae"])


def test_where_and_how_encoders_are_kept_does_not_matter(encoders, tmp_path):
    expected = encoders.fingerprints()
    assert {len(fingerprint) for fingerprint in expected.values()} == {64}
    encoders.tokenizer(["a cat", "a"], padding=True, truncation=True, max_length=5)
    encoders.vae.to(memory_format=torch.channels_last)
    encoders.text_encoder.to(torch.bfloat16)  # as on a GPU
    for name, part in zip(encoders._fields, encoders, strict=True):
        part.save_pretrained(tmp_path / name)
    loaded = Encoders(
        *(
            type(part).from_pretrained(tmp_path / name)
            for name, part in zip(encoders._fields, encoders, strict=True)
        )
    )
    assert encoders.fingerprints() == loaded.fingerprints() == expected


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_offloaded_weights_have_the_same_fingerprint(part):
    model = tiny_components()[part]
    expected = weights_fingerprint(model, torch.float32)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert weights_fingerprint(model, torch.float32) == expected


@pytest.mark.parametrize("part", Encoders._fields)
def test_a_change_of_one_part_is_seen_in_its_fingerprint(encoders, part):
    changed = copy.deepcopy(getattr(encoders, part))
    if part == "tokenizer":
        changed = tiny_tokenizer()
        changed.add_tokens(["dragon"])
    else:
        next(changed.parameters()).data[0] *= 1.01
    before = encoders.fingerprints()
    after = encoders._replace(**{part: changed}).fingerprints()
    assert [name for name in before if before[name] != after[name]] == [part]


# Folders that are damaged, or written to do harm


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def loaders(folder):
    """Return everything that loads the parts in a folder."""
    config = Config(ckpt_path=folder / "transformer", text_encoder=folder, vae=folder)
    config.scheduler = folder
    sources = dict.fromkeys(ENCODERS, str(folder))
    return {
        "from_pretrained": lambda: LocalDiTPipeline.from_pretrained(folder),
        "load_model": lambda: load_model(Config(ckpt_path=folder), device="cpu"),
        "parts": lambda: load_model(config, device="cpu"),
        "encoders": lambda: load_encoders(sources, torch.float32),
        "classes": lambda: encoder_classes(sources),
    }


@pytest.mark.parametrize(
    ("file", "auto", "kind"),
    [
        ("tokenizer/tokenizer_config.json", "AutoTokenizer", "PreTrainedTokenizerFast"),
        ("tokenizer/tokenizer_config.json", "AutoTokenizer", "AutoTokenizer"),
        ("tokenizer/tokenizer_config.json", "AutoTokenizer", "BarkProcessor"),  # loads an Auto...
        ("text_encoder/config.json", "AutoConfig", "T5EncoderModel"),
        ("text_encoder/config.json", "AutoModel", "AutoModel"),
    ],
)
def test_no_loader_asks_whether_to_run_code(folder, tmp_path, monkeypatch, file, auto, kind):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    change(folder / file, auto_map={auto: "evil.Evil"}, tokenizer_class="Evil", model_type="evil")
    part = file.partition("/")[0]
    change(folder / "model_index.json", **{part: ["transformers", kind]})
    (folder / part / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nEvil = None\n")
    refused = 0
    for load in loaders(folder).values():
        try:
            load()
        except (OSError, ValueError):
            refused += 1
    assert refused >= 3  # the others load a class that does not need the code
    assert not asked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("vae/config.json", {"layers_per_block": 10**9}),
        ("text_encoder/config.json", {"num_layers": 10**9}),
        ("text_encoder/config.json", {"text_config": {"num_hidden_layers": 10**9}}),
        ("vae/config.json", {"num_encoder_blocks": [1, 10**9]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
    ],
)
def test_settings_out_of_all_proportion_are_refused(folder, file, setting):
    change(folder / file, **setting)
    name = re.findall(r"'(\w+)'", str(setting))[-1]
    for load in loaders(folder).values():
        if file.startswith("scheduler") and load.__code__.co_names[0] in (
            "load_encoders",
            "encoder_classes",
        ):
            continue  # these need no scheduler
        with pytest.raises((OSError, ValueError), match=f"{file}: '{name}' is 1,000,000,000"):
            load()


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("text", ['{"a":' * 100_000, "[1]", "no JSON"], ids=["nested", "list", ""])
def test_configurations_that_are_no_json_objects_are_refused(folder, file, text):
    (folder / file).write_text(text)
    for name in ("from_pretrained", "load_model"):
        with pytest.raises(ValueError, match=f"{file} is no JSON object"):
            loaders(folder)[name]()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tokenizer/tokenizer.json", lambda text: text[: len(text) // 2]),
        ("tokenizer/tokenizer.json", lambda text: "{}"),
        ("tokenizer/tokenizer.json", lambda text: text.replace('"model"', '"modal"')),
        ("text_encoder/config.json", lambda text: text.replace('"d_model": 16', '"d_model": "16"')),
        ("text_encoder/config.json", lambda text: text.replace('"d_model": 16', '"d_model": 32')),
        ("vae/config.json", lambda text: text.replace("Down", "Up")),
        ("scheduler/scheduler_config.json", lambda text: text.replace("1000", '"1000"')),
    ],
)
def test_errors_of_the_libraries_name_the_folder_of_the_part(folder, file, damage):
    path = folder / file
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    part = file.partition("/")[0]
    for name in ("parts", *(["encoders"] if part in ENCODERS else [])):
        with pytest.raises(ValueError, match=rf"(?s){folder / part} can't be loaded .* fetch it"):
            loaders(folder)[name]()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_values_that_are_not_finite_are_refused_in_every_part(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).flatten()[-1] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    for load in ("from_pretrained", "load_model", "parts", "encoders"):
        if (part, load) != ("transformer", "encoders"):
            with pytest.raises((OSError, ValueError), match="values that are not finite"):
                loaders(folder)[load]()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_missing_weights_are_refused_in_every_part(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in tensors if tensors[name].ndim == 2)
    save_file({n: t for n, t in tensors.items() if n != lost}, file, {"format": "pt"})
    for load in ("from_pretrained", "load_model", "parts", "encoders"):
        if (part, load) != ("transformer", "encoders"):
            with pytest.raises((OSError, ValueError), match=re.escape(lost)):
                loaders(folder)[load]()
