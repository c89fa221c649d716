"""Score the pictures of a run at equal steps and at equal processor time.

    python recipes/study/score.py --run output/study/runs/full-0 --output output/study

A run is named VARIANT-SEED. Captions and noise depend on the seed only. Reads `costs.json` and
`extractor`, and writes `scores/VARIANT-SEED.json`: for "steps" and "time" which pictures of each
task are right, the distances to drawings that no run was trained on, and the loss on such drawings.
Without `--run`, true drawings are scored: the best that a model can do. With `--pictures`, the
held-out pictures of `pictures.py` take the place of drawings, and no picture is right or wrong.
A run whose file has the same settings is not scored again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pictures
import scenes
from PIL import Image

if TYPE_CHECKING:
    from localdit.pipelines import LocalDiTPipeline

CAPTIONS, REAL, HELD_OUT = 1_000_003, 3_000_003, 4_000_003  # seeds of scenes
TRUE = "true-pictures-0"
BATCH = 20  # captions per call


class Example(NamedTuple):
    """A caption, its true picture, and its scene; None for the pictures of `pictures.py`."""

    caption: str
    picture: Image.Image
    scene: scenes.Study | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of the run to score")
    parser.add_argument("--output", type=Path, required=True, help="folder of the study")
    parser.add_argument("--pictures", type=Path, help="folder of pictures.py to score instead")
    parser.add_argument("--count", type=int, default=200, help="number of captions")
    parser.add_argument("--real", type=int, default=500, help="number of true drawings")
    parser.add_argument("--num-inference-steps", type=int, default=20, help="inference steps")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="weight of the caption")
    return parser.parse_args()


def settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options of scoring, and others by name, as JSON values."""
    of_all = ("count", "real", "num_inference_steps", "guidance_scale", "pictures")
    found = {name: getattr(args, name) for name in (*of_all, *names)}
    return json.loads(json.dumps(found, default=str))


def examples(count: int, seed: int, folder: Path | None = None) -> list[Example]:
    """Return scenes, or with `folder` held-out pictures, which depend on `seed`."""
    if folder is None:
        many = scenes.sample_many(count, seed)
        return [Example(scene.caption, scenes.draw(scene), scene) for scene in many]
    held_out = pictures.read(folder / "held-out")
    chosen = np.random.default_rng(seed).permutation(len(held_out))[:count]
    return [Example(held_out[i].caption, held_out[i].picture) for i in chosen]


def generate(
    pipe: LocalDiTPipeline, many: list[Example], seed: int, args: argparse.Namespace
) -> list[Image.Image]:
    """Draw a picture of each caption; picture i depends on `seed` and i, not on the batches."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    drawn: list[Image.Image] = []
    for start in range(0, len(many), BATCH):
        part = range(start, min(start + BATCH, len(many)))
        drawn += pipe(
            [many[i].caption for i in part], height=scenes.SIDE, width=scenes.SIDE,
            generator=[torch.Generator().manual_seed(seed * len(many) + i) for i in part],
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        ).images  # fmt: skip
    return drawn


def held_out_loss(pipe: LocalDiTPipeline, many: list[Example]) -> float:
    """Return the loss of flow matching on true pictures that no model was trained on."""
    import torch

    from localdit.core.diffusion import Objective
    from localdit.training.data.buckets import Size
    from localdit.training.methods import Inputs
    from localdit.training.methods.fine_tuning import FineTuning
    from localdit.training.validation import validation_losses

    pixels = torch.stack([torch.from_numpy(np.array(one.picture)) for one in many])
    latents = pipe.latent_space.encode_pixels(pixels.permute(0, 3, 1, 2))
    text, mask = pipe.text_space.encode_batch([one.caption for one in many], 120)
    size, names = Size(scenes.SIDE, scenes.SIDE), [str(index) for index in range(len(many))]
    inputs = Inputs(latents, text, mask, {}, weights=torch.ones(len(many)))
    method = FineTuning(pipe.transformer, Objective("flow"), adapters=False)
    losses = validation_losses(
        pipe.transformer, method.validation_errors, [(size, names, inputs)], [size]
    )
    return losses["validation/model/loss"]


def report(
    drawn: list[Image.Image], many: list[Example], args: argparse.Namespace
) -> dict[str, Any]:
    """Return which pictures are right, by task, and their distances to true ones."""
    from localdit.evaluation import distances

    right: dict[str, list[bool]] = {}
    for picture, example in zip(drawn, many, strict=True):
        if example.scene:
            verdict = scenes.is_right(picture, example.scene)
            right.setdefault(example.scene.task, []).append(verdict)
    real = (example.picture for example in examples(args.real, REAL, args.pictures))
    return {"right": right, "distances": distances(drawn, real, args.output / "extractor")}


def main() -> None:
    args = parse_args()
    stem = args.run.name if args.run else TRUE
    path = args.output / "scores" / f"{stem}.json"
    name, _, seed = stem.rpartition("-")
    scored = {"steps": 0, "time": 0}
    if args.run:
        scored = json.loads((args.output / "costs.json").read_text("utf-8"))["scored"][name]
    now = settings(args, "run") | {"scored": scored}
    if path.is_file() and json.loads(path.read_text("utf-8")).get("settings") == now:
        sys.exit()

    from localdit.images import image_grid
    from localdit.pipelines import LocalDiTPipeline

    many = examples(args.count, CAPTIONS + int(seed), args.pictures)
    found: dict[int, dict[str, Any]] = {}
    for step in sorted(set(scored.values())):
        if args.run:
            pipe = LocalDiTPipeline.from_pretrained(args.run / f"checkpoint-{step}")
            drawn = generate(pipe, many, int(seed), args)
            loss = held_out_loss(pipe, examples(args.count, HELD_OUT, args.pictures))
        else:
            drawn, loss = [example.picture for example in many], None
        found[step] = {"loss": loss, **report(drawn, many, args)}

    path.parent.mkdir(exist_ok=True)
    large = [one.resize((64, 64), resample=0) for one in drawn[:40]]
    image_grid(large, columns=10).save(path.with_suffix(".png"))
    unfinished = path.with_suffix(".tmp")
    scores = {at: found[step] for at, step in scored.items()}
    unfinished.write_text(json.dumps({"settings": now, **scores}), "utf-8")
    unfinished.replace(path)
    shares = {task: np.mean(own) for task, own in found[step]["right"].items()}
    figures = shares | found[step]["distances"]
    print(f"{stem}: " + ", ".join(f"{name} {figure:.2f}" for name, figure in figures.items()))


if __name__ == "__main__":
    main()
