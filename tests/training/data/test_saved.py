"""Hugging Face datasets on disk: their columns, splits, and pictures, read in any process."""

import pickle
import subprocess
import sys

import pytest

from localdit.training.data.finding import examine
from localdit.training.data.listings import list_saved
from tests.training.data.drawn import damaged_png, picture_bytes

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def saved(folder, rows, image="image"):
    """A dataset of rows: pictures are bytes or paths."""
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


def test_pictures_stored_as_paths(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(picture_bytes("PNG"))
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    rows = {"image": [str(path), str(tmp_path / "b.png")], "text": ["a", "b"]}
    (tmp_path / "b.png").write_bytes(b"")
    dataset = datasets.Dataset.from_dict(rows, features=features)
    # Written row by row as they are: save_to_disk would take the files in.
    table = dataset.data.table
    dataset.save_to_disk(tmp_path / "data")
    import pyarrow as pa

    [arrow] = (tmp_path / "data").glob("*.arrow")
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "b.png").unlink()
    samples, faults = examine(list_saved(tmp_path / "data"))
    assert [sample.image.read() for sample in samples] == [path.read_bytes()]
    assert faults.counts == {"missing": 1}


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
