import json
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from localdit.core.encoders import Encoders
from localdit.core.text import TextSpace
from localdit.training.data.buckets import Size
from localdit.training.data.encoded import (
    NOTES,
    EncodedManifest,
    index_path,
    open_encoded,
    read_encoded,
    read_encoded_manifest,
    require_latent_format,
    tar_path,
    unwritten_shards,
)
from localdit.training.data.finding import find_samples
from localdit.training.data.samples import Blob, BrokenSample, Sample
from localdit.training.encode.job import open_folder
from localdit.training.encode.shards import Plan, ShardEncoder, read_pictures
from tests.tiny import TEXT_WIDTH, tiny_components
from tests.training.manifests import some_manifest

SIZES = [Size(64, 32), Size(32, 64)]


@pytest.fixture(scope="module")
def parts():
    return tiny_components()


@pytest.fixture
def folder(parts, tmp_path):
    """Three samples in two shards; the second of four pictures was broken."""
    samples = []
    for number, colour in enumerate(["red", "green", "blue", "white"]):
        path = tmp_path / f"{colour}.png"
        Image.new("RGB", (40, 70), colour).save(path)
        captions = (f"a {colour} picture", colour) if number % 2 else (f"a {colour} picture",)
        samples.append(Sample(f"{colour}.png", Blob(str(path)), captions, 70, 40))
    (tmp_path / "green.png").write_bytes(b"")
    plan = Plan(samples, torch.tensor([0, 0, 0, 1]).numpy(), SIZES, samples_per_shard=2)
    encoders = Encoders(parts["tokenizer"], parts["text_encoder"], parts["vae"])
    manifest = some_manifest(sizes=tuple(SIZES), samples=4, shards=2, samples_per_shard=2)
    folder = tmp_path / "encoded"
    shards = open_folder(folder, manifest, torch.ones(1, TEXT_WIDTH, dtype=torch.bfloat16))
    encoder = ShardEncoder(folder, manifest, plan, encoders, 2, progress=lambda samples: None)
    pictures = read_pictures(plan, shards, batch_size=2, num_workers=0)
    for shard in shards:
        encoder.write(shard, pictures)
    return folder


def test_encoded_samples_are_found(folder):
    found = find_samples(folder)
    assert found.format == "encoded"
    assert [sample.id for sample in found.samples] == ["red.png", "blue.png", "white.png"]
    assert [(s.height, s.width) for s in found.samples] == [(64, 32), (64, 32), (32, 64)]
    assert found.samples[2].captions == ("a white picture", "white")
    assert found.faults.counts == {"empty": 1}
    assert found.faults.examples["empty"][0].id == "green.png"
    assert found.encoded.manifest == read_encoded_manifest(folder)
    assert found.encoded.manifest.sizes == tuple(SIZES)
    assert torch.equal(found.encoded.empty_text, torch.ones(1, 16, dtype=torch.bfloat16))


def test_any_caption_of_a_sample_can_be_read(folder, parts):
    text_space = TextSpace(parts["tokenizer"], parts["text_encoder"])
    sample = find_samples(folder).samples[2]
    for number, caption in enumerate(sample.captions):
        latents, text = read_encoded(sample, number)
        assert latents.shape == (4, 4, 8)
        assert latents.dtype == torch.float32
        assert text.dtype == torch.bfloat16
        expected = text_space.encode_batch([caption], 120)[0][0, : len(text)]
        torch.testing.assert_close(text.float(), expected, rtol=1e-2, atol=1e-2)
    assert read_encoded(sample, None)[1] is None


@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
def test_a_single_flipped_bit_is_noticed(folder, place):
    sample = find_samples(folder).samples[0]
    tar = tar_path(folder, 0)
    data = bytearray(tar.read_bytes())
    data[sample.image.offset + int(place * sample.image.size)] ^= 4
    tar.write_bytes(data)
    with pytest.raises(BrokenSample, match="not those that were written") as broken:
        read_encoded(sample, 0)
    assert broken.value.kind == "damaged"


def test_a_missing_tar_is_noticed(folder):
    sample = find_samples(folder).samples[0]
    tar_path(folder, 0).unlink()
    with pytest.raises(BrokenSample) as broken:
        read_encoded(sample, 0)
    assert broken.value.kind == "unreadable"


