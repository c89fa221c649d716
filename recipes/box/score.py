"""Score the images that a pipeline generates for held-out captions, from their pixels.

    python recipes/box/score.py --pipeline localdit/box --output output/box/score

Writes `score.json`, `score.md` (a table) and `samples.png` (the first images) into the folder.
With `--vae` the images are the true drawings passed through an autoencoder: an upper bound for any
transformer in its latents. With `--strength`, each image is an edit of a true drawing in which the
last object has another colour than the caption says.

Right shapes may still be blurred. So two figures compare each image with the scene that it shows,
drawn again: the contrast across the edges of the drawing, and the PSNR to the drawing as the
autoencoder decodes it. Images that show no scene do not count. Two more figures are of captions
that leave the background open, and often other attributes: the share of the images that show a
scene which the caption describes; and the spread, the number of different backgrounds, in kind or
colours, in eight images of a caption.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from localdit.core.latents import LatentSpace
    from localdit.pipelines import LocalDiTPipeline
    from localdit.scenes import Caption, Scene


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", type=Path, help="folder of the pipeline to score")
    source.add_argument("--vae", type=Path, help="folder of the autoencoder to score")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=1000, help="number of held-out captions")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--strength", type=float,
                        help="edit drawings, changing so much of them")  # fmt: skip
    parser.add_argument("--open-captions", type=int, help="number of captions that name no "
                        "background; by default one for 25, and none for edits")  # fmt: skip
    parser.add_argument("--trained-on", action="store_true",
                        help="use combinations seen in training instead")  # fmt: skip
    parser.add_argument("--num-inference-steps", "--steps", type=int,
                        help="number of inference steps; by default the pipeline's")  # fmt: skip
    parser.add_argument("--guidance-scale", type=float,
                        help="weight of the caption; by default the pipeline's")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=10, help="captions per call")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and noise")
    parser.add_argument("--device", default="cpu", help="device to generate on")
    args = parser.parse_args()
    if args.vae and args.strength is not None:
        parser.error("--strength edits with a pipeline; it does not go with --vae")
    if args.open_captions is None:
        args.open_captions = args.count // 25 if args.strength is None else 0
    return args


def prompts(count: int, seed: int, held_out: bool) -> tuple[list[Scene], list[str]]:
    """Return scenes with another seed than training's, and their complete captions."""
    import numpy as np

    from localdit.scenes import describe, sample_scenes

    scenes = list(sample_scenes(count, seed + 1_000_003, held_out))
    rng = np.random.default_rng([seed, 11])
    return scenes, [describe(scene, rng).text for scene in scenes]


def open_captions(count: int, seed: int) -> list[Caption]:
    """Return captions that do not name the background."""
    import numpy as np

    from localdit.scenes import describe, sample_scenes

    rng = np.random.default_rng([seed, 12])
    captions = (
        describe(scene, rng, False) for scene in sample_scenes(20 * count, seed + 2_000_003)
    )
    return [caption for caption in captions if caption.background is None][:count]


def recoloured(scene: Scene) -> Scene:
    """Return a scene whose last object has the next colour that can be seen on its background."""
    from localdit.scenes import Scene
    from localdit.scenes.scene import COLOURS

    *others, last = scene.objects
    first = COLOURS.index(last.colour) + 1
    colours = (COLOURS[(first + i) % len(COLOURS)] for i in range(len(COLOURS)))
    colour = next(colour for colour in colours if scene.background.shows(colour))
    return Scene(scene.background, (*others, replace(last, colour=colour)))


def generate(
    pipe: LocalDiTPipeline,
    texts: list[str],
    args: argparse.Namespace,
    sources: list[Image.Image] | None = None,
) -> list[Image.Image]:
    """Generate one image per caption, or edit one of `sources`.

    Image i depends on `seed` and i, not on the batches.
    """
    import torch

    from localdit.pipelines import LocalDiTImg2ImgPipeline

    draw: Any = pipe
    given: dict[str, Any] = {"height": args.side, "width": args.side}
    if sources is not None:
        draw = LocalDiTImg2ImgPipeline.from_pipe(pipe)
        draw.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(texts), args.batch_size):
        batch = texts[start : start + args.batch_size]
        seeds = range(args.seed + start, args.seed + start + len(batch))
        generator = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if sources is not None:
            given = {"image": sources[start : start + len(batch)], "strength": args.strength}
        pictures += draw(
            batch, num_inference_steps=args.num_inference_steps, generator=generator,
            guidance_scale=args.guidance_scale, **given,
        ).images  # fmt: skip
    return pictures


def reconstruct(scenes: list[Scene], space: LatentSpace, side: int) -> list[Image.Image]:
    """Encode and decode the true drawings."""
    import numpy as np
    import torch
    from diffusers.image_processor import VaeImageProcessor

    from localdit.scenes import draw_scene

    pictures: list[Image.Image] = []
    for scene in scenes:
        values = torch.from_numpy(np.array(draw_scene(scene, side))).permute(2, 0, 1)[None]
        with torch.no_grad():
            decoded = space.decode(space.encode_pixels(values))
        pictures += VaeImageProcessor().postprocess(decoded, output_type="pil")
    return pictures


