"""Draw docs/images/architecture.svg from the imports: `python docs/make_architecture.py`.

A room is a package or a module directly in localdit/. The places of the rooms are chosen here. The
arrows are the imports, those for type checkers and inside functions included.
"""

from __future__ import annotations

import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import grimp

sys.path.insert(0, str(Path(__file__).parent))
from drawing import Drawing

IMAGES = Path(__file__).with_name("images")
PACKAGE = Path(__file__).parents[1] / "localdit"


class Room(NamedTuple):
    """A box of the drawing: its upper left corner, its size, its colour and a line about it."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    words: str = ""

    @property
    def right(self) -> float:
        """The right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.y + self.height


ROOMS = {
    "cli": Room(20, 20, 720, 74, "pink", "localdit generate, edit, inpaint, train, info, ..."),
    "demo": Room(20, 126, 200, 74, "pink", "the web page"),
    "evaluation": Room(236, 126, 128, 74, "pink", "benchmarks"),
    "training": Room(510, 126, 230, 180, "green", "from samples to checkpoints"),
    "inference": Room(20, 232, 230, 74, "violet", "pictures from a Config"),
    "utils": Room(266, 232, 228, 74, "violet", "load_model"),
    "pipelines": Room(20, 338, 720, 74, "violet", "the denoising loops, as Diffusers pipelines"),
    "core": Room(20, 444, 352, 180, "yellow", "latents, text, conditions, diffusion"),
    "models": Room(388, 444, 352, 74, "blue", "the transformer and its attention"),
    "checkpoint": Room(388, 550, 352, 74, "blue", "flat checkpoint files"),
}
# Small modules that many rooms use, drawn on a common card below.
CARD = Room(20, 656, 720, 172, "empty")
HELPERS = {
    "images": Room(36, 690, 100, 30, "card"),
    "machine": Room(152, 690, 100, 30, "card"),
    "scenes": Room(268, 690, 100, 30, "card"),
    "sizes": Room(384, 690, 100, 30, "card"),
    "parsing": Room(500, 690, 100, 30, "card"),
    "files": Room(36, 738, 100, 30, "card"),
    "registration": Room(268, 738, 100, 30, "card"),
    "config": Room(442, 738, 100, 30, "card"),
    "version": Room(152, 786, 100, 30, "card"),
    "errors": Room(442, 786, 274, 30, "card"),
}


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room imports.

    `localdit/__init__.py` only passes on names, and a `__main__.py` only calls the command line, so
    both are left out.
    """
    graph = grimp.build_graph("localdit", cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules - {"localdit"}:
        if module.endswith(".__main__"):
            continue
        room = module.split(".")[1]
        targets = graph.find_modules_directly_imported_by(module) - {"localdit"}
        found.setdefault(room, set()).update({target.split(".")[1] for target in targets} - {room})
    return found


def without_implied(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out imports that follow from others: a to c, if a imports b and b leads to c.

    Raises:
        graphlib.CycleError: if rooms import each other in a circle.
    """
    TopologicalSorter(found).prepare()

    def reached(room: str) -> set[str]:
        return found[room].union(*map(reached, found[room]))

    return {room: targets - set().union(*map(reached, targets)) for room, targets in found.items()}


def arrow(drawing: Drawing, start: Room, end: Room) -> None:
    """Draw an arrow down from one room to another, or across to the next one."""
    if start.bottom > end.y:
        y = (max(start.y, end.y) + min(start.bottom, end.bottom)) / 2
        ends = (start.right + 2, end.x - 4) if start.x < end.x else (start.x - 2, end.right + 4)
        drawing.arrow([(ends[0], y), (ends[1], y)])
        return
    shared = max(start.x, end.x), min(start.right, end.right)
    if shared[0] < shared[1]:
        points = [(sum(shared) / 2, start.bottom + 2), (sum(shared) / 2, end.y - 4)]
    else:
        points = [
            (start.x + start.width / 2, start.bottom + 2),
            (end.x + end.width / 2, end.y - 4),
        ]
    drawing.arrow(points)


def architecture() -> Drawing:
    """Draw the rooms and the arrows between them."""
    found = imports()
    places = ROOMS | HELPERS
    if found.keys() != places.keys():
        wrong = found.keys() ^ places.keys()
        raise ValueError(f"rooms without a place, or places without a room: {sorted(wrong)}")
    drawing = Drawing(760, 872, "The packages of localdit/ and their imports")
    drawing.box(CARD.x, CARD.y, CARD.width, CARD.height, CARD.colour, "line")
    words = "Helpers. The last line of each room names those that it imports."
    drawing.text(CARD.x + CARD.width / 2, CARD.y + 21, words, "soft", 13)
    for name, room in places.items():
        drawing.box(room.x, room.y, room.width, room.height, room.colour, "soft")
        centre, middle = room.x + room.width / 2, room.y + room.height / 2
        title = name if (PACKAGE / name).is_dir() else f"{name}.py"
        if name in HELPERS:
            drawing.text(centre, middle + 5, title, size=12.5)
            continue
        drawing.text(centre, middle - 13, title, weight=600, size=16)
        drawing.text(centre, middle + 7, room.words, size=13)
        helpers = ", ".join(sorted(found[name] & HELPERS.keys()))
        if len(helpers) * 5.6 < room.width:
            lines = [helpers]
        else:
            cut = helpers.rindex(", ", 0, len(helpers) // 2 + 8) + 1
            lines = [helpers[:cut], helpers[cut + 1 :]]
        for number, line in enumerate(lines):
            drawing.text(centre, middle + 26 + 14 * number, line, size=11)
    for name, targets in sorted(without_implied(found).items()):
        for target in sorted(targets):
            if (name in HELPERS) == (target in HELPERS):
                arrow(drawing, places[name], places[target])
    words = "An arrow points to an imported room. Arrows that follow from others are left out."
    drawing.text(380, 854, words, "soft", 13)
    return drawing


if __name__ == "__main__":
    architecture().save(IMAGES / "architecture.svg")
