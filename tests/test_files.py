"""Files and folders that appear complete or not at all."""

import codecs
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from localdit.files import (
    decode_text,
    remove_folder,
    remove_unfinished,
    text_encoding,
    unfinished_in,
    updated_folder,
    user_path,
    whole_file,
    whole_folder,
    write_json,
    write_whole,
)


def fail(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_home_folder_is_meant_also_where_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a.png") == Path("/home/me/a.png")
    for name in ("google/flan-t5-xxl", "box", "-", "a~b", "~nobody_of_this_name/a"):
        assert str(user_path(name)) == name


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ValueError, match="The path is empty: give a name"):
        user_path("")
    assert user_path(".") == Path()


def test_a_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    with whole_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_text_and_json_are_written_in_utf8(tmp_path):
    write_whole(tmp_path / "a.txt", "ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    write_json(tmp_path / "a.json", {"ä": [1]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "\\u00e4": [\n    1\n  ]\n}\n'


def test_libraries_may_write_to_the_name_of_the_file(tmp_path):
    with whole_file(tmp_path / "a.txt") as file, open(file.name, "w") as other:
        other.write("by name")
    assert (tmp_path / "a.txt").read_text() == "by name"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    if step != "write":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left.*a.bin"), whole_file(path) as file:
        file.write(b"half")
        if step == "write":
            fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_errors_name_the_path_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    for name, kind in [("gone/x.png", FileNotFoundError), ("file/x.png", NotADirectoryError),
                       ("folder", IsADirectoryError)]:  # fmt: skip
        with pytest.raises(kind) as raised, whole_file(Path(name)):
            pass
        assert raised.value.filename == name and ".tmp" not in str(raised.value)
    with pytest.raises(NotADirectoryError) as raised, whole_folder(Path("file/run")):
        pass
    assert raised.value.filename == "file/run"
    with pytest.raises(FileNotFoundError) as raised, whole_folder(Path("run")) as folder:
        (folder / "deep/a").write_text("")
    assert raised.value.filename == "run/deep/a"
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("links", [True, False])
def test_without_overwrite_an_existing_file_is_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "a.bin"
    with whole_file(path, overwrite=False) as file:
        file.write(b"first")
    with (
        pytest.raises(FileExistsError, match="already exists"),
        whole_file(path, overwrite=False) as file,
    ):
        file.write(b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin"]


def test_two_writers_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a.bin"
    with whole_file(path) as first, whole_file(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # the last to finish
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "\u00e9" * 127, "\U0001f534" * 63])
def test_a_name_may_have_255_bytes(tmp_path, name):
    with whole_file(tmp_path / name) as file:
        file.write(b"new")
    assert names(tmp_path) == [name]
    for _ in range(2):
        with whole_folder(tmp_path / f"{name[1:]}f") as folder:
            (folder / "a").touch()
    remove_folder(tmp_path / f"{name[1:]}f")
    assert names(tmp_path) == [name]


def test_a_folder_appears_once_it_is_complete_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "run"
    for number in range(2):
        with whole_folder(path) as folder:
            (folder / f"{number}").mkdir()
            (folder / f"{number}" / "a").write_text("a")
            (folder / "link").symlink_to("nowhere")
            assert path.exists() == bool(number)
        assert names(path) == [f"{number}", "link"]
    assert names(path.parent) == ["run"]


def test_a_folder_replaces_a_link_and_leaves_what_it_links_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to("elsewhere")
    with whole_folder(tmp_path / "run") as folder:
        (folder / "a").touch()
    assert names(tmp_path / "run") == ["a"]
    assert names(tmp_path) == ["elsewhere", "run"]


def test_an_update_leaves_what_links_in_the_folder_lead_to(tmp_path):
    """Old weights, a replaced file and one that stays, also a folder deeper."""
    for folder in (tmp_path / "other", tmp_path / "other/deep"):
        folder.mkdir()
        for name in ("old.bin", "config", "kept"):
            (folder / name).write_text("other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/part").symlink_to("../other")
    (tmp_path / "run/broken").symlink_to("nowhere")
    with updated_folder(tmp_path / "run", lambda name: name.endswith(".bin") or None) as folder:
        for part in ("part", "part/deep", "broken"):
            (folder / part).mkdir()
            for name in ("new.bin", "config"):
                (folder / part / name).write_text("run")
    for part in ("part", "part/deep"):
        made = tmp_path / "run" / part
        texts = {file.name: file.read_text() for file in made.iterdir() if file.is_file()}
        assert texts == {"new.bin": "run", "config": "run", "kept": "other"}
    assert names(tmp_path / "run") == ["broken", "part"]
    assert names(tmp_path / "run/broken") == ["config", "new.bin"]
    for folder in (tmp_path / "other", tmp_path / "other/deep"):
        texts = {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}
        assert texts == dict.fromkeys(["old.bin", "config", "kept"], "other")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "run"
    path.mkdir()
    (path / "old").write_text("old")
    replace, calls = os.replace, []

    def fail_once(source, target):  # after the old folder was moved away
        calls.append(source)
        return fail() if len(calls) == 2 else replace(source, target)

    if step != "write":
        monkeypatch.setattr(os, step, fail_once if step == "replace" else fail)
    with pytest.raises(OSError, match="No space left"), whole_folder(path) as folder:
        (folder / "new").write_text("new")
        if step == "write":
            fail()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_safetensors_on_a_full_disk_is_an_error_of_the_system(tmp_path, full_disk, write):
    path = tmp_path / "w"
    weights = {"a": np.zeros(10_000)}
    with full_disk(1000), pytest.raises(OSError, match="File too large: '.*/w'"), write(path) as it:
        save_file(weights, it / "a" if isinstance(it, Path) else it.name)
    assert names(tmp_path) == []
    with pytest.raises(SafetensorError), write(path):
        load(b"damaged")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_flush_folders_are_usable(tmp_path, monkeypatch, number):
    flush = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with whole_file(tmp_path / "a") as file:
        file.write(b"a")
    assert (tmp_path / "a").read_bytes() == b"a"


def test_removing_a_folder(tmp_path):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    remove_folder(tmp_path / "run")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_other_files_are_not(tmp_path):
    kept = [".mine", ".note.tmp", ".note.1234.tmp", "config.json.12ab34cd.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    files = [whole_file(tmp_path / name) for name in ("a" * 251 + ".png", ".b", "config.json")]
    writing = [*files, whole_folder(tmp_path / "checkpoint-4")]
    for one in writing:
        one.__enter__()
    assert len(unfinished_in(tmp_path)) == 4 and not unfinished_in(tmp_path / "nowhere")
    remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(kept)


TEXT = "a café\n日本 \U0001f534\n"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_text_is_the_same_in_every_encoding(mark, encoding, ends):
    data = mark + TEXT.replace("\n", ends).encode(encoding)
    assert decode_text(data) == TEXT
    assert data.decode(text_encoding(data[:4])) == TEXT.replace("\n", ends)


def test_marks_between_joined_files_are_dropped():
    assert decode_text(b"\xef\xbb\xbfa cat\n\xef\xbb\xbf\xef\xbb\xbfa dog") == "a cat\na dog"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            b"caf\xe9",
            "a.txt is not UTF-8 text (at byte 3: unexpected end of data); save it as UTF-8",
        ),
        ("caf\x80".encode("latin-1"), "a.txt is not UTF-8 text (at byte 3: invalid start byte)"),
        (b"a \xed\xa0\xbd cat", "a.txt is not UTF-8 text"),
        ("a cat".encode("utf-16-le"), "a.txt is not UTF-8 text: it has zero bytes"),
        ("a cat".encode("utf-32-be"), "a.txt is not UTF-8 text: it has zero bytes"),
        (b"a cat\0", "a.txt is not UTF-8 text: it has zero bytes"),
        (codecs.BOM_UTF16_LE + b"a", "a.txt is not UTF-16 text"),
        (codecs.BOM_UTF16_LE + b"\x3d\xd8a\0", "a.txt is not UTF-16 text"),
        (codecs.BOM_UTF32_LE + b"a\0\0", "a.txt is not UTF-32 text"),
        (codecs.BOM_UTF32_BE + b"\x01\0\0\0", "a.txt is not UTF-32 text"),
    ],
)
def test_other_text_is_refused(data, reason):
    with pytest.raises(ValueError) as raised:
        decode_text(data, "a.txt")
    assert str(raised.value).startswith(reason)
