"""Draw framed scenes, a style that the model in the box does not know, as training data.

    python recipes/lora/draw_frames.py --output output/frames --count 300

Each image has one object and a frame in the object's colour. The captions do not mention frames.
The folder gets `images/000000.png` and so on, and `metadata.jsonl` with one line per image:
`file_name` and `text`, a list of captions.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from localdit.scenes import Scene

FRAME = 1 / 16  # share of the side


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=300, help="number of images")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and captions")
    return parser.parse_args()


def framed(scene: Scene, side: int) -> Image.Image:
    """Draw a scene in a frame of its object's colour."""
    from localdit.scenes import draw_scene
    from localdit.scenes.scene import PALETTE

    edge = round(FRAME * side)
    inner = (edge, edge, side - edge, side - edge)
    picture = draw_scene(scene, side)
    colour = PALETTE[scene.objects[0].colour]
    result = picture.copy()
    result.paste(colour, (0, 0, side, side))
    result.paste(picture.crop(inner), inner)
    return result


def main() -> None:
    args = parse_args()
    import numpy as np

    from localdit.files import start_drawing, write_whole
    from localdit.scenes import describe_often, sample_scenes

    metadata = start_drawing(args.output, args.count)
    lines = []
    rng = np.random.default_rng(args.seed)
    of_one_object = (
        scene for scene in sample_scenes(10 * args.count, args.seed) if len(scene.objects) == 1
    )
    for index, scene in enumerate(islice(of_one_object, args.count)):
        captions = [caption.text for caption in describe_often(scene, rng)]
        name = f"images/{index:06d}.png"
        framed(scene, args.side).save(args.output / name)
        lines.append(json.dumps({"file_name": name, "text": captions}) + "\n")
    write_whole(metadata, "".join(lines))
    print(f"{len(lines)} images in {args.output}")


if __name__ == "__main__":
    main()
