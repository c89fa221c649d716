import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.core.encoders import load_encoders
from localdit.core.latents import LatentSpace
from localdit.training.data.buckets import Size
from localdit.training.data.encoded import open_encoded, read_encoded
from localdit.training.data.finding import find_samples
from localdit.training.data.pictures import read_picture
from localdit.training.data.samples import Blob
from localdit.training.encode import job
from localdit.training.encode.__main__ import main
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[3]
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


def draw(folder, count=11):
    """Pictures of two shapes with one or two captions each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        shape = (40, 80, 3) if number % 3 == 0 else (50, 50, 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        captions = [f"a {colour} square" for colour in COLOURS[: 1 + number % 2]]
        lines.append({"file_name": f"{number}.png", "text": [*captions, f"a cat {number}"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Pictures, a pipeline with encoders, and the shards of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("encode")
    draw(folder / "pictures")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    main(options(folder, folder / "encoded"))
    return folder


def options(workplace, output, *more):
    return [
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        "--image-size", "64", "--window-size", "1", "--output", str(output),
        "--samples-per-shard", "3", "--num-workers", "0", *more,
    ]  # fmt: skip


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def stopped(argv):
    """Return the error message of a command."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert main(argv) == 1
    return told.getvalue()


def test_latents_and_text_are_those_of_the_encoders(workplace):
    pipeline = str(workplace / "pipeline")
    encoders = load_encoders(
        {"tokenizer": pipeline, "text_encoder": pipeline, "vae": pipeline}, torch.float32
    )
    found = find_samples(workplace / "encoded")
    assert len(found.samples) == 11
    assert found.encoded.manifest.sources["vae"] == pipeline
    for sample in found.samples:
        size = Size(sample.height, sample.width)
        pixels = read_picture(Blob(str(workplace / "pictures" / sample.id)), size)
        expected = LatentSpace(encoders.vae).encode_pixels(pixels[None])[0]
        for number, caption in enumerate(sample.captions):
            latents, text = read_encoded(sample, number)
            torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
            states = encoders.text.encode_batch([caption], 120)[0][0, : len(text)]
            torch.testing.assert_close(text.float(), states, rtol=1e-2, atol=1e-2)
    empty = encoders.text.encode_batch([""], 120)[0][0, :1]
    torch.testing.assert_close(found.encoded.empty_text.float(), empty, rtol=1e-2, atol=1e-2)


def test_samples_are_encoded_bucket_by_bucket(workplace):
    samples = find_samples(workplace / "encoded").samples
    assert [sample.id for sample in samples] == [
        f"{number}.png" for number in (1, 2, 4, 5, 7, 8, 10, 0, 3, 6, 9)
    ]
    sizes = [Size(sample.height, sample.width) for sample in samples]
    assert sizes[:7] == [Size(64, 64)] * 7
    assert len(set(sizes[7:])) == 1
    assert sizes[7].width > sizes[7].height


