"""Draw captioned scenes into a folder, as training data.

    python recipes/box/draw_scenes.py --output output/box/scenes --count 40000

The folder gets `images/000000.png` and so on, and `metadata.jsonl` with one line per picture:
`file_name`, `text` (a list of different captions) and `scene` (its contents).
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from multiprocessing import Pool
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=40_000, help="number of pictures")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--captions", type=int, default=4, help="captions per picture, 1 to 16")
    parser.add_argument("--complete-share", type=float, default=0.75,
                        help="share of the captions that leave no attribute out")  # fmt: skip
    parser.add_argument("--noise", type=float, default=0.08,
                        help="share of the captions with made-up words")  # fmt: skip
    parser.add_argument("--held-out", action="store_true",
                        help="draw the combinations that are kept away from training")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and captions")
    parser.add_argument("--processes", type=int, default=1, help="processes to draw with")
    return parser.parse_args()


def write_picture(index: int, args: argparse.Namespace) -> str:
    """Writes one picture; returns its line of `metadata.jsonl`."""
    import numpy as np

    from localdit.scenes import describe_often, draw_scene, sample_scene

    # Each picture has its own generator, so the folder does not depend on `processes`.
    rng = np.random.default_rng([args.seed, int(args.held_out), index])
    scene = sample_scene(rng, args.held_out)
    captions = describe_often(scene, rng, args.captions, args.complete_share, args.noise)
    file_name = f"images/{index:06d}.png"
    draw_scene(scene, args.side).save(args.output / file_name)
    texts = [caption.text for caption in captions]
    return json.dumps({"file_name": file_name, "text": texts, "scene": scene.to_dict()})


def main() -> None:
    args = parse_args()
    from localdit.files import start_drawing, whole_file

    started = time.perf_counter()
    metadata = start_drawing(args.output, args.count)
    with Pool(args.processes) as pool:
        lines = pool.imap(partial(write_picture, args=args), range(args.count), chunksize=256)
        with whole_file(metadata) as file:
            file.writelines(f"{line}\n".encode() for line in lines)
    print(f"{args.count} pictures in {args.output}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
