import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.training.data_old import (
    PictureDataset,
    Sample,
    ShuffledBatches,
    draw_captions,
    find_samples,
    read_picture,
)


def picture(path, size=(20, 20), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def metadata(folder, *entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_metadata_names_pictures_with_one_caption_or_several(tmp_path):
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "b.png")
    metadata(
        tmp_path,
        {"file_name": "images/a.png", "text": ["one", "two"], "scene": 3},
        "",
        {"file_name": "b.png", "text": "three"},
    )
    assert find_samples(tmp_path) == [
        Sample(tmp_path / "images/a.png", ("one", "two")),
        Sample(tmp_path / "b.png", ("three",)),
    ]


def test_captions_lie_beside_pictures(tmp_path):
    picture(tmp_path / "b.png")
    picture(tmp_path / "deep/a.JPG")
    (tmp_path / "b.txt").write_text(" a caption\n")
    (tmp_path / "deep/a.txt").write_text("another")
    (tmp_path / "README.md").write_text("no picture")
    assert find_samples(tmp_path) == [
        Sample(tmp_path / "b.png", ("a caption",)),
        Sample(tmp_path / "deep/a.JPG", ("another",)),
    ]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder"):
        find_samples(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no captioned pictures"):
        find_samples(tmp_path)


def test_pictures_without_captions_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"a\.png has no caption: expected a\.txt"):
        find_samples(tmp_path)
    (tmp_path / "a.txt").write_text("  ")
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        find_samples(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not a JSON object"),
        ("[1]", "line 2: expected"),
        ({"text": "no name"}, "line 2: expected"),
        ({"file_name": "a.png"}, '"text" is None'),
        ({"file_name": "a.png", "text": []}, r'"text" is \[\]'),
        ({"file_name": "a.png", "text": ["", "b"]}, '"text" is'),
    ],
)
def test_broken_metadata_is_refused_with_its_line(tmp_path, line, message):
    picture(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "fine"}, line)
    with pytest.raises(ValueError, match=message):
        find_samples(tmp_path)


def test_metadata_of_a_missing_picture_is_refused(tmp_path):
    metadata(tmp_path, {"file_name": "gone.png", "text": "gone"})
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no file .*gone\.png"):
        find_samples(tmp_path)


def test_pictures_are_cut_to_the_centre_square(tmp_path):
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (16, 0, 48, 32))  # the centre square is white
    image.save(tmp_path / "wide.png")
    pixels = read_picture(tmp_path / "wide.png", 32)
    assert pixels.shape == (3, 32, 32)
    assert (pixels == 1).all()
    assert (read_picture(picture(tmp_path / "black.png", colour="black"), 16) == -1).all()


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        PictureDataset([Sample(tmp_path / "bad.png", ("a",))], 16)[0]


def test_each_epoch_visits_every_sample_once_in_a_new_order():
    batches = ShuffledBatches(num_samples=10, batch_size=4, seed=3)
    stream = [index for batch in islice(batches, 5) for index in batch]
    first, second = stream[:10], stream[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [index for batch in islice(batches, 5) for index in batch] == stream


def test_processes_share_out_the_batches_of_one():
    together = islice(ShuffledBatches(12, batch_size=6, seed=0), 5)
    ranks = [islice(ShuffledBatches(12, 3, 0, rank, num_processes=2), 5) for rank in range(2)]
    for whole, first, second in zip(together, *ranks, strict=True):
        assert whole == first + second


def test_captions_are_drawn_evenly_and_dropped_at_the_given_rate():
    samples = [Sample("x", ("one", "two")), Sample("y", ("three",))]
    rng = np.random.default_rng(0)
    drawn = Counter(draw_captions(samples, [0] * 10_000 + [1] * 10_000, 0.15, rng))
    assert drawn[""] / 20_000 == pytest.approx(0.15, abs=0.01)
    assert drawn["one"] / drawn["two"] == pytest.approx(1, abs=0.1)
    assert drawn["one"] + drawn["two"] == pytest.approx(8_500, abs=200)
    assert draw_captions(samples, [1, 1], 0.0, rng) == ["three", "three"]
    assert draw_captions(samples, [1, 1], 1.0, rng) == ["", ""]


def test_dataset_tells_the_index(tmp_path):
    samples = [Sample(picture(tmp_path / f"{i}.png"), ("a",)) for i in range(2)]
    index, pixels = PictureDataset(samples, 16)[1]
    assert index == 1
    assert pixels.dtype == torch.float32
