"""Pictures in folders, with their captions beside them."""

import os

import pytest

from localdit.training.data.listings import list_files, list_pictures, printable, split_suffix
from localdit.training.data.samples import Blob, Candidate, CaptionFile, Fault, read_captions
from tests.training.data.drawn import write_files


def test_the_order_is_that_of_code_points_whatever_the_file_system_says(tmp_path, monkeypatch):
    names = [
        "b.png",
        "B.png",
        "a/z.png",
        "a/Z.png",
        "a.png",
        "é.png",
        "a-b/c.png",
        "10.png",
        "9.png",
    ]
    write_files(tmp_path, dict.fromkeys(names, b""))
    assert list_files(tmp_path) == sorted(names)

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Reversed(reversed([*scandir(path)])))
    assert list_files(tmp_path) == sorted(names)


def test_hidden_files_links_and_what_is_no_file(tmp_path):
    write_files(
        tmp_path, {".a.png": b"", ".git/b.png": b"", "c/d.png": b"", "elsewhere/e.png": b""}
    )
    root = tmp_path / "c"
    (root / "back").symlink_to(tmp_path)
    (root / "here").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "pipe.png")
    assert list_files(root) == ["d.png", "gone.png", "linked/e.png"]


def test_captions_beside_pictures(tmp_path):
    write_files(
        tmp_path,
        {
            "a.png": b"",
            "a.txt": "of a",
            "a.json": '"never read"',
            "sub/b.c.JPG": b"",
            "sub/b.c.caption": "of b.c",
            "sub/b.txt": "of nothing",
            "d.webp": b"",
            "d.JSON": '["one", "two"]',
            "e.gif": b"",
            "notes.txt": "no picture",
            "README": "",
        },
    )
    listing = list_pictures(tmp_path, list_files(tmp_path))
    assert all(isinstance(entry, Candidate) for entry in listing)
    assert [entry.id for entry in listing] == ["a.png", "d.webp", "e.gif", "sub/b.c.JPG"]
    assert listing[3].image == Blob(str(tmp_path / "sub/b.c.JPG"))
    assert listing[1].captions == CaptionFile("json", Blob(str(tmp_path / "d.JSON")))
    assert listing[2].captions is None
    texts = [read_captions(listing[index].captions) for index in (0, 1, 3)]
    assert texts == [("of a",), ("one", "two"), ("of b.c",)]


def test_what_has_a_caption_and_is_of_no_kind_that_is_read(tmp_path):
    write_files(
        tmp_path,
        {
            "a.heic": b"",
            "a.txt": "of a",
            "b.png": b"",
            "b.psd": b"",
            "b.txt": "of b",
            "c.mov": b"",
        },
    )
    assert [entry[:2] for entry in list_pictures(tmp_path, list_files(tmp_path))] == [
        ("wrong type", "a.heic"),
        ("b.png", Blob(str(tmp_path / "b.png"))),
    ]
    assert isinstance(list_pictures(tmp_path, list_files(tmp_path))[0], Fault)


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_a_name_that_is_not_utf8_can_be_reported(tmp_path):
    name = os.fsdecode(b"b\xe4r.png")
    try:
        (tmp_path / name).write_bytes(b"")
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    [entry] = list_pictures(tmp_path, list_files(tmp_path))
    assert entry.id == r"b\xe4r.png"
    assert entry.image.read() == b""


def test_names():
    assert split_suffix("a/b.c/d") == ("a/b.c/d", "")
    assert split_suffix("a/b.tar.gz") == ("a/b.tar", "gz")
    assert printable("Bär") == "Bär"