def test_webdataset_reads_the_shards(workplace):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((workplace / "encoded").glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    found = find_samples(workplace / "encoded").samples
    assert [json.loads(sample["json"])["id"] for sample in read] == [s.id for s in found]
    assert [sample["safetensors"] for sample in read] == [s.image.read() for s in found]
    first = json.loads(read[0]["json"])
    assert (first["original_height"], first["original_width"]) == (50, 50)


def test_the_disk_space_is_reported_in_advance(workplace, tmp_path, capsys):
    main(options(workplace, tmp_path / "new", "--dry-run"))
    assert not (tmp_path / "new").exists()
    said = capsys.readouterr().out
    found = find_samples(workplace / "encoded")
    latents = sum(2 * read_encoded(sample)[0].numel() for sample in found.samples)
    assert f"latents {job.human_size(latents)}," in said
    assert "11 samples to encode:\n  7 of 64 x 64 pixels\n" in said
    text = sum(
        2 * read_encoded(sample, number)[1].numel()
        for sample in found.samples
        for number in range(len(sample.captions))
    )
    assert f"text {job.human_size(text)} " in said


def test_nothing_is_written_without_enough_disk_space(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "free_bytes", lambda folder: 9_999)
    message = stopped(options(workplace, tmp_path / "new"))
    assert "10 kB are free. Make room" in message
    assert not (tmp_path / "new").exists()


def test_an_interrupted_job_resumes(workplace, tmp_path, capsys):
    folder = tmp_path / "encoded"
    main(options(workplace, folder))
    expected = shards(workplace / "encoded")
    kept = (folder / "shard-00000.tar").stat().st_ino
    # As a kill leaves them: a shard half written, one without its index.
    (folder / "shard-00001.tar").rename(folder / ".shard-00001.tar.0123abcd.tmp")
    (folder / ".note.tmp").write_text("mine")
    (folder / "shard-00001.json").unlink()
    (folder / "shard-00003.json").unlink()
    capsys.readouterr()
    main(options(workplace, folder))
    assert "Shards: 4, of which 2 are to be written" in capsys.readouterr().out
    assert set(expected) == set(shards(folder))
    for name, data in shards(folder).items():
        if name.endswith(".tar"):
            assert data == expected[name]
    assert (folder / "shard-00000.tar").stat().st_ino == kept
    assert [path.name for path in folder.glob(".*.tmp")] == [".note.tmp"]


def test_a_set_is_not_mixed_with_another(workplace, tmp_path, capsys):
    folder = workplace / "encoded"
    before = shards(folder)
    message = stopped(options(workplace, folder, "--image-size", "32"))
    assert "image_size 32 instead of 64" in message
    message = stopped(options(workplace, folder, "--max-caption-length", "7"))
    assert "there is max_caption_length 7 instead of 120. Choose" in message
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    message = stopped(options(workplace, folder, "--pretrained", f"{tmp_path}/other"))
    assert "there is another text_encoder; another vae. Choose" in message
    draw(tmp_path / "pictures", count=10)
    message = stopped(options(workplace, folder, "--data-root", f"{tmp_path}/pictures"))
    assert "samples 10 instead of 11" in message
    assert shards(folder) == before


def test_the_same_encoders_in_another_folder_are_accepted(workplace, tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "moved")
    argv = options(workplace, workplace / "encoded", "--pretrained", f"{tmp_path}/moved")
    main(argv)
    assert "0 are to be written" in capsys.readouterr().out


def test_other_folders_are_left_alone(workplace, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("a thesis")
    assert "is not empty and has no encoded data" in stopped(options(workplace, tmp_path))
    file = tmp_path / "thesis.txt"
    assert "is not a folder" in stopped(options(workplace, file))
    encoded = f"{workplace}/encoded"
    argv = options(workplace, tmp_path / "new", "--data-root", encoded)
    assert "is already encoded" in stopped(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_accepts_one_command_at_a_time(workplace, tmp_path, capsys):
    folder = tmp_path / "encoded"
    shutil.copytree(workplace / "encoded", folder)
    (folder / "shard-00002.json").unlink()
    hold = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, f"{folder}/.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"locked\n"
    message = stopped(options(workplace, folder))
    holder.kill()
    holder.communicate()
    assert "Another command is encoding into" in message
    main(options(workplace, folder))
    assert len(find_samples(folder).samples) == 11


def test_broken_pictures_are_left_out_and_counted(workplace, tmp_path, capsys, monkeypatch):
    draw(tmp_path / "pictures")
    data = (tmp_path / "pictures" / "4.png").read_bytes()
    damaged = data[:100] + bytes(200) + data[300:]  # the header is sound
    (tmp_path / "pictures" / "4.png").write_bytes(damaged)
    argv = options(workplace, tmp_path / "encoded", "--data-root", f"{tmp_path}/pictures")
    main(argv)
    assert "Left out because they are broken: 1\n1 damaged" in capsys.readouterr().out
    found = find_samples(tmp_path / "encoded")
    assert "4.png" not in [sample.id for sample in found.samples]
    assert len(found.samples) == 10
    assert found.faults.examples["damaged"][0].id == "4.png"
    for sample in found.samples:
        whole = next(s for s in find_samples(workplace / "encoded").samples if s.id == sample.id)
        torch.testing.assert_close(
            read_encoded(sample)[0], read_encoded(whole)[0], rtol=1e-3, atol=1e-3
        )
    strict = options(workplace, tmp_path / "strict", "--data-root", f"{tmp_path}/pictures")
    message = stopped([*strict, "--max-broken", "0.05"])
    assert "1 of 11 samples are broken, 9.1%, more than the 5% that --max-broken allows" in message


def test_latents_that_are_not_finite_are_not_written(workplace, tmp_path, monkeypatch, capsys):
    encode = LatentSpace.encode_pixels

    def overflow(space, pixels, bf16):
        latents = encode(space, pixels, bf16)
        latents[0, 0, 0, 0] = 1e6  # beyond float16
        return latents

    monkeypatch.setattr(LatentSpace, "encode_pixels", overflow)
    message = stopped(options(workplace, tmp_path / "new", "--max-broken", "0.5"))
    assert "damaged" in message


def test_sizes_are_multiples_of_a_token_of_the_model(workplace, tmp_path, monkeypatch, capsys):
    more = ("--image-size", "96", "--max-upscale", "4", "--patch-size", "4", "--dry-run")
    main(options(workplace, tmp_path / "new", *more))
    assert "4 of 64 x 128 pixels" in capsys.readouterr().out  # 32 pixels per token
    monkeypatch.setattr(job, "load_encoders", lambda *args: pytest.fail("loaded the weights"))
    message = stopped(options(workplace, tmp_path / "new", "--patch-size", "3"))
    assert "--image-size is 64; expected a multiple of 24, the nearest is 72" in message
    message = stopped(options(workplace, tmp_path / "new", "--image-size", "50"))
    assert "--image-size is 50; expected a multiple of 16, the nearest is 48" in message


def with_vae_config(workplace, folder, **changes):
    """Copy the pipeline, and change the configuration of its VAE."""
    shutil.copytree(workplace / "pipeline", folder)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return f"{folder}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shift_factor": 0.5}, lambda latents, scale: latents - 0.5 * scale),
        (
            {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0] * 4},
            lambda latents, scale: (
                (latents - scale * torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1)) / 2
            ),
        ),
    ],
)
def test_latents_are_shifted_and_scaled_as_the_vae_asks(
    workplace, tmp_path, capsys, changes, expected
):
    pipeline = with_vae_config(workplace, tmp_path / "pipeline", **changes)
    folder = tmp_path / "encoded"
    main(options(workplace, folder, "--pretrained", pipeline))
    plain, shifted = find_samples(workplace / "encoded"), find_samples(folder)
    for name, value in changes.items():
        recorded = getattr(shifted.encoded.manifest, name)
        assert (list(recorded) if isinstance(value, list) else recorded) == value
    scale = shifted.encoded.manifest.scaling_factor
    for before, after in zip(plain.samples, shifted.samples, strict=True):
        wanted = expected(read_encoded(before)[0], scale)
        torch.testing.assert_close(read_encoded(after)[0], wanted, rtol=2e-3, atol=2e-3)
    # A set of an earlier version, which ignored these values, is not resumed.
    message = stopped(options(workplace, workplace / "encoded", "--pretrained", pipeline))
    assert f"its VAE has {next(iter(changes))}" in message
    assert "Encode the data again, into a new folder" in message


