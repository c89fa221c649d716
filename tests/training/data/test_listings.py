"""Tests of pictures in folders: with captions beside them, or named by metadata files."""

import csv
import io
import json
import os
import tracemalloc

import pytest

from localdit.training.data import listings
from localdit.training.data.listings import (
    list_files,
    list_metadata,
    list_pictures,
    metadata_files,
    printable,
    split_suffix,
)
from localdit.training.data.samples import Blob, Candidate, CaptionFile, Fault, read_captions
from tests.training.data.drawn import write_files


def test_files_are_sorted_by_code_points(tmp_path, monkeypatch):
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


def test_hidden_files_links_and_special_files(tmp_path):
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


def test_each_real_folder_is_listed_once(tmp_path):
    write_files(tmp_path, {f"data/{name}/p.png": b"" for name in ("a", "c", "e/deep")})
    write_files(tmp_path, {"other/b/p.png": b"", "other/p.png": b""})
    root = tmp_path / "data"
    (root / "a/c").symlink_to("../c")
    (root / "c/a").symlink_to("../a")
    (root / "b").symlink_to("e")  # its real name is preferred
    (root / "x").symlink_to("../other")
    (root / "w").symlink_to("../other/b")  # the first of two links
    (root / "y").symlink_to("../other")
    (tmp_path / "other/b/round").symlink_to("../../data")
    (tmp_path / "other/up").symlink_to("../..")
    expected = ["a/p.png", "c/p.png", "e/deep/p.png", "w/p.png", "x/p.png"]
    assert list_files(root) == expected
    assert list_files(root, without=root / "e") == [name for name in expected if name[0] != "e"]
    (tmp_path / "elsewhere").symlink_to(root / "e/deep")
    assert list_files(root, without=tmp_path / "elsewhere") == [*expected[:2], *expected[3:]]


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


def test_files_of_an_unknown_type_with_a_caption_are_faults(tmp_path):
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


def test_caption_files_whose_names_differ_in_case_only_are_duplicates(tmp_path):
    names = ("a.png", "a.TXT", "a.Txt", "a.txt", "a.JSON", "b.TXT", "b.txt", "c.JPG", "c.TXT")
    write_files(tmp_path, dict.fromkeys(names, "{}"))
    if len(list_files(tmp_path)) < len(names):
        pytest.skip("this file system has one name for them")
    listing = list_pictures(tmp_path, list_files(tmp_path))
    assert [entry for entry in listing if isinstance(entry, Fault)] == [
        Fault("duplicate", "a.TXT", "the caption is read from a.txt"),
        Fault("duplicate", "a.Txt", "the caption is read from a.txt"),
    ]
    assert [entry.id for entry in listing if not isinstance(entry, Fault)] == ["a.png", "c.JPG"]


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


