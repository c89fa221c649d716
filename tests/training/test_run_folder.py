import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from localdit.models import PRESETS, LocalDiTTransformer2DModel
from localdit.training.checkpointing import verified_folder, verify_checkpoint
from localdit.training.results import PipelineFolder, link_or_copy
from localdit.training.run_folder import RunFolder
from localdit.training.state import Snapshot

ROOT = Path(__file__).parents[2]


OPTIONS = {"data_root": "pictures", "output": "run", "seed": 3}


def checkpoint(run, step):
    with verified_folder(run.path / f"checkpoint-{step}", step) as folder:
        (folder / "file").write_text("content")
        (folder / "training").mkdir()
        (folder / "training/state.json").write_text("{}")


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "new/run")


def test_options_are_written_and_a_used_folder_is_refused(run):
    assert run.open(resume=None) is None
    assert run.open(resume=None) is None  # no run was started
    run.begin(OPTIONS, 0)
    assert json.loads((run.path / "config.json").read_text()) == OPTIONS
    with pytest.raises(FileExistsError, match="not empty. Resume the run in it with --resume auto"):
        run.open(resume=None)


def test_auto_starts_a_run_or_resumes_from_the_newest_checkpoint(run, capsys):
    assert run.open(resume="auto") is None
    checkpoint(run, 5), checkpoint(run, 10)
    assert run.open(resume="auto") == run.path / "checkpoint-10"
    (run.path / "checkpoint-10/file").write_text("c0ntent")
    assert run.open(resume="auto") == run.path / "checkpoint-5"
    assert "checkpoint-10 is skipped: file is damaged" in capsys.readouterr().out


def test_checkpoints_are_set_aside_when_the_run_begins_and_not_before(run, capsys):
    run.open(resume=None)
    for step in (5, 10, 15):
        checkpoint(run, step)
    (run.path / "checkpoint-15/file").write_text("c0ntent")
    assert run.open(resume=str(run.path / "checkpoint-5")) == run.path / "checkpoint-5"
    assert {"checkpoint-10", "checkpoint-15"} < set(os.listdir(run.path))
    run.begin({}, 5)
    assert {"set-aside-10", "set-aside-15"} < set(os.listdir(run.path))
    assert "checkpoint-10 is kept as set-aside-10" in capsys.readouterr().out


def test_results_of_later_steps_are_put_away(run, capsys):
    run.open(resume=None)
    picture = [Image.new("RGB", (8, 8))]
    for step in (5, 10):
        run.save_pictures(picture, step)
    (run.path / "validation/mine.png").write_text("")
    for name in ("set-aside-final", "set-aside-final.2"):
        run.save_final(Weights(), {"a": torch.ones(1)}, 10)
        run.begin({}, 10)
        assert (run.path / "final").is_dir() and not (run.path / name).exists()
        run.begin({}, 5)
        assert verify_checkpoint(run.path / name).step == 10 and not (run.path / "final").exists()
        assert f"final is kept as {name};" in capsys.readouterr().out
    assert sorted(os.listdir(run.path / "validation")) == ["00000005.png", "mine.png"]


def test_only_its_checkpoints_go_on_in_a_run(run, tmp_path):
    """Whatever else goes on, `--resume auto` would go on from another state after a kill."""
    run.open(resume=None)
    for step in (5, 10):
        checkpoint(run, step)
    run.begin({}, 5)
    aside = run.path / "set-aside-10"
    with pytest.raises(ValueError, match="set-aside-10 can't be resumed in its run.* new --output"):
        run.open(resume=str(aside))
    assert RunFolder(tmp_path / "branch").open(resume=str(aside)) == aside
    (run.path / "newest").symlink_to("checkpoint-5")
    assert run.open(resume=str(run.path / "newest")) == run.path / "newest"


OPENING = """
import sys
from pathlib import Path
from localdit.training.run_folder import RunFolder
try:
    RunFolder(Path(sys.argv[1])).open(sys.argv[2] if len(sys.argv) > 2 else None)
except ValueError as error:
    sys.exit(str(error))
print("open", flush=True)
sys.stdin.read()
"""


