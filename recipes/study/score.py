"""Score the pictures of a run at equal steps and at equal processor time.

    python recipes/study/score.py --run output/study/runs/full-0 --output output/study

A run is named VARIANT-SEED. Captions and noise depend on the seed only. Reads `costs.json` and
`extractor`, and writes `scores/VARIANT-SEED.json`: for "steps" and "time" which pictures of each
task are right, the distances to drawings that no run was trained on, and the loss on such drawings.
Without `--run`, true drawings are scored: the best that a model can do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scenes

if TYPE_CHECKING:
    from PIL import Image

    from localdit.pipelines import LocalDiTPipeline

CAPTIONS, REAL, HELD_OUT = 1_000_003, 3_000_003, 4_000_003  # seeds of scenes
DRAWINGS = "true-drawings-0"
BATCH = 20  # captions per call


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of the run to score")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--count", type=int, default=200, help="number of captions")
    parser.add_argument("--real", type=int, default=500, help="number of true drawings")
    parser.add_argument("--num-inference-steps", type=int, default=20, help="inference steps")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="weight of the caption")
    return parser.parse_args()


def generate(
    pipe: LocalDiTPipeline, many: list[scenes.Study], seed: int, args: argparse.Namespace
) -> list[Image.Image]:
    """Draw a picture of each caption; picture i depends on `seed` and i, not on the batches."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(many), BATCH):
        part = range(start, min(start + BATCH, len(many)))
        pictures += pipe(
            [many[i].caption for i in part], height=scenes.SIDE, width=scenes.SIDE,
            generator=[torch.Generator().manual_seed(seed * len(many) + i) for i in part],
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        ).images  # fmt: skip
    return pictures


def held_out_loss(pipe: LocalDiTPipeline, count: int) -> float:
    """Return the loss of flow matching on true drawings that no model was trained on."""
    import torch

    from localdit.core.diffusion import Objective
    from localdit.training.data.buckets import Size
    from localdit.training.methods import Inputs
    from localdit.training.methods.fine_tuning import FineTuning
    from localdit.training.validation import ValidationBatch, validation_losses

    many = list(scenes.sample_many(count, HELD_OUT))
    pixels = torch.stack([torch.from_numpy(np.array(scenes.draw(one))) for one in many])
    latents = pipe.latent_space.encode_pixels(pixels.permute(0, 3, 1, 2))
    text, mask = pipe.text_space.encode_batch([one.caption for one in many], 120)
    size, names = Size(scenes.SIDE, scenes.SIDE), [str(index) for index in range(count)]
    batch = ValidationBatch(size, names, Inputs(latents, text, mask, {}), torch.ones(count))
    method = FineTuning(pipe.transformer, Objective("flow"), adapters=False)
    losses = validation_losses(pipe.transformer, method.validation_errors, [batch], [size])
    return losses["validation/model/loss"]


def report(
    pictures: list[Image.Image], many: list[scenes.Study], args: argparse.Namespace
) -> dict[str, Any]:
    """Return which pictures are right, by task, and their distances to true drawings."""
    from localdit.evaluation.quality import distances

    right: dict[str, list[bool]] = {task: [] for task in scenes.TASKS}
    for picture, scene in zip(pictures, many, strict=True):
        right[scene.task].append(scenes.is_right(picture, scene))
    real = (scenes.draw(scene) for scene in scenes.sample_many(args.real, REAL))
    return {"right": right, "distances": distances(pictures, real, args.output / "extractor")}


def main() -> None:
    args = parse_args()
    stem = args.run.name if args.run else DRAWINGS
    path = args.output / "scores" / f"{stem}.json"
    if path.is_file():
        sys.exit()

    from localdit.images import image_grid
    from localdit.pipelines import LocalDiTPipeline

    name, _, seed = stem.rpartition("-")
    many = list(scenes.sample_many(args.count, CAPTIONS + int(seed)))
    scored = {"steps": 0, "time": 0}
    if args.run:
        scored = json.loads((args.output / "costs.json").read_text("utf-8"))["scored"][name]
    found: dict[int, dict[str, Any]] = {}
    for step in sorted(set(scored.values())):
        if args.run:
            pipe = LocalDiTPipeline.from_pretrained(args.run / f"checkpoint-{step}")
            pictures = generate(pipe, many, int(seed), args)
            found[step] = {"loss": held_out_loss(pipe, args.count)}
        else:
            pictures, found[step] = [scenes.draw(scene) for scene in many], {"loss": None}
        found[step] |= report(pictures, many, args)

    path.parent.mkdir(exist_ok=True)
    large = [one.resize((64, 64), resample=0) for one in pictures[:40]]
    image_grid(large, columns=10).save(path.with_suffix(".png"))
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({at: found[step] for at, step in scored.items()}), "utf-8")
    unfinished.replace(path)
    shares = {task: np.mean(own) for task, own in found[step]["right"].items()}
    print(f"{stem}: " + ", ".join(f"{task} {share:.2f}" for task, share in shares.items()))


if __name__ == "__main__":
    main()
