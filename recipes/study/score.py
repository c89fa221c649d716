"""Score the pictures of a run at equal processor time and at equal steps.

    python recipes/study/score.py --run output/study/runs/local-4-0 --output output/study

A run is named VARIANT-SEED. Captions and noise depend on the seed only. Reads `costs.json` and
`extractor`, and writes `scores/VARIANT-SEED.json`: for "steps" and "time" which pictures of each
task are right, and the distances to drawings that no run was trained on. With `--autoencoder`
instead of `--run`, true drawings pass through the autoencoder: the most that a run can reach.
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

CAPTIONS, REAL = 1_000_003, 3_000_003  # seeds; the captions' is that of the first run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of the run to score")
    source.add_argument("--autoencoder", type=Path, help="pipeline folder, for its autoencoder")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--count", type=int, default=100, help="number of captions")
    parser.add_argument("--real", type=int, default=500, help="number of true drawings")
    parser.add_argument("--num-inference-steps", type=int, default=15, help="inference steps")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="weight of the caption")
    return parser.parse_args()


def generate(
    folder: Path, many: list[scenes.Study], seed: int, args: argparse.Namespace
) -> list[Image.Image]:
    """Draw a picture of each caption with the pipeline in a folder."""
    import torch

    from localdit.pipelines import LocalDiTPipeline

    pipe = LocalDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(many), 10):
        part = range(start, min(start + 10, len(many)))
        pictures += pipe(
            [many[i].caption for i in part], height=scenes.SIDE, width=scenes.SIDE,
            generator=[torch.Generator().manual_seed(seed * len(many) + i) for i in part],
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        ).images  # fmt: skip
    return pictures


def reconstruct(folder: Path, many: list[scenes.Study]) -> list[Image.Image]:
    """Pass the true drawings through the autoencoder of a pipeline."""
    import torch

    from localdit.pipelines import LocalDiTPipeline

    pipe = LocalDiTPipeline.from_pretrained(folder)
    pictures: list[Image.Image] = []
    for scene in many:
        pixels = torch.from_numpy(np.array(scenes.draw(scene))).permute(2, 0, 1)[None]
        with torch.no_grad():
            decoded = pipe.latent_space.decode(pipe.latent_space.encode_pixels(pixels))
        pictures += pipe.image_processor.postprocess(decoded, output_type="pil")
    return pictures


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
    name, _, seed = args.run.name.rpartition("-") if args.run else ("autoencoder", "", "0")
    path = args.output / "scores" / f"{name}-{seed}.json"
    if path.is_file():
        sys.exit()

    from localdit.images import image_grid

    path.parent.mkdir(exist_ok=True)
    many = list(scenes.sample_many(args.count, CAPTIONS + int(seed)))
    if args.run:
        at = json.loads((args.output / "costs.json").read_text("utf-8"))["scored"][name]
        drawn = {
            step: generate(args.run / f"checkpoint-{step}", many, int(seed), args)
            for step in sorted(set(at.values()))
        }
    else:
        at, drawn = {"steps": 0, "time": 0}, {0: reconstruct(args.autoencoder, many)}
    reports = {step: report(pictures, many, args) for step, pictures in drawn.items()}
    image_grid(drawn[at["steps"]][:40], columns=10).save(path.with_suffix(".png"))
    scores = {when: {"step": step, **reports[step]} for when, step in at.items()}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(scores) + "\n", "utf-8")
    unfinished.replace(path)
    shares = {task: sum(own) / len(own) for task, own in scores["steps"]["right"].items()}
    print(f"{path.stem}: " + ", ".join(f"{task} {share:.2f}" for task, share in shares.items()))


if __name__ == "__main__":
    main()