def opening(run, *resume):
    """Open the run in another process, which waits for its end."""
    return subprocess.Popen(
        [sys.executable, "-c", OPENING, run.path, *resume],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_second_process_is_refused_and_leaves_the_folder_as_it_is(run):
    run.open(resume=None)
    with verified_folder(run.path / "checkpoint-5", 5) as folder:
        (folder / "model").write_text("half")
        for resume in ("auto",), ():
            second = opening(run, *resume)
            error = second.communicate(timeout=300)[1]
            assert second.returncode == 1
            assert f"Another process is training into --output {run.path}. Wait" in error
        (folder / "state").write_text("whole")
    assert run.open(resume="auto") == run.path / "checkpoint-5"


def test_the_lock_of_a_killed_process_is_taken_over(run):
    run.open(resume=None)
    checkpoint(run, 5)
    os.close(os.open(run.path / ".lock", os.O_RDWR))  # closing the file frees this process's lock
    first = opening(run, "auto")
    assert first.stdout.readline() == "open\n"
    with pytest.raises(ValueError, match="Another process is training"):
        run.open(resume="auto")
    first.kill()
    first.communicate()
    assert run.open(resume="auto") == run.path / "checkpoint-5"


@pytest.mark.parametrize("resume", [None, "auto", "elsewhere/checkpoint-5"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.jsonl", '{"prompt": "a cat"}'),
        ("config.json", '{"_class_name": "AutoencoderKL"}'),
        ("config.json", "damaged"),
        ("checkpoint-5/trainer_state.json", "{}"),
    ],
)
def test_a_folder_without_a_run_stays_as_it_is(name, text, resume, run):
    (run.path / name).parent.mkdir(parents=True)
    (run.path / name).write_text(text)
    (run.path / ".note.tmp").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty and holds no run. Choose another folder"):
        run.open(resume)
    assert sorted(os.listdir(run.path)) == [".note.tmp", name.split("/")[0]]
    assert (run.path / name).read_text() == text


def test_a_run_that_was_killed_as_it_began_is_started_again(run):
    run.open(resume=None)
    (run.path / ".config.json.12ab34cd.tmp").write_text("{")
    assert run.open(resume="auto") is None
    assert os.listdir(run.path) == [".lock"]
    run.begin(OPTIONS, 0)
    assert run.open(resume="auto") is None


def test_a_checkpoint_of_another_run_is_not_mixed_into_a_run(run, tmp_path, monkeypatch):
    other = RunFolder(tmp_path / "other")
    for one in (run, other):
        one.open(resume=None)
        one.begin(OPTIONS, 0)
        checkpoint(one, 5)
    path = str(other.path / "checkpoint-5")
    with pytest.raises(FileExistsError, match="holds another run than --resume .*other/checkpoint"):
        run.open(path)
    assert RunFolder(tmp_path / "third").open(path) == other.path / "checkpoint-5"
    (tmp_path / "link").symlink_to(other.path)
    monkeypatch.chdir(other.path)
    for same in ("checkpoint-5", "../link/checkpoint-5"):
        assert other.open(same) == Path(same)


def test_only_the_logs_of_the_run_lose_lines(run):
    run.open(resume=None)
    run.begin(OPTIONS, 0)
    for name in ("prompts.jsonl", "samples-old.jsonl"):
        (run.path / name).write_text('{"prompt": "a cat"}\n')
    run.begin(OPTIONS, 0)
    for name in ("prompts.jsonl", "samples-old.jsonl"):
        assert (run.path / name).read_text() == '{"prompt": "a cat"}\n'


def test_averages_are_read_from_the_files_of_the_manifest_only(run):
    with torch.device("meta"):
        transformer = LocalDiTTransformer2DModel(**PRESETS["tiny"])
    result = PipelineFolder(transformer, None, {}, {}, None)
    with verified_folder(run.path / "checkpoint-5", 5) as folder:
        transformer.save_config(folder / "transformer")
        save_file({"a": torch.ones(2)}, folder / "transformer/model.safetensors")
    added = run.path / "checkpoint-5/transformer/zz.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, added)
    assert run.open(resume="auto") == run.path / "checkpoint-5"
    averages = result.averages_in(run.path / "checkpoint-5")
    assert {name: tensor.tolist() for name, tensor in averages.items()} == {"a": [1, 1]}


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(run):
    run.open(resume=None)
    checkpoint(run, 5)
    (run.path / "checkpoint-5/file").unlink()
    with pytest.raises(ValueError, match="All checkpoints in .* are damaged: checkpoint-5"):
        run.open(resume="auto")
    with pytest.raises(
        ValueError, match=r"--resume .*checkpoint-5 can't be resumed: it lacks file"
    ):
        run.open(resume=str(run.path / "checkpoint-5"))


def test_lines_after_the_checkpoint_are_dropped(run):
    run.open(resume=None)
    for step in (1, 2, 3):
        run.log({"step": step})
        run.log({"step": step}, "samples-1.jsonl")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    run.begin({}, 2)
    for name in ("metrics.jsonl", "samples-1.jsonl"):
        steps = [json.loads(line)["step"] for line in (run.path / name).read_text().splitlines()]
        assert steps == [1, 2]


def test_damaged_lines_are_dropped_and_told(run, capsys):
    run.open(resume=None)
    good = b'{"step": 1, "loss": 0.5}'
    bad = [b"\xff\xfe garbage", b'{"step": "x"}', b'{"step": 1.5}', b"[1]", b"7", b"[" * 99_999,
           b'{"loss": 1}', b'{"step": null}', b'{"st']  # fmt: skip
    for name in ("metrics.jsonl", "broken.jsonl"):
        (run.path / name).write_bytes(b"\n".join([good, *bad]))
    run.begin({}, 2)
    told = capsys.readouterr().out
    for name in ("metrics.jsonl", "broken.jsonl"):
        assert (run.path / name).read_bytes() == good + b"\n"
        assert f"{name}: damaged or incomplete lines are dropped: {len(bad)}" in told


def test_a_line_that_cannot_be_written_leaves_no_part_of_it(full_disk, run):
    run.open(resume=None)
    run.log({"step": 1})
    with full_disk(25), pytest.raises(OSError, match="File too large"):
        run.log({"step": 2, "loss": 0.123456789})
    run.log({"step": 3})
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        run.log({"step": 3}, "samples-0.jsonl")
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    assert (run.path / "samples-0.jsonl").read_text() == ""


def test_pictures_are_saved_side_by_side(run):
    run.open(resume=None)
    run.save_pictures([Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")], step=7)
    assert Image.open(run.path / "validation/00000007.png").size == (16, 8)


class NoSpace:
    """A pipeline folder on a full disk."""

    def write(self, folder, averages):
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_gives_one_message(run):
    run.open(resume=None)
    checkpoint(run, 1)
    snapshot = Snapshot({"model": {"a": torch.ones(1)}}, {}, {"progress": {"step": 2}})
    with pytest.raises(OSError, match=r"step 2 could not be written to .*No space left"):
        run.save_checkpoint(NoSpace(), snapshot, keep=2)
    assert sorted(os.listdir(run.path)) == [".lock", "checkpoint-1"]


class Weights:
    """A folder of weights."""

    def write(self, folder, averages):
        save_file(averages, folder / "weights.safetensors")


@pytest.mark.parametrize("part", ["result", "state"])
def test_a_full_disk_gives_one_message_whatever_is_written(part, run, full_disk):
    run.open(resume=None)
    averages = {"a": torch.ones(10_000)}
    state = Snapshot({"optimizer": averages}, {}, {"progress": {"step": 2}})
    with (
        full_disk(1000),
        pytest.raises(OSError, match="could not be written.*too large.*free some"),
    ):
        if part == "result":
            run.save_final(Weights(), averages, 2)
        else:
            run.save_checkpoint(Weights(), state, keep=2)
    assert os.listdir(run.path) == [".lock"]
    run.save_final(Weights(), averages, 2)


def test_folders_are_linked_or_copied_where_links_are_unsupported(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    link_or_copy(tmp_path / "vae", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()

    def refuse(*args, **options):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    link_or_copy(tmp_path / "vae", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy/config.json").read_text() == "{}"


def test_the_tracker_id_stays(run):
    run.open(resume=None)
    assert run.wandb_id() == run.wandb_id()
