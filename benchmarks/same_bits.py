"""Compare two versions of LocalDiT bit by bit: pixels, losses and weights.

    python benchmarks/same_bits.py record before.npz      # in a checkout of each version
    python benchmarks/same_bits.py compare before.npz after.npz

`record` draws 24 pictures with the model in the box (8 from text, 8 image to image, 8 inpainted; in
float32) and trains for 50 steps three times (from a folder of pictures, from data encoded ahead of
training, and with LoRA). It runs the version in the current folder, so the script of a newer
version can record an older one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {  # of the new transformers
    "num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 6, "caption_channels": 128,
}  # fmt: skip
STEPS = 50
SIDE = 256  # pixels
DRAWN, CHANGED, REPAINTED = 8, 8, 8


def main() -> int:
    """Record, or compare; return 1 where versions differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    record_parser = commands.add_parser("record", help="record the version in the current folder")
    record_parser.add_argument("output", type=Path, help="an .npz file to write")
    compare_parser = commands.add_parser("compare", help="compare two recordings")
    compare_parser.add_argument("before", type=Path)
    compare_parser.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    sys.path.insert(0, os.getcwd())
    with tempfile.TemporaryDirectory() as folder:
        recorded = dict(pictures()) | dict(trainings(Path(folder)))
    arrays: dict[str, Any] = recorded  # otherwise the stubs take them for `allow_pickle`
    np.savez_compressed(args.output, **arrays)
    return 0


def pictures() -> Iterator[tuple[str, np.ndarray]]:
    """Draw the pictures; yield each as `(H, W, 3)` float32 in [0, 1]."""
    import torch

    from localdit import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
    from localdit.scenes import describe, sample_scenes
    from localdit.utils import model_in_the_box

    draw = LocalDiTPipeline.from_pretrained(model_in_the_box())
    edit = LocalDiTImg2ImgPipeline.from_pipe(draw)
    inpaint = LocalDiTInpaintPipeline.from_pipe(draw)
    for pipe in (draw, edit, inpaint):
        pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    scenes = sample_scenes(DRAWN + CHANGED + REPAINTED, seed=0, held_out=True)
    prompts = [describe(scene, rng).text for scene in scenes]
    mask = np.zeros((SIDE, SIDE), dtype=np.float32)
    mask[SIDE // 4 : SIDE, SIDE // 2 :] = 1
    previous = None
    for seed, prompt in enumerate(prompts):
        options = {
            "negative_prompt": "",
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "np",
        }
        if seed < DRAWN:
            picture = draw(prompt, **options).images[0]
        elif seed < DRAWN + CHANGED:
            picture = edit(prompt, previous, strength=0.7, **options).images[0]
        else:
            picture = inpaint(prompt, previous, mask, **options).images[0]
        previous = picture
        yield f"picture {seed:02d}", picture


def trainings(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Train three times; yield the losses and the weights."""
    from safetensors.numpy import load_file

    from localdit.scenes import describe, draw_scene, sample_scenes
    from localdit.utils import model_in_the_box

    box = str(model_in_the_box())
    rng = np.random.default_rng(1)
    (folder / "pictures").mkdir()
    for number, scene in enumerate(sample_scenes(64, seed=1)):
        draw_scene(scene, SIDE).save(folder / f"pictures/{number:03d}.png")
        (folder / f"pictures/{number:03d}.txt").write_text(describe(scene, rng).text)
    data = ["--image-size", str(SIDE), "--num-workers", "0"]
    run("-m", "localdit.training.encode", "--data-root", f"{folder}/pictures", *data,
        "--pretrained", box, "--output", f"{folder}/encoded")  # fmt: skip
    adapters = ["--transformer", f"{box}/transformer", "--lora-rank", "4", "--lora-dropout", "0.1",
                "--prediction-type", "v_prediction"]  # fmt: skip
    channels = json.loads((model_in_the_box() / "vae/config.json").read_text())["latent_channels"]
    shape = folder / "shape.json"
    shape.write_text(json.dumps(SHAPE | {"in_channels": channels, "sample_size": 16}))
    new = ["--transformer-config", str(shape)]
    pictures = ["--data-root", f"{folder}/pictures", "--horizontal-flip", "0.5"]
    cases = {
        "folder": [*pictures, *new],
        "encoded": ["--data-root", f"{folder}/encoded", *new],
        "lora": [*pictures, *adapters],
    }
    for name, options in cases.items():
        output = folder / f"run-{name}"
        run("train.py", *options, *data, "--pretrained", box, "--output", str(output),
            "--batch-size", "2", "--max-train-steps", str(STEPS), "--learning-rate", "1e-3",
            "--gradient-clip", "1", "--log-interval", "1", "--validation-samples", "4",
            "--validation-interval", str(STEPS // 2))  # fmt: skip
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        yield f"losses, {name}", np.array([line["loss"] for line in lines if "loss" in line])
        measured = [
            value
            for line in lines
            for key, value in sorted(line.items())
            if key.startswith("validation/")
        ]
        yield f"validation losses, {name}", np.array(measured)
        for part in ("training", "final"):
            where = output / (f"checkpoint-{STEPS}/training" if part == "training" else "final")
            for file in sorted(where.rglob("*.safetensors")):
                for tensor, values in load_file(file).items():
                    yield f"{part}, {name}: {file.stem} {tensor}", values


def run(*command: str) -> None:
    """Run Python in the current folder, on two threads."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL
    )


def compare(before: Path, after: Path) -> int:
    """Print each kind of value with its largest difference; return 1 where any bit differs."""
    first, second = np.load(before), np.load(after)
    groups: dict[str, list[float]] = {}
    for name in sorted({*first.files, *second.files}):
        kind = name.split(":")[0] if ":" in name else name.rstrip("0123456789 ")
        if (
            name not in first.files
            or name not in second.files
            or first[name].shape != second[name].shape
        ):
            difference = float("inf")
        elif np.array_equal(first[name], second[name]):
            difference = 0.0
        else:
            gap = np.abs(first[name].astype(np.float64) - second[name].astype(np.float64))
            difference = max(float(gap.max()), np.finfo(np.float64).tiny)
        groups.setdefault(kind, []).append(difference)
    for kind, differences in groups.items():
        same = sum(difference == 0 for difference in differences)
        print(
            f"{kind}: {same} of {len(differences)} the same to the bit, largest difference "
            f"{max(differences):.3g}"
        )
    return int(any(difference for one in groups.values() for difference in one))


if __name__ == "__main__":
    sys.exit(main())
