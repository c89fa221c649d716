"""The place of pictures, and that none is replaced."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from localdit.cli.output import Output, plan_output
from localdit.images import prepare_output_folder, read_metadata

from .conftest import names

PICTURE = Image.new("RGB", (4, 4), "red")


def save(output, count=1):
    prepare_output_folder(output.folder)
    return [str(output.save(PICTURE, index, {"index": index})) for index in range(count)]


def test_a_file_is_the_picture(here):
    assert save(plan_output(Path("a.png"), "generate", 1)) == ["a.png"]
    assert save(plan_output(Path("deep/b.PNG"), "generate", 1)) == ["deep/b.PNG"]
    assert read_metadata("a.png") == {"index": 0}


def test_several_pictures_are_numbered(here):
    output = plan_output(Path("a.png"), "generate", 2, grid=True)
    assert save(output, 2) == ["a_000.png", "a_001.png"]
    assert str(output.save_grid(PICTURE)) == "a_grid.png"


@pytest.mark.parametrize(("count", "grid", "there"), [
    (1, False, "a.png"), (2, False, "a_001.png"), (2, True, "a_grid.png"),
])  # fmt: skip
def test_an_existing_file_is_kept_without_overwrite(here, count, grid, there):
    Path(there).write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=f"{there} already exists; .* --overwrite"):
        plan_output(Path("a.png"), "generate", count, grid=grid)
    assert Path(there).read_bytes() == b"mine"
    output = plan_output(Path("a.png"), "generate", count, grid=grid, overwrite=True)
    save(output, count)
    if not grid:
        assert Path(there).read_bytes() != b"mine"


def test_a_file_that_appears_meanwhile_is_kept(here):
    output = plan_output(Path("a.png"), "generate", 1)
    Path("a.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        save(output)
    assert Path("a.png").read_bytes() == b"mine"
    assert names(here) == ["a.png"]


def test_numbers_continue_in_a_folder(here):
    Path("out").mkdir()
    Path("out/edit_041.png").write_bytes(b"mine")
    output = plan_output(Path("out"), "edit", 2)
    assert save(output, 2) == ["out/edit_042.png", "out/edit_043.png"]
    assert str(output.save_grid(PICTURE)) == "out/edit_grid_000.png"
    assert save(output) == ["out/edit_044.png"]


def test_a_number_that_another_process_takes_is_skipped(here, monkeypatch):
    output = plan_output(Path("out"), "edit", 1)
    sound = Output._save

    def late(self, name, *args):
        if name == "edit_000.png":
            Path("out/edit_000.png").write_bytes(b"theirs")
        return sound(self, name, *args)

    monkeypatch.setattr(Output, "_save", late)
    assert save(output) == ["out/edit_001.png"]
    assert Path("out/edit_000.png").read_bytes() == b"theirs"


def test_folders_may_be_named_like_pictures(here):
    Path("a.png").mkdir()
    assert save(plan_output(Path("a.png"), "edit", 1)) == ["a.png/edit_000.png"]
    assert save(plan_output(Path("v1.2"), "edit", 1)) == ["v1.2/edit_000.png"]


def test_there_is_nothing_to_overwrite_in_a_folder(here):
    Path("there").mkdir()
    for folder in ("new", "there"):
        with pytest.raises(ValueError, match=f"--overwrite is given, but .* folder {folder},"):
            plan_output(Path(folder), "edit", 1, overwrite=True)


def test_other_kinds_of_pictures_are_refused(here):
    for suffix in ("jpg", "avif", "heic", "jxl", "jp2", "TIFF"):
        with pytest.raises(ValueError, match=rf"--output is a\.{suffix}; .* as PNG: a\.png"):
            plan_output(Path(f"a.{suffix}"), "edit", 1)
    with pytest.raises(ValueError, match="a.pt is named like a file, but would be a folder"):
        plan_output(Path("a.pt"), "edit", 1)


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(here):
    Path("file").write_text("")
    for place in ("file/a.png", "file/folder"):
        with pytest.raises(OSError, match="can't write to the output folder file"):
            prepare_output_folder(plan_output(Path(place), "edit", 1).folder)


def test_on_a_full_disk_no_probe_stays(here):
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
from localdit.images import prepare_output_folder
prepare_output_folder("out")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "can't write to the output folder out: File too large" in done.stderr
    assert names("out") == []


@pytest.mark.parametrize(("name", "count", "grid"), [
    ("a" * 252 + ".png", 1, False), ("a" * 248 + ".png", 2, False),
    ("a" * 247 + ".png", 1, True), ("a" * 256 + "/b.png", 1, False),
    ("\u00e9" * 126 + ".png", 1, False),
])  # fmt: skip
def test_names_that_are_too_long_are_refused_at_once(here, name, count, grid):
    for overwrite in (False, True):
        with pytest.raises(OSError, match="--output: .* can't be the name of a file: File name"):
            plan_output(Path(name), "edit", count, grid=grid, overwrite=overwrite)


def test_names_that_windows_reserves_are_refused_there(here, monkeypatch):
    assert plan_output(Path("aux.png"), "edit", 1).names == ("aux.png",)
    is_aux = lambda path: Path(path).stem == "aux"  # noqa: E731
    monkeypatch.setattr("os.path.isreserved", is_aux, raising=False)
    with pytest.raises(OSError, match="--output: aux.png can't be .*: Windows reserves it"):
        plan_output(Path("aux.png"), "edit", 1)


def test_the_longest_names_are_allowed(here):
    output = plan_output(Path("a" * 246 + ".png"), "edit", 2, grid=True)
    assert [len(name) for name in [*save(output, 2), str(output.save_grid(PICTURE))]] == [
        254, 254, 255,
    ]  # fmt: skip


def test_links_and_folders_in_the_way_are_refused_at_once(here):
    Path("a_001.png").mkdir()
    for overwrite in (False, True):
        with pytest.raises(IsADirectoryError, match="a_001.png is a folder; choose another name"):
            plan_output(Path("a.png"), "edit", 2, overwrite=overwrite)
    Path("b.png").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="b.png already exists"):
        plan_output(Path("b.png"), "edit", 1)
    save(plan_output(Path("b.png"), "edit", 1, overwrite=True))
    assert not Path("b.png").is_symlink()
