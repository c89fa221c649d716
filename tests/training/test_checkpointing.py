import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localdit.training.checkpointing import (
    MANIFEST,
    DamagedCheckpoint,
    checkpoints,
    newest_checkpoint,
    remove_old_checkpoints,
    set_aside_after,
    verified_folder,
    verify_checkpoint,
)

ROOT = Path(__file__).parents[2]


def save(run, step, content="weights"):
    with verified_folder(run / f"checkpoint-{step}", step) as folder:
        (folder / "training").mkdir()
        (folder / "training/model").write_text(content)
        (folder / "other").write_text("other")
        (folder / "link").symlink_to("/")
    return run / f"checkpoint-{step}"


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed, events = set(), []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def replace(source, target):
        events.append((str(source), set(flushed)))
        real_replace(source, target)
        flushed.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 3)
    ((source, before),) = events
    names = ["", "/training", "/training/model", "/other", f"/{MANIFEST}"]
    assert {source + name for name in names} <= before
    assert str(tmp_path) in flushed  # the entry of the new name


@pytest.mark.parametrize("name", ["training/model", "other"])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_detected(tmp_path, name):
    file = save(tmp_path, 1) / name
    verify_checkpoint(tmp_path / "checkpoint-1")
    content = file.read_bytes()
    for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1]):
        file.write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint, match=f"{name} is damaged"):
            verify_checkpoint(tmp_path / "checkpoint-1")
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"it lacks {name}"):
        verify_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ("[" * 100_000, "can't be read"),
        ('{"format": 1}', "can't be read"),
        ('{"format": 99, "sha256": {}}', "format 99"),
    ],
)
def test_broken_manifests_are_detected(tmp_path, manifest, message):
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(DamagedCheckpoint, match=message):
        verify_checkpoint(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint, match="no manifest"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"step": 6', '"step": 4', "manifest.json is damaged"),
        ('"step"', '"stop"', "manifest.json is damaged"),
        ('"sha256":', '"sha254":', "manifest.json can't be read"),
        ('"sha256_of_entries"', '"sha255_of_entries"', "manifest.json is damaged"),
        ('"format": 2', '"format": 1', "manifest.json is damaged"),
        ('"format": 2', '"format": 3', "it has format 3, this version reads 2"),
        ("\n}", "\n }", "manifest.json is damaged"),
    ],
)
def test_an_altered_manifest_is_detected(tmp_path, old, new, message):
    folder = save(tmp_path, 6)
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(DamagedCheckpoint, match=message):
        verify_checkpoint(folder)


def unsealed(folder, **changes):
    """Give a checkpoint the manifest of an earlier version."""
    entries = json.loads((folder / MANIFEST).read_text())
    del entries["sha256_of_entries"]
    (folder / MANIFEST).write_text(json.dumps(entries | {"format": 1} | changes, indent=2) + "\n")


def test_the_number_in_a_folders_name_is_its_step(tmp_path):
    folder = save(tmp_path, 6)
    for name, sound in (("copy", True), ("set-aside-6", True), ("checkpoint-7", False)):
        folder = folder.rename(tmp_path / name)
        if sound:
            assert verify_checkpoint(folder).step == 6
        else:
            with pytest.raises(DamagedCheckpoint, match="of step 6, but the folder is named"):
                verify_checkpoint(folder)


def test_a_checkpoint_of_an_earlier_version_is_read_if_its_name_confirms_the_manifest(tmp_path):
    folder = save(tmp_path, 6)
    unsealed(folder)
    assert verify_checkpoint(folder).step == 6
    assert newest_checkpoint(tmp_path) == (folder, [])
    (tmp_path / "latest").symlink_to(folder)
    assert verify_checkpoint(tmp_path / "latest").step == 6
    unsealed_step = {"step": 4}, {"step": None}, {"step": "6"}
    for change in unsealed_step:
        save(tmp_path, 6)
        unsealed(folder, **change)
        with pytest.raises(DamagedCheckpoint, match="but the folder is named checkpoint-6"):
            verify_checkpoint(folder)
    save(tmp_path, 6)
    unsealed(folder)
    with pytest.raises(DamagedCheckpoint, match="an earlier version .* name it checkpoint-6"):
        verify_checkpoint(folder.rename(tmp_path / "copy"))


def test_the_newest_sound_checkpoint_is_used_and_skipped_ones_are_named(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])
    for step in (9, 10, 200):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200/other").write_text("othes")
    (tmp_path / "checkpoint-x").mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [200, 10, 9]
    found, skipped = newest_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    (reason,) = skipped
    assert "checkpoint-200 is skipped: other is damaged" in reason


def test_old_checkpoints_are_removed_but_at_least_two_stay(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    remove_old_checkpoints(tmp_path, keep=3)
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 4, 3]
    remove_old_checkpoints(tmp_path, keep=0)
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 4]
    assert len(os.listdir(tmp_path)) == 2


def test_damaged_checkpoints_never_displace_later_ones(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
    for step in (200, 300):
        (tmp_path / f"checkpoint-{step}/other").write_text("othes")
    found, _ = newest_checkpoint(tmp_path)
    assert verify_checkpoint(found).step == 100
    assert len(set_aside_after(tmp_path, 100)) == 2
    save(tmp_path, 120)
    remove_old_checkpoints(tmp_path, 2)
    assert [step for step, _ in checkpoints(tmp_path)] == [120, 100]
    assert sorted(os.listdir(tmp_path))[2:] == ["set-aside-200", "set-aside-300"]
    for again in ("set-aside-200.2", "set-aside-200.3"):  # none takes the place of another
        save(tmp_path, 200)
        (message,) = set_aside_after(tmp_path, 120)
        assert f"checkpoint-200 is kept as {again};" in message
        assert verify_checkpoint(tmp_path / again).step == 200
    assert (tmp_path / "set-aside-200/other").read_text() == "othes"


def test_a_write_error_leaves_the_last_checkpoint_intact(full_disk, tmp_path):
    save(tmp_path, 1)
    with full_disk(1000), pytest.raises(OSError):
        save(tmp_path, 2, content="x" * 5000)
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_a_checkpoint_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def rot(folder):
        raise DamagedCheckpoint("other is damaged")

    monkeypatch.setattr("localdit.training.checkpointing.verify_checkpoint", rot)
    with pytest.raises(DamagedCheckpoint):
        save(tmp_path, 2)
    assert os.listdir(tmp_path) == ["checkpoint-1"]


SAVING = """
import sys
from pathlib import Path
from localdit.training.checkpointing import remove_old_checkpoints, verified_folder
run = Path(sys.argv[1])
for step in range(int(sys.argv[2]), 10**9):
    with verified_folder(run / f"checkpoint-{step}", step) as folder:
        for part in range(3):
            (folder / str(part)).write_bytes(bytes([step % 256]) * 300_000)
    remove_old_checkpoints(run, 2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_hundred_kills_never_leave_a_run_without_a_sound_checkpoint(tmp_path):
    save(tmp_path, 0)
    damaged, step = 0, 1
    for kill in range(100):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, tmp_path, str(step)], cwd=ROOT, stdout=subprocess.PIPE
        )
        process.stdout.readline()  # the first one is written: it saves without a pause
        time.sleep(0.0005 * kill)
        process.kill()
        process.communicate()
        found, skipped = newest_checkpoint(tmp_path)
        damaged += len(skipped)
        assert found is not None
        assert len(checkpoints(tmp_path)) >= 2
        step = int(found.name.split("-")[1]) + 1
    assert damaged == 0
    assert step > 100
