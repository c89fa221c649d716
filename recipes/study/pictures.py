"""Real pictures for the study: emoji with their names, and parts of photographs.

    python recipes/study/pictures.py --output output/pictures/data \
      --emoji emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz

Writes the folders `train` and `held-out`, each with `images` of 16 x 16 pixels and a
`metadata.jsonl` with `file_name`, `text` and `label`. Half of the pictures of each are emoji, half
parts of the photographs that scikit-image comes with. Held-out are a tenth of the emoji names, in
all styles, and other parts of the photographs. See README.md for the licences.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from localdit.files import start_drawing, write_whole

SIDE = 16
CELL = SIDE + 2  # an emoji in its sheet has a border of one pixel
STYLES = {"google": "noto", "twitter": "twemoji"}  # the packages' names for the sets, and ours
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "hubble_deep_field",
    "retina", "rocket",
)  # fmt: skip
SUBJECTS = {"camera": "photographer", "chelsea": "cat", "hubble_deep_field": "galaxies"}
PARTS = (48, 144)  # pixels per side of a part of a photograph, least and most
EVERY = 10  # one emoji name in so many is held out


class Example(NamedTuple):
    """A picture: RGB, 16 x 16 pixels, its caption, and the class that the extractor learns."""

    picture: Image.Image
    caption: str
    label: str


def emoji(package: Path) -> Iterator[tuple[bool, Example]]:
    """Yield whether an emoji is held out, and the emoji, for each of an npm package.

    Raises:
        ValueError: if the package has no sheet of a known style.
    """
    with tarfile.open(package) as archive:

        def content(name: str) -> bytes:
            member = archive.extractfile(f"package/{name}")
            assert member
            return member.read()

        style = next((name for name in STYLES if name in package.name), None)
        if style is None:
            raise ValueError(f"{package}: expected a package of {' or '.join(STYLES)} emoji.")
        entries = json.loads(content("emoji.json"))
        sheet = Image.open(BytesIO(content(f"img/{style}/sheets/{SIDE}.png"))).convert("RGBA")
    for index, entry in enumerate(entries):
        if not entry[f"has_img_{style}"]:
            continue
        x, y = entry["sheet_x"] * CELL + 1, entry["sheet_y"] * CELL + 1
        cut = sheet.crop((x, y, x + SIDE, y + SIDE))
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        picture.paste(cut, mask=cut)
        caption = f"{entry['name'].lower().replace('_', ' ')}, {STYLES[style]}"
        yield index % EVERY == 0, Example(picture, caption, entry["category"])


def photograph_parts(
    photographs: Mapping[str, Image.Image], count: int, seed: int
) -> Iterator[Example]:
    """Yield random square parts of named photographs in turns."""
    names = list(photographs)
    for index in range(count):
        name = names[index % len(names)]
        whole, rng = photographs[name], np.random.default_rng([seed, index])
        side = int(rng.integers(PARTS[0], PARTS[1] + 1))
        x, y = (int(rng.integers(length - side + 1)) for length in whole.size)
        box = (x, y, x + side, y + side)
        picture = whole.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
        yield Example(picture, f"a part of a photograph, {SUBJECTS.get(name, name)}", name)


def read(folder: Path) -> list[Example]:
    """Return the pictures that `write` has written."""
    lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [Example(Image.open(folder / e["file_name"]), e["text"], e["label"]) for e in entries]


def write(examples: Sequence[Example], folder: Path) -> None:
    """Write pictures and their captions and labels."""
    metadata = start_drawing(folder)
    lines = []
    for index, (picture, caption, label) in enumerate(examples):
        name = f"images/{index:05d}.png"
        picture.save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption, "label": label}))
    write_whole(metadata, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--emoji", type=Path, nargs="+", required=True, help="npm packages of emoji"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()

    from skimage import data

    photographs = {n: Image.fromarray(getattr(data, n)()).convert("RGB") for n in PHOTOGRAPHS}
    drawn = [one for package in args.emoji for one in emoji(package)]
    for held_out, name in ((False, "train"), (True, "held-out")):
        own = [example for is_held_out, example in drawn if is_held_out == held_out]
        own += photograph_parts(photographs, len(own), seed=int(held_out))
        write(own, args.output / name)
        print(f"{name}: {len(own)} pictures")


if __name__ == "__main__":
    main()