@pytest.mark.parametrize(
    "data",
    [
        b"no safetensors",
        save({"latents": torch.zeros(4, 4, 8)}),  # no text
        save({"text_0": torch.zeros(1, 16)}),  # no latents
        save({"latents": torch.zeros(4, 8, 4), "text_0": torch.zeros(1, 16)}),  # lies on its side
    ],
)
def test_other_files_in_a_tar_are_damaged_samples(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    member = Blob(str(tmp_path / "a.tar"), 0, len(data), zlib.crc32(data))
    with pytest.raises(BrokenSample) as broken:
        read_encoded(Sample("a", member, ("a caption",), 32, 64), 0)
    assert broken.value.kind == "damaged"


def test_an_unfinished_set_is_refused_with_the_command_to_resume(folder):
    index_path(folder, 1).unlink()
    assert unwritten_shards(folder, read_encoded_manifest(folder)) == [1]
    with pytest.raises(ValueError, match="1 of 2 shards .* Resume with: python -m the command"):
        open_encoded(folder)


@pytest.mark.parametrize("output", ["--output old", "--output=old"])
def test_the_command_to_resume_follows_a_set_that_was_moved(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    manifest = some_manifest(command=f"encode --data-root a {output} --crop center")
    assert manifest.command_for(tmp_path / "old") == manifest.command
    assert manifest.command_for(tmp_path / "my new") == (
        f"{manifest.command} --output '{tmp_path}/my new'"
    )


def test_other_folders_and_versions_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"it has no encoded\.json"):
        open_encoded(tmp_path)
    manifest = json.loads((folder / "encoded.json").read_text())
    (folder / "encoded.json").write_text(json.dumps(manifest | {"format": 7}))
    with pytest.raises(ValueError, match="format 7, this version of LocalDiT reads 1"):
        open_encoded(folder)
    del manifest["sizes"]
    (folder / "encoded.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is damaged .*sizes"):
        open_encoded(folder)


@pytest.mark.parametrize("damage", ["cut", "no size", "list", "other set", "short tar", "no tar"])
def test_a_damaged_shard_is_refused(folder, damage):
    index, tar = index_path(folder, 1), tar_path(folder, 1)
    values = json.loads(index.read_text())
    if damage == "cut":
        index.write_text(index.read_text()[:-9])
    elif damage == "no size":
        del values["samples"][0]["size"]
        index.write_text(json.dumps(values))
    elif damage == "list":
        index.write_text("[]")
    elif damage == "other set":
        index.write_text(json.dumps(values | {"set": "0" * 64}))
    elif damage == "short tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    else:
        tar.unlink()
    with pytest.raises(ValueError, match=r"Remove shard-00001\.json and run again: python -m"):
        open_encoded(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("offset", -1), ("offset", 10**18), ("offset", "0"), ("offset", 0.5), ("size", -1),
     ("size", 10**30), ("size", None), ("height", 10**9), ("width", "32")],
)  # fmt: skip
def test_a_place_outside_of_the_tar_or_an_unknown_size_is_refused(folder, name, value):
    path = folder / "shard-00000.json"
    index = json.loads(path.read_text())
    index["samples"][0][name] = value
    assert_damaged(folder, index, "place or size of 'red.png'|not supported|unsupported")


@pytest.mark.parametrize("captions", [[], "a red picture", [1], None])
def test_a_sample_without_captions_is_refused(folder, captions):
    index = json.loads(index_path(folder, 0).read_text())
    index["samples"][0]["captions"] = captions
    assert_damaged(folder, index, "captions of 'red.png'|not iterable")


@pytest.mark.parametrize("name", ["samples", "faults"])
def test_a_shard_that_lost_entries_of_its_index_is_refused(folder, name):
    index = json.loads(index_path(folder, 0).read_text())
    del index[name][0]
    assert_damaged(folder, index, "lists 1 samples; 2 were planned")


def test_any_change_of_an_index_is_noticed(folder):
    index = json.loads(index_path(folder, 0).read_text())
    index["samples"][0] |= {"id": "blue.png", "captions": ["a blue picture"]}
    index_path(folder, 0).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is damaged .its SHA-256 differs .* Remove shard-00000"):
        open_encoded(folder)


def assert_damaged(folder, index, message):
    """Check that the first shard is refused with this index: for its sum and, without, itself."""
    path = index_path(folder, 0)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        open_encoded(folder)
    del index["sha256"]  # as earlier versions wrote it
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{path.name} .*({message}).* Remove {path.name}"):
        open_encoded(folder)


def test_indices_of_earlier_versions_are_read(folder):
    samples = open_encoded(folder)[0]
    for shard in range(2):
        values = json.loads(index_path(folder, shard).read_text())
        del values["sha256"]
        index_path(folder, shard).write_text(json.dumps(values))
    assert open_encoded(folder)[0] == samples


@pytest.mark.parametrize("shards", [10**15, -1, "2"])
def test_an_absurd_number_of_shards_is_refused_at_once(folder, shards):
    path = folder / "encoded.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards": shards}))
    with pytest.raises(ValueError, match=r"encoded\.json is damaged"):
        open_encoded(folder)


