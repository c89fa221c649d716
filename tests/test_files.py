"""Files and folders that appear complete or not at all."""

import errno
import os

import pytest

from localdit.files import remove_folder, whole_file, whole_folder


def fail(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    with whole_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


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
    with pytest.raises(OSError, match="No space left"), whole_file(path) as file:
        file.write(b"half")
        if step == "write":
            fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


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
