"""A folder to run `train.py` in: captioned pictures, a pipeline with encoders, a small shape."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from tests.tiny import tiny_pipeline

ROOT = Path(__file__).parents[2]
COLOURS = ["red", "green", "blue", "yellow", "black", "white", "large red", "small blue"]
# At 96 pixels and windows of 2 tokens they fall into two buckets: squares and landscapes.
SIZES = [(100, 96), (130, 64)]


def make_workplace(folder, vae="sdxl"):
    """Write pictures as a folder and as tars, a pipeline, and a transformer's shape.

    Args:
        folder: an empty one.
        vae: the kind of the pipeline's autoencoder; see `tests.tiny.tiny_vae`.
    """
    (folder / "pictures").mkdir()
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", SIZES[number % 3 == 2], colour.split()[-1])
        name = colour.replace(" ", "-")
        image.save(folder / f"pictures/{name}.png")
        (folder / f"pictures/{name}.txt").write_text(f"a {colour} picture")
        with tarfile.open(folder / f"shard-{number % 2}.tar", "a") as shard:
            for file in (f"{name}.png", f"{name}.txt"):
                shard.add(folder / "pictures" / file, file)
    pipeline = tiny_pipeline(vae=vae)
    pipeline.save_pretrained(folder / "pipeline")
    shape = dict(pipeline.transformer.config)
    (folder / "shape.json").write_text(json.dumps(shape))
    return folder


def make_image_encoder(folder, kind="dinov2_with_registers", **settings):
    """Write a tiny image encoder of Transformers with random weights, and return its folder."""
    tiny = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "intermediate_size": 64, "mlp_ratio": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **tiny | settings))
    model.save_pretrained(folder)
    return folder


def options(workplace, output, *more):
    """Return the options of a small run. Later options win; weights bring their own shape."""
    starts = {"--transformer", "distil"} & set(map(str, more))
    shape = [] if starts else ["--transformer-config", f"{workplace}/shape.json"]
    return [
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        *shape, "--output", str(output),
        "--image-size", "96", "--batch-size", "2", "--num-workers", "0", "--log-interval", "1",
        "--max-train-steps", "4", "--learning-rate", "1e-3", "--gradient-clip", "1",
        "--log-samples", *map(str, more),
    ]  # fmt: skip


def load_main():
    """Return the function `main` of train.py."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def command(workplace, output, *more, processes=1):
    """Return the command that runs train.py in one or more processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher += [str(processes)]
    return [*launcher, "train.py", *options(workplace, output, *more)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(workplace, output, *more, processes=1):
    """Start train.py in a new session."""
    return subprocess.Popen(
        command(workplace, output, *more, processes=processes),
        cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kill(process):
    """`kill -9` a process and all that it started, the youngest last."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def descendants(pid):
    """Return the child processes of a process, and their children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def weights(folder):
    """Return all tensors of a checkpoint or pipeline folder, by file and name."""
    return {
        (str(file.relative_to(folder)), name): tensor
        for file in folder.rglob("*.safetensors")
        if not file.parent.is_symlink()
        for name, tensor in load_file(file).items()
    }
