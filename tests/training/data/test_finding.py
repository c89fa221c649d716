"""Tests of the formats that are recognised, and of the messages about others."""

import json
import sys
import warnings

import pytest
import torch

from localdit.training.data import finding
from localdit.training.data.encoded import EncodedSet
from localdit.training.data.finding import CHUNK, FORMATS, MANY, Found, examine, find_samples
from localdit.training.data.samples import Blob, Candidate, CaptionFile, Fault, Faults, Sample
from tests.training.data.drawn import picture_bytes, png_claiming, tar_bytes, write_files
from tests.training.manifests import some_manifest

PICTURE = picture_bytes(height=20, width=30)
BESIDE = {"a.jpg": PICTURE, "a.txt": "of a"}
METADATA = {"metadata.jsonl": json.dumps({"file_name": "pictures/a.jpg", "text": "of a"})}
TARS = {"000.tar": tar_bytes([("a.jpg", PICTURE), ("a.txt", "of a")])}


@pytest.mark.parametrize(
    ("files", "data_format", "id"),
    [
        (BESIDE, "folder", "a.jpg"),
        (
            {f"deep/down/{name}": content for name, content in BESIDE.items()},
            "folder",
            "deep/down/a.jpg",
        ),
        ({**METADATA, "pictures/a.jpg": PICTURE}, "metadata", "pictures/a.jpg"),
        ({**TARS, "000.json": "{}", "preview.png": PICTURE}, "webdataset", "000.tar/a"),
    ],
)
def test_formats_are_recognised(tmp_path, files, data_format, id):
    write_files(tmp_path, files)
    for asked in ("auto", data_format):
        for root in (tmp_path, str(tmp_path)):
            found = find_samples(root, asked)
            assert (found.format, found.encoded, found.faults.total) == (data_format, None, 0)
            [sample] = found.samples
            assert (sample.id, sample.captions) == (id, ("of a",))
            assert (sample.height, sample.width) == (20, 30)
            assert sample.image.read() == PICTURE


def test_tars_by_path_and_pattern(tmp_path):
    write_files(tmp_path, {f"{number:03d}.tar": TARS["000.tar"] for number in range(3)})
    for pattern, count in (("001.tar", 1), ("*.tar", 3), ("{000..001}.tar", 2)):
        found = find_samples(tmp_path / pattern)
        assert (found.format, len(found.samples)) == ("webdataset", count)


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"image": {"bytes": PICTURE, "path": None}, "text": "of a"}]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "split")
    datasets.DatasetDict(test=dataset, training=dataset).save_to_disk(tmp_path / "two")
    for folder, others in (("one", []), ("split", []), ("two", ["test"])):
        found = find_samples(tmp_path / folder)
        assert (found.format, found.samples[0].captions) == ("saved", ("of a",))
        assert (len(found.samples), found.other_splits) == (1, others)