def sharpness(pictures: list[Image.Image], space: LatentSpace) -> dict[str, float]:
    """Return the share of pictures that show a scene, and their mean contrast and PSNR to it."""
    import numpy as np

    from localdit.scenes.recognition import reported_scene
    from localdit.scenes.score import edge_contrast, psnr

    reported = [(picture, reported_scene(picture)) for picture in pictures]
    pairs = [(picture, scene) for picture, scene in reported if scene is not None]
    if not pairs:
        return {"show a scene": 0.0}
    drawn = reconstruct([scene for _, scene in pairs], space, pictures[0].width)
    return {
        "show a scene": len(pairs) / len(pictures),
        "contrast across the edges": float(np.mean([edge_contrast(*pair) for pair in pairs])),
        "PSNR to the drawing": float(
            np.mean([psnr(p, d) for (p, _), d in zip(pairs, drawn, strict=True)])
        ),
    }


def openness(pipe: LocalDiTPipeline, args: argparse.Namespace) -> dict[str, float]:
    """Return how many images of open captions are as described, and how much they differ."""
    from localdit.scenes.recognition import read_picture, reported_scene

    captions = [one for one in open_captions(args.open_captions, args.seed) for _ in range(8)]
    pictures = generate(pipe, [caption.text for caption in captions], args)
    scenes = [reported_scene(picture) for picture in pictures]
    right = [scene is not None and caption.describes(scene)
             for scene, caption in zip(scenes, captions, strict=True)]  # fmt: skip
    backgrounds = [read_picture(picture)[0] for picture in pictures]
    groups = [set(backgrounds[start : start + 8]) for start in range(0, len(backgrounds), 8)]
    return {
        "open captions, as described": sum(right) / len(right),
        "different backgrounds of eight": sum(map(len, groups)) / len(groups),
    }


def group_means(scenes: list[Scene], scores: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean scores of the scenes with one object, with two, and with three."""
    from localdit.scenes.score import mean_scores

    means = {}
    for count, name in enumerate(("one object", "two objects", "three objects"), start=1):
        group = [score for scene, score in zip(scenes, scores, strict=True)
                 if len(scene.objects) == count]  # fmt: skip
        means[f"{name} ({len(group)})"] = mean_scores(group)
    return means


def table(means: dict[str, dict[str, float]], figures: dict[str, float]) -> str:
    """Return a Markdown table with a column per group, and one of the figures of all images."""
    from localdit.scenes.score import ATTRIBUTES

    lines = [f"| right, of captions with | {' | '.join(means)} |", "|---" * (len(means) + 1) + "|"]
    for name in ATTRIBUTES:
        shares = [f"{100 * group[name]:.1f} %" if name in group else "" for group in means.values()]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    lines += ["", "| all images | |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in figures.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_args()

    import torch

    from localdit.core.encoders import locate_encoder
    from localdit.core.latents import LatentSpace
    from localdit.core.parts import load_vae
    from localdit.images import image_grid
    from localdit.pipelines import LocalDiTPipeline
    from localdit.scenes import draw_scene
    from localdit.scenes.score import score_picture

    scenes, texts = prompts(args.count, args.seed, held_out=not args.trained_on)
    if args.vae:
        vae = load_vae(locate_encoder("vae", str(args.vae)), torch.float32).eval()
        space = LatentSpace(vae)
    else:
        pipe = LocalDiTPipeline.from_pretrained(args.pipeline).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        space = pipe.latent_space
    sources = None
    if args.strength is not None:
        sources = [draw_scene(recoloured(scene), args.side) for scene in scenes]
    started = time.perf_counter()
    if args.vae:
        pictures = reconstruct(scenes, space, args.side)
    else:
        pictures = generate(pipe, texts, args, sources)
    seconds = time.perf_counter() - started
    scores = [score_picture(*pair) for pair in zip(pictures, scenes, strict=True)]
    means = group_means(scenes, scores)

    args.output.mkdir(parents=True, exist_ok=True)
    figures = sharpness(pictures, space)
    if args.open_captions and not args.vae:
        figures |= openness(pipe, args)
    report = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "mean": means,
        "figures": figures,
        "count": args.count,
        "seconds_per_picture": seconds / args.count,
        "pictures": [
            {"caption": text, "scene": scene.to_dict(), "score": score}
            for text, scene, score in zip(texts, scenes, scores, strict=True)
        ],
    }
    written = json.dumps(report, indent=1, default=str)
    (args.output / "score.json").write_text(written + "\n", "utf-8")
    text = table(means, figures)
    (args.output / "score.md").write_text(text, "utf-8")
    image_grid(pictures[:48], columns=8).save(args.output / "samples.png")
    print(text + f"\n{seconds / args.count:.2f} s per image")


if __name__ == "__main__":
    main()
