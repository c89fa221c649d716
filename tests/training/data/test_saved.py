"""Tests of saved Hugging Face datasets: their columns, splits and pictures."""

import json
import pickle
import subprocess
import sys

import pytest

from localdit.training.data.finding import examine
from localdit.training.data.listings import list_saved
from tests.training.data.drawn import damaged_png, picture_bytes, write_files

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def saved(folder, rows, image="image"):
    """Return a dataset of rows. Pictures are bytes or paths."""
    for row in rows:
        row[image] = row[image] if row[image] is None else {"bytes": row[image], "path": None}
    dataset = datasets.Dataset.from_list(rows).cast_column(image, datasets.Image())
    dataset.save_to_disk(folder)
    return dataset


def test_rows(tmp_path):
    pictures = [picture_bytes(kind, height=20) for kind in ("JPEG", "PNG", "WEBP")]
    captions = ["one", "two", " three "]
    rows = [{"image": image, "text": text} for image, text in zip(pictures, captions, strict=True)]
    rows.append({"image": None, "text": "none"})
    rows.append({"image": damaged_png(), "text": ""})
    saved(tmp_path / "data", rows)
    samples, faults = examine(list_saved(tmp_path / "data"))
    assert [sample.id for sample in samples] == ["row 0", "row 1", "row 2"]
    assert [sample.captions for sample in samples] == [("one",), ("two",), ("three",)]
    assert [sample.image.read() for sample in samples[::-1]] == pictures[::-1]
    assert (samples[0].height, samples[0].width) == (20, 48)
    assert faults.counts == {"missing": 1, "no caption": 1}


def test_another_process_opens_the_dataset_itself(tmp_path):
    saved(tmp_path / "data", [{"image": picture_bytes(), "text": "a"}])
    [candidate] = list_saved(tmp_path / "data")
    (tmp_path / "cell").write_bytes(pickle.dumps(candidate.image))
    code = "import pickle, sys; print(len(pickle.load(open(sys.argv[1], 'rb')).read()))"
    command = [sys.executable, "-c", code, str(tmp_path / "cell")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(ran.stdout) == len(picture_bytes())


def saved_paths(folder, paths):
    """Save a dataset whose pictures are paths. `save_to_disk` itself would take the files in."""
    import pyarrow as pa

    saved(folder, [{"image": picture_bytes(), "text": path} for path in paths])
    [arrow] = folder.glob("*.arrow")
    schema = datasets.load_from_disk(folder).data.table.schema
    cells = [{"bytes": None, "path": path} for path in paths]
    table = pa.table({"image": cells, "text": paths}, schema=schema)
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(table)


def test_pictures_stored_as_paths_are_read_within_the_folder(tmp_path):
    saved_paths(tmp_path / "data", ["a.png", "sub/b.png", "gone.png"])
    write_files(tmp_path / "data", {"a.png": picture_bytes("PNG"), "sub/b.png": picture_bytes()})
    samples, faults = examine(list_saved(tmp_path / "data"))
    assert [sample.image.read() for sample in samples] == [picture_bytes("PNG"), picture_bytes()]
    assert faults.counts == {"missing": 1}


def test_pictures_outside_of_the_folder_are_broken(tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture_bytes("PNG"))
    paths = [str(outside), "../secret.png", "sub/../../secret.png", "a\0.png"]
    saved_paths(tmp_path / "data", paths)
    samples, faults = examine(list_saved(tmp_path / "data"))
    assert (samples, faults.counts) == ([], {"bad entry": len(paths)})
    assert "not a path within the data folder" in str(faults)


@pytest.mark.parametrize("absolute", [False, True])
def test_tables_outside_of_the_folder_are_refused(tmp_path, absolute):
    for name in ("data", "secret"):
        saved(tmp_path / name, [{"image": picture_bytes(), "text": name}])
    [arrow] = (tmp_path / "secret").glob("*.arrow")
    state = json.loads((tmp_path / "data/state.json").read_text())
    name = str(arrow) if absolute else f"../secret/{arrow.name}"
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "data/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not in that folder"):
        list_saved(tmp_path / "data")


def test_a_caption_in_a_second_column_counts_when_the_first_is_empty(tmp_path):
    rows = [
        {"image": picture_bytes(), "text": text, "caption": "second", "prompt": "third"}
        for text in ("first", "", None, " ")
    ]
    saved(tmp_path / "data", rows)
    samples, _ = examine(list_saved(tmp_path / "data"))
    assert [sample.captions for sample in samples] == [("first",), *[("second",)] * 3]


def test_splits(tmp_path):
    rows = {
        name: saved(tmp_path / name, [{"image": picture_bytes(), "text": name}]) for name in "ab"
    }
    datasets.DatasetDict(train=rows["a"], test=rows["b"]).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(validation=rows["b"]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(x=rows["a"], y=rows["b"]).save_to_disk(tmp_path / "neither")
    [(id, image, captions)] = list_saved(tmp_path / "two")
    assert (id, image.read(), captions) == ("train row 0", picture_bytes(), "a")
    [(id, image, captions)] = list_saved(tmp_path / "one")
    assert (id, image.read(), captions) == ("validation row 0", picture_bytes(), "b")
    with pytest.raises(ValueError, match="has the splits x, y, none of them called train"):
        list_saved(tmp_path / "neither")


def test_columns(tmp_path):
    row = {"photo": picture_bytes(), "captions": ["one", "two"], "size": 5}
    saved(tmp_path / "lists", [row], image="photo")
    [sample], _ = examine(list_saved(tmp_path / "lists"))
    assert sample.captions == ("one", "two")
    saved(tmp_path / "none", [{"image": picture_bytes(), "label": "a"}])
    with pytest.raises(ValueError, match=r"columns image .*, label .*Expected"):
        list_saved(tmp_path / "none")
    datasets.Dataset.from_list([{"image": b"x", "text": "a"}]).save_to_disk(tmp_path / "bytes")
    with pytest.raises(ValueError, match="of type Image"):
        list_saved(tmp_path / "bytes")


def test_a_damaged_dataset_is_refused(tmp_path):
    saved(tmp_path / "data", [{"image": picture_bytes(), "text": "a"}])
    [arrow] = (tmp_path / "data").glob("*.arrow")
    arrow.write_bytes(b"not arrow")
    with pytest.raises(ValueError, match="can't be opened as a saved dataset"):
        list_saved(tmp_path / "data")
