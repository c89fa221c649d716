"""Collect real photographs with captions, and drawn scenes, as training data.

    python recipes/photographs/collect.py --output output/photographs

The photographs ship with scikit-image and scikit-learn, so nothing is downloaded. Writes the
photographs to `images/` unchanged, the scenes to `images/scene-000.png` and so on, and
`metadata.jsonl` with one line per image: `file_name` and `text`, a list of captions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

INSTALL = "pip install scikit-image scikit-learn"
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
PHOTOGRAPHS: dict[str, dict[str, list[str]]] = {
    "skimage": {
        "astronaut.png": [
            "a smiling astronaut in an orange space suit",
            "portrait of a woman in an orange suit, a flag and a space shuttle behind her",
            "an astronaut holds her black helmet",
        ],
        "brick.png": ["a brick wall in black and white", "upright grey bricks with light joints"],
        "camera.png": [
            "a man in a black coat looks through a camera on a tripod",
            "black and white photograph of a cameraman on a lawn",
        ],
        "cell.png": ["a bright round cell under the microscope", "a white cell on dark grey"],
        "chelsea.png": [
            "the face of a tabby cat with green eyes",
            "a cat with a pink nose and long whiskers, from close by",
        ],
        "clock_motion.png": ["a clock blurred by motion on a grey wall", "a blurred white clock"],
        "coffee.png": [
            "a cup of coffee on a red saucer with a spoon",
            "espresso in a red and white cup on a wooden table",
        ],
        "coins.png": ["four rows of old coins on a dark ground", "many grey coins from above"],
        "grass.png": ["a lawn from above in black and white", "short grass, grey"],
        "gravel.png": ["gravel from above in black and white", "small grey stones"],
        "hubble_deep_field.jpg": [
            "galaxies and stars in black space",
            "many small bright galaxies, seen through a space telescope",
        ],
        "ihc.png": [
            "stained tissue under the microscope, brown and blue",
            "brown glands among blue cells on white",
        ],
        "moon.png": ["the surface of the moon with craters", "a grey plain on the moon"],
        "motorcycle_left.png": ["a red motorcycle in a garage", "a motorcycle in front of shelves"],
        "motorcycle_right.png": ["a red motorcycle in a garage", "a parked red motorcycle"],
        "page.png": ["a printed page in uneven light", "black text on a grey page"],
        "retina.jpg": ["the retina of an eye, red with fine vessels", "a red disc on black"],
        "rocket.jpg": [
            "a rocket on its launch pad at dusk",
            "a white rocket between masts under a dark blue sky",
        ],
        "text.png": ["handwritten formulas on paper", "grey paper with letters written by hand"],
    },
    "sklearn": {
        "china.jpg": [
            "a Chinese pagoda on a hill above a lake",
            "a temple tower with red walls and green roofs among trees",
        ],
        "flower.jpg": [
            "an orange dahlia in bloom",
            "a round orange flower in front of dark green leaves",
        ],
    },
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/photographs"),
                        help="folder to write (default: %(default)s)")  # fmt: skip
    parser.add_argument("--scenes", type=int, default=40,
                        help="number of drawn scenes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--side", type=int, default=256,
                        help="width and height of the scenes in pixels (default: "
                        "%(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    return parser.parse_args()


def find_folders() -> dict[str, Path]:
    """Return the folder with the photographs of each package.

    Raises:
        FileNotFoundError: if a package is not installed.
    """
    # Finding a package does not import it, which would take seconds.
    specs = {package: importlib.util.find_spec(package) for package in FOLDERS}
    found = {
        package: Path(spec.submodule_search_locations[0]) / FOLDERS[package]
        for package, spec in specs.items()
        if spec is not None and spec.submodule_search_locations
    }
    if len(found) < len(FOLDERS):
        missing = " and ".join(sorted(FOLDERS.keys() - found.keys()))
        raise FileNotFoundError(f"No package {missing} to take photographs from: {INSTALL}")
    return found


def copy_photographs(output: Path) -> list[dict[str, Any]]:
    """Copy the photographs of the installed packages and return their metadata.

    Raises:
        FileNotFoundError: if a package is not installed.
    """
    rows = []
    for package, folder in find_folders().items():
        for name, captions in PHOTOGRAPHS[package].items():
            if not (folder / name).exists():
                print(f"{name} is not in this version of {package}; left out.")
                continue
            shutil.copyfile(folder / name, output / "images" / name)
            rows.append({"file_name": f"images/{name}", "text": captions})
    return rows


def draw_scenes(output: Path, count: int, side: int, seed: int) -> list[dict[str, Any]]:
    """Draw scenes with two captions each and return their metadata."""
    import numpy as np

    from localdit.scenes import describe_often, draw_scene, sample_scene

    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        scene = sample_scene(rng)
        file_name = f"images/scene-{index:03d}.png"
        draw_scene(scene, side).save(output / file_name)
        captions = [caption.text for caption in describe_often(scene, rng, 2)]
        rows.append({"file_name": file_name, "text": captions})
    return rows


def main() -> None:
    args = parse_args()
    from localdit.files import start_drawing, write_whole

    metadata = start_drawing(args.output)
    try:
        photographs = copy_photographs(args.output)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    scenes = draw_scenes(args.output, args.scenes, args.side, args.seed)
    write_whole(metadata, "".join(json.dumps(row) + "\n" for row in photographs + scenes))
    print(f"{len(photographs)} photographs and {len(scenes)} scenes in {args.output}")


if __name__ == "__main__":
    main()