def jsonl(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def listed(root):
    """Return captions of the pictures by id, and kinds of the faults by id."""
    listing = list_metadata(root, list_files(root))
    pictures = {e.id: read_captions(e.captions) for e in listing if isinstance(e, Candidate)}
    return pictures, {e.id: e.kind for e in listing if not isinstance(e, Candidate)}


def test_jsonl(tmp_path):
    rows = [
        {"file_name": "b.png", "text": " of b "},
        {"file_name": "sub/a.png", "caption": ["one", "two"], "width": 5},
        "",
        {"file_name": "./c.png", "text": "of c"},
    ]
    write_files(tmp_path, {"metadata.jsonl": jsonl(*rows)})
    assert listed(tmp_path) == (
        {"b.png": ("of b",), "sub/a.png": ("one", "two"), "c.png": ("of c",)},
        {},
    )
    first = list_metadata(tmp_path, list_files(tmp_path))[0]
    assert first.image == Blob(str(tmp_path / "b.png"))


def test_csv(tmp_path):
    file = io.StringIO()
    csv.writer(file).writerows(
        [
            ["width", "file_name", "text"],
            ["5", "a.png", 'a "red", round\nbear'],
            [],
            ["5", "b.png", "Bär"],
        ]
    )
    write_files(tmp_path, {"metadata.csv": "\ufeff" + file.getvalue()})
    assert listed(tmp_path) == ({"a.png": ('a "red", round\nbear',), "b.png": ("Bär",)}, {})


@pytest.mark.parametrize("lists", [False, True])
def test_parquet(tmp_path, lists):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [["one", "two"], ["three"]] if lists else ["one", "three"]
    table = pa.table({"file_name": ["a.png", "b.png"], "size": [5, 6], "text": texts})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    first = ("one", "two") if lists else ("one",)
    assert listed(tmp_path) == ({"a.png": first, "b.png": ("three",)}, {})


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_metadata_in_any_unicode_encoding(tmp_path, name, encoding):
    text = 'file_name,text\r\na.png,Bär\r\nb.png,"a\nb"\r\n'
    if name.endswith("jsonl"):
        rows = [{"file_name": "a.png", "text": "Bär"}, {"file_name": "b.png", "text": "a\nb"}]
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_files(tmp_path, {name: text.encode(encoding)})
    assert listed(tmp_path) == ({"a.png": ("Bär",), "b.png": ("a\nb",)}, {})


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_in_another_encoding_says_so(tmp_path, name):
    text = "file_name,text\na.png,a bear\nb.png,Bär\n"
    if name.endswith("jsonl"):
        rows = [{"file_name": "a.png", "text": "a bear"}, {"file_name": "b.png", "text": "Bär"}]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_files(tmp_path, {f"latin/{name}": text.encode("latin-1")})
    candidate, fault = list_metadata(tmp_path / "latin", [name])
    assert (candidate.id, candidate.captions) == ("a.png", "a bear")
    assert fault[:2] == ("bad entry", f"{name}, entry 2")
    assert "is not UTF-8 text" in fault.detail
    write_files(tmp_path, {f"wide/{name}": text.encode("utf-16-le")})
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text.*UTF-16"):
        list_metadata(tmp_path / "wide", [name])
    write_files(tmp_path, {f"odd/{name}": text.encode("utf-16") + b"x"})
    if name.endswith("jsonl"):
        with pytest.raises(ValueError, match=rf"{name} is not utf-16 text"):
            list_metadata(tmp_path / "odd", [name])


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_endless_line_takes_bounded_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(listings, "MAX_LINE", 200_000)
    path = tmp_path / name
    rows = {"a.png": "1", "b.png": "x" * 30_000_000, "c.png": "3"}
    lines = ["file_name,text", *(f"{name},{text}" for name, text in rows.items())]
    if name.endswith("jsonl"):
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    path.write_text("\n".join(lines))
    del lines, rows
    tracemalloc.start()
    pictures, faults = listed(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (pictures, faults) == (
        {"a.png": ("1",), "c.png": ("3",)},
        {f"{name}, entry 2": "bad entry"},
    )
    assert peak < 3_000_000


def test_names_as_other_systems_write_them(tmp_path):
    composed, decomposed = "sub/caf\u00e9.png", "sub/cafe\u0301 2.png"
    write_files(tmp_path, {composed: b"", decomposed: b"", "sub/x\\y.png": b""})
    named = {
        "sub\\cafe\u0301.png": composed,
        "sub/caf\u00e9 2.png": decomposed,
        "sub/x\\y.png": "sub/x\\y.png",
        "..\\sub/gone.png": "..\\sub/gone.png",
    }
    rows = [{"file_name": name, "text": name} for name in named]
    write_files(tmp_path, {"metadata.jsonl": jsonl(*rows)})
    listing = list_metadata(tmp_path, list_files(tmp_path))
    assert [(entry.id, entry.captions) for entry in listing] == [
        (file, name) for name, file in named.items()
    ]


def test_a_second_key_counts_when_the_first_is_empty(tmp_path):
    rows = [
        {"file_name": "a.png", "text": None, "caption": "second"},
        {"file_name": "b.png", "text": [" "], "prompt": "fourth"},
    ]
    write_files(tmp_path, {"json/metadata.jsonl": jsonl(*rows)})
    assert listed(tmp_path / "json")[0] == {"a.png": ("second",), "b.png": ("fourth",)}
    write_files(tmp_path, {"csv/metadata.csv": "file_name,caption,text\na.png,second,\n"})
    assert listed(tmp_path / "csv")[0] == {"a.png": ("second",)}


def test_names_are_relative_to_the_metadata_file(tmp_path):
    write_files(
        tmp_path,
        {
            "train/metadata.jsonl": jsonl(
                {"file_name": "a.png", "text": "1"}, {"file_name": "../shared/b.png", "text": "2"}
            ),
            "more/metadata.csv": "file_name,text\na.png,3\n",
            "more/other.jsonl": "never read",
        },
    )
    assert listed(tmp_path)[0] == {
        "more/a.png": ("3",),
        "train/a.png": ("1",),
        "shared/b.png": ("2",),
    }
    assert metadata_files(list_files(tmp_path)) == ["more/metadata.csv", "train/metadata.jsonl"]


def test_a_picture_named_twice_has_the_captions_of_both(tmp_path):
    rows = [
        {"file_name": "a.png", "text": "one"},
        {"file_name": "b.png", "text": "of b"},
        {"file_name": "./a.png", "text": ["two", "one"]},
    ]
    write_files(tmp_path, {"metadata.jsonl": jsonl(*rows)})
    assert listed(tmp_path) == ({"a.png": ("one", "two"), "b.png": ("of b",)}, {})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "5",
        '"a.png"',
        "[" * 100_000,
        '{"text": "a"}',
        '{"file_name": 5, "text": "a"}',
        '{"file_name": "", "text": "a"}',
        '{"file_name": "../a.png", "text": "a"}',
        '{"file_name": "sub/../../../etc/passwd", "text": "a"}',
        '{"file_name": "..", "text": "a"}',
        '{"file_name": "/etc/passwd", "text": "a"}',
        '{"file_name": "a\\u0000.png", "text": "a"}',
        '{"file_name": "a\\ud800.png", "text": "a"}',
        b'{"file_name": "b\xe4r.png", "text": "a"}',
    ],
)
def test_invalid_lines_of_json_are_faults(tmp_path, line):
    good = [b'{"file_name": "a.png", "text": "1"}', b'{"file_name": "b.png", "text": "2"}']
    line = line if isinstance(line, bytes) else line.encode()
    write_files(tmp_path, {"metadata.jsonl": b"\n".join([good[0], line, good[1]])})
    assert listed(tmp_path) == (
        {"a.png": ("1",), "b.png": ("2",)},
        {"metadata.jsonl, entry 2": "bad entry"},
    )