def test_what_is_cut_away_is_told_and_limited(workplace, tmp_path, capsys):
    assert main(options(workplace, tmp_path / "all", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "at most 16.7%; --max-crop leaves out those that lose more" in said
    worst = ", ".join(f"{number}.png (40 x 80: 16.7%)" for number in (0, 3, 6, 9))
    assert f"  most: {worst}\n" in said
    assert "Captions with unknown pieces: " in said
    assert main(options(workplace, tmp_path / "some", "--dry-run", "--max-crop", "0.1")) == 0
    said = capsys.readouterr().out
    assert "7 samples to encode" in said
    assert "Left out because of --max-crop: 4" in said
    wide = workplace / "pictures/metadata.jsonl"
    (tmp_path / "wide").mkdir()
    lines = [line for line in wide.read_text().splitlines() if '"0.png"' in line]
    (tmp_path / "wide/metadata.jsonl").write_text(lines[0])
    shutil.copy(workplace / "pictures/0.png", tmp_path / "wide")
    argv = options(workplace, tmp_path / "none", "--dry-run", "--max-crop", "0.1")
    assert "1 cut too much: choose a larger --max-crop" in stopped(
        [*argv, "--data-root", str(tmp_path / "wide")]
    )


def test_small_pictures_are_left_out(workplace, tmp_path, capsys):
    main(options(workplace, tmp_path / "some", "--max-upscale", "1.25"))
    assert "4 samples to encode" in (said := capsys.readouterr().out)
    assert "Left out because they are too small (--max-upscale): 7" in said
    assert len(find_samples(tmp_path / "some").samples) == 4
    message = stopped(options(workplace, tmp_path / "none", "--max-upscale", "1.1"))
    assert "All 11 pictures are too small: for 64 x 64 pixels, each" in message


def test_a_full_disk_ends_encoding_with_a_message(workplace, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "encoded"
    synced = []

    def fill_up(descriptor):
        synced.append(descriptor)
        if len(synced) == 9:  # in the second shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill_up)
    assert "No space left on device" in stopped(options(workplace, folder))
    assert not list(folder.glob(".*.tmp"))
    monkeypatch.undo()
    main(options(workplace, folder))
    assert shards(folder).keys() == shards(workplace / "encoded").keys()


def test_help_is_quick_and_wrong_options_are_refused(capsys):
    code = (
        "import sys, localdit.training.encode.__main__ as encode\n"
        "try: encode.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0
    assert "--samples-per-shard" in asked.stdout
    with pytest.raises(SystemExit):
        main(["--data-root", "a", "--output", "b", "--samples-per-shard", "0"])
    assert "--samples-per-shard is 0; expected more than 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--data-root", "a", "--output", "b", "--crop", "center", "--max-aspect-ratio", "3"])
    assert "--crop center has only the square: leave out" in capsys.readouterr().err


def start(workplace, output, *launcher, more=(), **environment):
    """Return the command that runs in one or more processes."""
    argv = options(workplace, output, *more)
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "localdit.training.encode", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_two_processes_share_the_work(workplace, tmp_path):
    alone = start(workplace, tmp_path / "one")
    assert alone.wait() == 0
    both = start(workplace, tmp_path / "two", *TWO, ACCELERATE_USE_CPU="true")
    said = both.communicate()[0].decode()
    assert both.returncode == 0, said
    assert said.count("11 samples to encode") == 1
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    if not torch.cuda.is_available():  # then they need not be told to use the CPU
        both = start(workplace, tmp_path / "three", *TWO, ACCELERATE_USE_CPU="false")
        assert both.wait() == 0
        assert shards(tmp_path / "three") == shards(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_interrupt_ends_a_job_in_one_line(workplace, tmp_path, workers):
    draw(tmp_path / "pictures", count=150)
    shutil.copytree(workplace / "pipeline", tmp_path / "pipeline")
    folder = tmp_path / "encoded"
    run = start(tmp_path, folder, more=["--num-workers", workers])
    while not list(folder.glob("*.tar")) and run.poll() is None:
        time.sleep(0.001)
    os.killpg(run.pid, signal.SIGINT)
    told, _ = run.communicate()
    assert run.returncode == 130
    assert b"Interrupted.\n" in told
    assert b"Traceback" not in told, told.decode()


def test_the_death_of_a_process_that_reads_pictures_says_what_to_do(
    workplace, tmp_path, monkeypatch
):
    read = "localdit.training.encode.shards.read_picture"
    monkeypatch.setattr(read, lambda *picture: os.kill(os.getpid(), signal.SIGKILL))
    told = stopped(options(workplace, tmp_path / "encoded", "--num-workers", "1"))
    assert "Lower --num-workers, and run the same command again." in told


@pytest.mark.slow
def test_a_job_killed_at_any_time_resumes_to_the_same_shards(workplace, tmp_path):
    draw(tmp_path / "pictures", count=150)
    shutil.copytree(workplace / "pipeline", tmp_path / "pipeline")
    alone = start(tmp_path, tmp_path / "whole")
    assert alone.wait() == 0
    folder = tmp_path / "killed"
    for written in (1, 12, 33):  # of 50
        run = start(tmp_path, folder)
        while len(list(folder.glob("*.tar"))) < written and run.poll() is None:
            time.sleep(0.001)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="Resume with: python -m localdit.training.encode"):
            open_encoded(folder)
    last = start(tmp_path, folder)
    assert last.wait() == 0
    assert shards(folder) == shards(tmp_path / "whole")
    assert not list(folder.glob(".*.tmp"))