def test_encoded_data_is_opened_by_its_own_reader(tmp_path, monkeypatch):
    write_files(tmp_path, {"encoded.json": "{}", **TARS})
    opened = [], Faults(), EncodedSet(tmp_path, some_manifest(), torch.zeros(1, 4))
    monkeypatch.setattr(
        finding, "open_encoded", lambda folder: opened if folder == tmp_path else None
    )
    assert find_samples(tmp_path) == Found("encoded", *opened)
    assert find_samples(str(tmp_path), "encoded") == Found("encoded", *opened)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {**BESIDE, **TARS},
            r"more than one format: webdataset \(000\.tar\) and folder \(a\.jpg\)",
        ),
        (
            {**BESIDE, **METADATA},
            r"metadata \(metadata\.jsonl\) and folder \(a\.jpg\).*--data-format",
        ),
    ],
)
def test_ambiguous_data_needs_a_format(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        find_samples(tmp_path)
    assert find_samples(tmp_path, "folder").samples[0].image == Blob(str(tmp_path / "a.jpg"))


def test_unknown_data_is_refused_with_the_known_formats_and_the_files_found(tmp_path):
    write_files(tmp_path, {"a.mp4": b"", "b.mp4": b"", "README": b"", "c.parquet": b""})
    with pytest.raises(ValueError, match="nothing to train on") as raised:
        find_samples(tmp_path)
    assert all(meaning in str(raised.value) for meaning in FORMATS.values())
    assert "Found 4 files: 2 with .mp4, 1 with no suffix, 1 with .parquet." in str(raised.value)
    assert "save_to_disk" in str(raised.value)
    with pytest.raises(ValueError, match=r"no data of the format webdataset .*2 with \.mp4"):
        find_samples(tmp_path, "webdataset")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Found 0 files"):
        find_samples(tmp_path / "empty")


def test_pictures_without_captions_are_counted(tmp_path):
    write_files(tmp_path, {"a.jpg": PICTURE, "b.jpg": PICTURE})
    found = find_samples(tmp_path)
    assert (found.format, found.samples, found.faults.counts) == ("folder", [], {"no caption": 2})


def test_where_nothing_can_be_used_the_reason_is_told(tmp_path):
    names = {"a.jpg": PICTURE, "a.jpg.txt": "of a"}
    write_files(tmp_path, {f"beside/{name}": content for name, content in names.items()})
    write_files(tmp_path, {"tar/000.tar": tar_bytes([("a.jpg", PICTURE), ("a.cls", "5")])})
    write_files(tmp_path, {"empty/metadata.jsonl": METADATA["metadata.jsonl"]})
    messages = {
        "beside": r"all 1 are broken:\n1 no caption .*a\.jpg\n.*\.txt, \.caption or \.json of its "
        r"name beside it\.\nFound 2 files: .*The first: a\.jpg, a\.jpg\.txt",
        "tar": r"all 1 are broken:\n1 no caption .*000\.tar/a\n.*\.txt, \.caption or \.json share",
        "empty": r"1 missing \(the picture does not exist\): pictures/a\.jpg",
    }
    for folder, message in messages.items():
        with pytest.raises(ValueError, match=message):
            find_samples(tmp_path / folder).require_samples(folder)
    with pytest.raises(ValueError, match="data has no sample that can be used: it is empty"):
        Found("saved", []).require_samples("data")


def test_the_output_is_no_data(tmp_path):
    write_files(tmp_path, BESIDE)
    before = find_samples(tmp_path, output=tmp_path / "run")
    write_files(tmp_path, {"run/validation/1.png": PICTURE, "run/b.tar": TARS["000.tar"]})
    found = find_samples(tmp_path, output=tmp_path / "run")
    assert (found.samples, found.contents) == (before.samples, before.contents)
    assert found.faults.total == 0
    (tmp_path.parent / "link").symlink_to(tmp_path)
    assert find_samples(tmp_path.parent / "link", output=tmp_path / "run").samples[0].id == "a.jpg"
    (tmp_path.parent / "link").unlink()
    with pytest.raises(ValueError, match="--output .* is the folder of the data"):
        find_samples(tmp_path, output=tmp_path / "run/..")


LINE = METADATA["metadata.jsonl"].replace("pictures/", "")


@pytest.mark.parametrize(
    ("files", "samples", "others"),
    [
        (["train/a.jpg", "test/a.jpg", "eval/a.jpg"], ["train/a.jpg"], ["eval", "test"]),
        (["cats/Train/a.jpg", "cats/Val/a.jpg", "dogs/a.jpg"], ["cats/Train/a.jpg", "dogs/a.jpg"],
         ["cats/Val"]),
        (["training/x/a.jpg", "dev/x/a.jpg", "a.jpg"], ["a.jpg", "training/x/a.jpg"], ["dev"]),
        (["test/a.jpg", "validation/a.jpg"], ["test/a.jpg", "validation/a.jpg"], []),
        (["train/a.jpg", "boat/a.jpg"], ["boat/a.jpg", "train/a.jpg"], []),
        (["testing ground/a.jpg", "train/a.jpg"], ["testing ground/a.jpg", "train/a.jpg"], []),
    ],
)  # fmt: skip
def test_of_several_splits_the_one_for_training_is_used(tmp_path, files, samples, others):
    for file in files:
        write_files(tmp_path / "folder", {file: PICTURE, file.replace("jpg", "txt"): "of a"})
        jsonl = file.replace("a.jpg", "metadata.jsonl")
        write_files(tmp_path / "metadata", {file: PICTURE, jsonl: LINE})
        write_files(tmp_path / "webdataset", {file.replace("jpg", "tar"): TARS["000.tar"]})
    for name in ("folder", "metadata", "webdataset"):
        found = find_samples(tmp_path / name)
        ids = [sample.id.replace("a.tar/a", "a.jpg") for sample in found.samples]
        assert (ids, found.other_splits) == (samples, others)
        assert found.unused() == (
            f"Splits: train is used; left out: {', '.join(others)}" if others else ""
        )


def test_pictures_that_no_metadata_names_are_counted(tmp_path):
    names = ["a.jpg", "b/b.png", "b/c.jpg", "notes.txt"]
    row = json.dumps({"file_name": "a.jpg", "text": "a"})
    write_files(tmp_path, {"metadata.jsonl": row, **dict.fromkeys(names, PICTURE)})
    found = find_samples(tmp_path)
    assert [sample.id for sample in found.samples] == ["a.jpg"]
    assert found.unused() == (
        "Left out because no metadata file names them: 2 pictures: b/b.png, b/c.jpg"
    )


def test_one_metadata_file_may_name_all_splits(tmp_path):
    names = ["test/a.jpg", "train/a.jpg"]
    rows = [json.dumps({"file_name": name, "text": name}) for name in names]
    write_files(tmp_path, {"metadata.jsonl": "\n".join(rows), **dict.fromkeys(names, PICTURE)})
    found = find_samples(tmp_path)
    assert [sample.id for sample in found.samples] == ["train/a.jpg"]
    assert (found.other_splits, found.faults.total) == (["test"], 0)


def test_missing_and_empty_data_is_refused(tmp_path):
    write_files(tmp_path, BESIDE)
    for data_format in ("auto", "folder"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            find_samples(tmp_path / "nowhere", data_format)
    with pytest.raises(ValueError, match=r"a\.jpg, which is not a \.tar"):
        find_samples(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "root",
    [
        "pipe:cat a.tar",
        "https://example.org/{000..123}.tar",
        "s3://bucket/a.tar",
        "hf://datasets/a",
    ],
)
def test_commands_and_addresses_are_refused(root):
    with pytest.raises(ValueError, match="commands and addresses are not read"):
        find_samples(root)


def test_order_is_kept_and_faults_are_counted(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture_bytes(height=20, width=30))
    picture, gone = Blob(str(path)), Blob(str(tmp_path / "gone"))
    listing = []
    for number in range(3 * CHUNK):
        listing += [
            Candidate(f"{number}", picture, f"caption {number}"),
            Candidate(f"{number} missing", gone, "a"),
            Candidate(f"{number} silent", picture, ""),
            Candidate(f"{number} unreadable", picture, CaptionFile("txt", gone)),
            Fault("duplicate", f"{number} again"),
        ]
    samples, faults = examine(listing)
    assert samples == [
        Sample(f"{number}", picture, (f"caption {number}",), 20, 30) for number in range(3 * CHUNK)
    ]
    kinds = ("missing", "no caption", "unreadable", "duplicate")
    assert faults.counts == dict.fromkeys(kinds, 3 * CHUNK)
    assert [fault.id for fault in faults.examples["missing"]][:2] == ["0 missing", "1 missing"]


def test_nothing():
    samples, faults = examine([])
    assert (samples, faults.total) == ([], 0)


def test_no_warnings_of_large_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(png_claiming(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, faults = examine([Candidate("a", Blob(str(tmp_path / "a.png")), "a")])
    assert faults.counts == {"too large": 1}


@pytest.mark.parametrize(
    ("number", "progress", "shown"),
    [
        (MANY, True, True),
        (MANY, False, False),
        (MANY - 1, True, False),
    ],
)
def test_many_samples_have_a_progress_bar(number, progress, shown, capsys, monkeypatch):
    monkeypatch.setattr(finding, "_examine", lambda candidate: Fault("empty", candidate.id))
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        examine([Candidate("a", Blob("a"), "a")] * number, progress)
        assert ("Examining the data" in capsys.readouterr().err) == (shown and terminal)