@pytest.mark.parametrize(
    "row",
    ["b.png", "b.png,a bear, red", '"b.png"x,a', f"b.png,{'x' * 200_000}", ",a", "../b.png,a"],
)
def test_invalid_rows_of_csv_are_faults(tmp_path, row):
    write_files(tmp_path, {"metadata.csv": f"file_name,text\na.png,1\n{row}\nc.png,2\n"})
    assert listed(tmp_path) == (
        {"a.png": ("1",), "c.png": ("2",)},
        {"metadata.csv, entry 2": "bad entry"},
    )


def test_a_row_with_an_open_quote(tmp_path):
    write_files(tmp_path, {"metadata.csv": 'file_name,text\na.png,1\nb.png,"2\nc.png,3\n'})
    assert listed(tmp_path) == ({"a.png": ("1",)}, {"metadata.csv, entry 2": "bad entry"})


def test_unusable_metadata_is_refused(tmp_path):
    cases = {
        "metadata.jsonl": (jsonl({"image": "a.png", "text": "a"}), "has a file_name"),
        "metadata.csv": (
            "image,text\na.png,a\n",
            "has the columns image, text; expected file_name",
        ),
    }
    for name, (content, message) in cases.items():
        write_files(tmp_path / name.split(".")[1], {name: content})
        with pytest.raises(ValueError, match=message):
            listed(tmp_path / name.split(".")[1])
    for content in ("", "file_name\na.png\n", '"file_name\n'):
        write_files(tmp_path, {"csv/metadata.csv": content})
        with pytest.raises(ValueError, match=r"metadata\.csv"):
            listed(tmp_path / "csv")
    write_files(tmp_path, {"two/metadata.csv": "", "two/metadata.jsonl": ""})
    with pytest.raises(ValueError, match=r"one metadata file.*two/metadata\.csv, two/metadata\.j"):
        listed(tmp_path)


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    write_files(tmp_path, {"metadata.parquet": "PAR1 this is not PAR1"})
    with pytest.raises(ValueError, match=r"metadata\.parquet can't be read as Parquet"):
        listed(tmp_path)