@pytest.mark.parametrize("noted", [True, False])  # sets of earlier versions note no SHA-256
@pytest.mark.parametrize(
    "data",
    [
        None,
        b"nothing",
        save({"other": torch.ones(1, TEXT_WIDTH)}),
        save({"text": torch.ones(1, TEXT_WIDTH + 1)}),
        save({"text": torch.ones(TEXT_WIDTH)}),
        save({"text": torch.full((1, TEXT_WIDTH), torch.nan)}),
    ],
)
def test_without_the_empty_caption_a_set_is_refused(folder, data, noted):
    path, manifest = folder / "empty.safetensors", folder / "encoded.json"
    if not noted:
        values = json.loads(manifest.read_text())
        del values["empty_caption"]
        manifest.write_text(json.dumps(values))
        assert torch.equal(open_encoded(folder)[2].empty_text, load(path.read_bytes())["text"])
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ValueError, match=r"empty\.safetensors can't be read"):
        open_encoded(folder)


def test_a_changed_byte_of_the_empty_caption_is_noticed_and_can_be_mended(folder):
    path = folder / "empty.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"A")
    with pytest.raises(ValueError, match="its bytes are not those that were written.* Remove it"):
        open_encoded(folder)
    path.unlink()
    states = torch.full((1, TEXT_WIDTH), 2, dtype=torch.bfloat16)  # rounded on another device
    manifest = some_manifest(sizes=tuple(SIZES), samples=4, shards=2, samples_per_shard=2)
    assert open_folder(folder, manifest, states) == []
    assert torch.equal(open_encoded(folder)[2].empty_text, states)


def test_manifests_differ_in_all_but_their_notes():
    manifest = some_manifest()
    assert not manifest.differences(some_manifest(command="another", sources={}, too_small=9))
    assert manifest.digest() == some_manifest(command="another").digest()
    for name, value in manifest.to_json().items():
        if name not in (*NOTES, "format", "fingerprints", "sizes", "crop"):
            other = some_manifest(**{name: f"{value}0" if isinstance(value, str) else value + 1})
            assert manifest.differences(other)[0].startswith(f"{name} ")
            assert manifest.digest() != other.digest()
    other = some_manifest(fingerprints=manifest.fingerprints | {"vae": "another"})
    assert manifest.differences(other) == ["another vae"]


# Of `some_manifest()`, as the version without latent statistics computed it.
EARLIER_DIGEST = "5e17ecded0025d8bbdee8889c40c4b06b27d58b27be705ecdae4c30dc4c0f61a"


def test_a_manifest_without_latent_statistics_is_that_of_earlier_versions(tmp_path):
    manifest = some_manifest()
    assert manifest.digest() == EARLIER_DIGEST
    assert not {"shift_factor", "latents_mean", "latents_std"} & {*manifest.to_json()}
    assert EncodedManifest.from_json(manifest.to_json()) == manifest


STATISTICS = {"shift_factor": 0.5, "latents_mean": (0.1, -0.2), "latents_std": (1.5, 2.0)}


@pytest.mark.parametrize("name", STATISTICS)
def test_latent_statistics_are_recorded_and_compared(tmp_path, name):
    manifest, changed = some_manifest(), some_manifest(**{name: STATISTICS[name]})
    assert EncodedManifest.from_json(json.loads(json.dumps(changed.to_json()))) == changed
    assert changed.digest() != manifest.digest()
    assert manifest.differences(changed)[0].startswith(f"{name} ")
    assert changed.differences(manifest)[0].endswith("None instead of " + (
        "0.5" if name == "shift_factor" else str(list(STATISTICS[name]))
    ))  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"shift_factor": 0.5},
        {"latents_mean": (0.1, -0.2)},
        {"latents_std": (1.5, 2.0)},
        {"scaling_factor": 0.5},
        {"latent_channels": 16},
        {"vae_scale": 16},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_set_with_another_latent_format_than_its_vae_is_refused(tmp_path, changes):
    ours, other = some_manifest(), some_manifest(**changes)
    require_latent_format(tmp_path, other, other.latent_format)
    with pytest.raises(ValueError, match=r"encoded with .*, but its VAE has .* Encode the data"):
        require_latent_format(tmp_path, ours, other.latent_format)
    with pytest.raises(ValueError, match=r"encoded with .*, but its VAE has .* Encode the data"):
        require_latent_format(tmp_path, other, ours.latent_format)


def test_old_versions_are_named_only_where_they_ignored_a_number(tmp_path):
    shifted, scaled = (some_manifest(**{name: 0.5}) for name in ("shift_factor", "scaling_factor"))
    with pytest.raises(ValueError, match="shift_factor 0.0.*Old versions ignored shift"):
        require_latent_format(tmp_path, some_manifest(), shifted.latent_format)
    with pytest.raises(ValueError, match="for this VAE. Encode the data"):
        require_latent_format(tmp_path, some_manifest(), scaled.latent_format)
