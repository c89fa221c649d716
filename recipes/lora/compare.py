"""Generate images without and with a LoRA of frames, and count what is right.

    python recipes/lora/compare.py --lora runs/frames/final --output output/frames-compared

The captions have one object each, in combinations that the model in the box was never trained on.
Writes `sheet.png`, the first images with the LoRA at weights 0, 0.5 and 1 below each other. Prints
how many images have a frame in the object's colour, and in how many the background and the
object's shape, colour, size and position are right. The first line of the output is for true
drawings passed through the autoencoder: no LoRA can do better than that.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from localdit import LocalDiTPipeline
    from localdit.scenes import Scene

SIDE, EDGE, SHOWN = 256, 16, 8
SCORED = ("background", "shape", "colour", "size", "position")
WEIGHTS = (0.0, 0.5, 1.0)
SEEDS = 20_000_003  # differs from the seeds of training


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", type=Path, required=True, help="folder of the LoRA")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=40, help="number of captions")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="weight of the caption")
    return parser.parse_args()


def captions(count: int) -> tuple[list[Scene], list[str]]:
    """Return held-out scenes with one object, and their complete captions."""
    import numpy as np

    from localdit.scenes import describe, sample_scenes

    scenes = [s for s in sample_scenes(10 * count, SEEDS, held_out=True) if len(s.objects) == 1]
    rng = np.random.default_rng(SEEDS)
    return scenes[:count], [describe(scene, rng).text for scene in scenes[:count]]


def draw(pipe: LocalDiTPipeline, texts: list[str], guidance_scale: float) -> list[Image.Image]:
    """Generate an image per caption; image i starts from the noise of seed i."""
    import torch

    pictures: list[Image.Image] = []
    for start in range(0, len(texts), 10):
        batch = texts[start : start + 10]
        generator = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        pictures += pipe(batch, guidance_scale=guidance_scale, generator=generator).images
    return pictures


def reconstruct(pipe: LocalDiTPipeline, scenes: list[Scene]) -> list[Image.Image]:
    """Encode and decode true drawings with frames."""
    import torch
    from draw_frames import framed

    pixels = pipe.image_processor.preprocess([framed(scene, SIDE) for scene in scenes])
    space = pipe.latent_space
    with torch.no_grad():
        decoded = space.decode(space.encode(pixels))
    return pipe.image_processor.postprocess(decoded)


def count_right(pictures: list[Image.Image], scenes: list[Scene]) -> str:
    """Return a sentence with the number of framed images and of right scenes."""
    import numpy as np

    pixels = [np.asarray(picture).astype(int) for picture in pictures]
    pairs = list(zip(pixels, scenes, strict=True))
    framed = sum(is_framed(drawn, scene.objects[0].colour) for drawn, scene in pairs)
    right = sum(is_right_within(drawn, scene) for drawn, scene in pairs)
    return f"framed {framed}, scene right {right}, of {len(pairs)}"


def is_framed(pixels: np.ndarray, colour: str) -> bool:
    """Return True if nine in ten pixels of the border are nearest to a colour."""
    import numpy as np

    from localdit.scenes.scene import COLOURS, PALETTE

    border = np.ones((SIDE, SIDE), dtype=bool)
    border[EDGE:-EDGE, EDGE:-EDGE] = False
    distances = np.stack([((pixels[border] - PALETTE[c]) ** 2).sum(-1) for c in COLOURS])
    return bool((distances.argmin(0) == COLOURS.index(colour)).mean() >= 0.9)


def is_right_within(pixels: np.ndarray, scene: Scene) -> bool:
    """Return True if the area inside the border shows the scene.

    Smudges do not count: the autoencoder leaves some where an object is close to the frame.
    """
    import numpy as np

    from localdit.scenes.score import score_picture

    inner = slice(EDGE, -EDGE)
    painted = scene.background.pixels(SIDE)
    painted[inner, inner] = pixels[inner, inner]
    score = score_picture(painted.astype(np.uint8), scene)
    return all(score[name] == 1.0 for name in SCORED)


def main() -> None:
    args = parse_args()
    import numpy as np
    from PIL import Image

    from localdit import LocalDiTPipeline
    from localdit.utils import model_in_the_box

    scenes, texts = captions(args.count)
    pipe = LocalDiTPipeline.from_pretrained(model_in_the_box())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(args.lora, adapter_name="frames")
    print(f"true drawings: {count_right(reconstruct(pipe, scenes), scenes)}")
    rows = []
    for weight in WEIGHTS:
        pipe.set_adapters("frames", weight)
        pictures = draw(pipe, texts, args.guidance_scale)
        print(f"weight {weight:g}: {count_right(pictures, scenes)}")
        rows.append(np.concatenate([np.asarray(p) for p in pictures[:SHOWN]], axis=1))
    args.output.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(args.output / "sheet.png")
    print("\n".join(texts[:SHOWN]))


if __name__ == "__main__":
    main()
