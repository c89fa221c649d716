"""Draw docs/images/*.svg: `python docs/make_drawings.py`.

The drawn windows come from the library's own functions.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from localdit.models.windows import WindowGrid, shift_sizes, window_layout

sys.path.insert(0, str(Path(__file__).parent))
from drawing import WINDOWS, Drawing

IMAGES = Path(__file__).with_name("images")
CPU = torch.device("cpu")


def who_sees_whom(grid: WindowGrid) -> torch.Tensor:
    """Return an `(N, N)` bool tensor: True if token i attends to token j (row-major map)."""
    layout = window_layout(grid, CPU)
    slots = grid.window_size**2
    window, place = layout.inverse // slots, layout.inverse % slots
    together = window[:, None] == window[None, :]
    if layout.hidden is None:
        return together
    return together & ~layout.hidden[window[:, None], place[:, None], place[None, :]]


def regions(grid: WindowGrid) -> list[int]:
    """Return a number per token, shared by tokens that attend to each other, from the top left."""
    first_seen = who_sees_whom(grid).int().argmax(dim=1).tolist()
    numbers: dict[int, int] = {}
    return [numbers.setdefault(token, len(numbers)) for token in first_seen]


def tokens(
    drawing: Drawing, x: float, y: float, size: float, columns: int, fills: list[str]
) -> None:
    """Draw a map of tokens, each in its colour."""
    for token, fill in enumerate(fills):
        row, column = divmod(token, columns)
        drawing.square(x + column * size, y + row * size, size, fill)


def borders(drawing: Drawing, x: float, y: float, size: float, side: int, group: list[int]) -> None:
    """Draw lines between neighbours of different groups on a square map, and around it."""
    drawing.box(x, y, side * size, side * size, "none", "soft", 2, corner=2)
    for token, number in enumerate(group):
        row, column = divmod(token, side)
        left, top = x + column * size, y + row * size
        if column + 1 < side and group[token + 1] != number:
            drawing.line(left + size, top, left + size, top + size, "soft", 2)
        if row + 1 < side and group[token + side] != number:
            drawing.line(left, top + size, left + size, top + size, "soft", 2)


def windows() -> Drawing:
    """Draw the tokens that one token attends to, with full attention and with windows."""
    drawing = Drawing(760, 350, "One token attends to all tokens, or to the 16 of its window")
    side, size, marked = 12, 22, 12 * 5 + 6
    group = regions(WindowGrid(side, side, 4))
    seen = {
        "Full attention": [True] * side**2,
        "Windows of 4 x 4": [number == group[marked] for number in group],
    }
    for (title, sees), x in zip(seen.items(), (64, 432), strict=True):
        drawing.text(x + side * size / 2, 34, title, weight=600, size=15)
        tokens(drawing, x, 50, size, side, ["blue" if s else "empty" for s in sees])
        if not all(sees):
            borders(drawing, x, 50, size, side, group)
        row, column = divmod(marked, side)
        drawing.circle(x + (column + 0.5) * size, 50 + (row + 0.5) * size, 6, "deepblue")
        words = f"attends to {sum(sees)} tokens, at any map size"
        if all(sees):
            words = f"attends to all {side**2} tokens of this map"
        drawing.text(x + side * size / 2, 338, words, "soft", 13)
    return drawing


def shifts() -> Drawing:
    """Draw four layers with their shifts, and how far information has spread after each."""
    drawing = Drawing(760, 262, "Windows move from layer to layer, so information spreads")
    side, size, marked = 16, 10.5, 16 * 8 + 8
    reached = torch.eye(side**2, dtype=torch.bool)[marked]
    for layer, shift in enumerate(shift_sizes(4, 4, "cyclic")):
        grid = WindowGrid(side, side, 4, shift, shift)
        sees = who_sees_whom(grid)
        reached = sees[reached].any(dim=0)  # windows are symmetric
        x = 17 + layer * 186
        drawing.text(x + side * size / 2, 30, f"layer {layer}: shift {shift}", weight=600)
        tokens(drawing, x, 44, size, side, ["blue" if h else "empty" for h in reached.tolist()])
        borders(drawing, x, 44, size, side, regions(grid))
        row, column = divmod(marked, side)
        drawing.circle(x + (column + 0.5) * size, 44 + (row + 0.5) * size, 4, "deepblue")
        words = f"{int(reached.sum())} tokens"
        drawing.text(x + side * size / 2, 234, words, "soft", 13)
    words = "that information from the dot has reached after the layer"
    drawing.text(380, 254, words, "soft", 13)
    return drawing


def cyclic_shift() -> Drawing:
    """Draw the roll that turns shifted windows into whole ones, and its mask."""
    drawing = Drawing(
        760, 314, "The map is rolled and cut into windows; a mask separates the pieces"
    )
    side, size, top = 8, 25, 62
    grid = WindowGrid(side, side, 4, 2, 2)
    group = regions(grid)
    fills = [WINDOWS[number] for number in group]
    layout = window_layout(grid, CPU)
    rolled = [0] * side**2  # the token at each place of the rolled map
    for token in range(side**2):
        row, column = divmod(token, side)
        rolled[(row - 2) % side * side + (column - 2) % side] = token

    drawing.text(130, 30, "Windows shifted by 2", weight=600)
    drawing.text(130, 49, "nine pieces, one of them whole", "soft", 13)
    tokens(drawing, 30, top, size, side, fills)
    borders(drawing, 30, top, size, side, group)
    drawing.arrow([(240, top + 100), (272, top + 100)])
    drawing.text(255, top + 90, "roll", "soft", 12)

    drawing.text(384, 30, "Rolled up and left by 2", weight=600)
    drawing.text(384, 49, "four whole windows", "soft", 13)
    tokens(drawing, 284, top, size, side, [fills[token] for token in rolled])
    borders(drawing, 284, top, size, side, regions(WindowGrid(side, side, 4)))
    drawing.arrow([(494, top + 150), (540, top + 150)])

    drawing.text(646, 30, "The last window's mask", weight=600)
    drawing.text(646, 49, "queries down, keys across", "soft", 13)
    assert layout.hidden is not None
    last = layout.order.view(-1, 16)[-1].tolist()
    for query, row in enumerate(layout.hidden[-1].tolist()):
        for key, hidden in enumerate(row):
            fill = "empty" if hidden else fills[last[key]]
            drawing.square(550 + key * 12, top + 4 + query * 12, 12, fill, thick=1)
    words = "Pieces from opposite edges share a window, but do not attend to each other."
    drawing.text(380, 296, words, "soft", 13)
    return drawing


def rope() -> Drawing:
    """Draw clock hands that rotate with the column and the row."""
    drawing = Drawing(760, 310, "Queries and keys rotate with their column and row")
    columns, rows, size = 7, 4, 60
    for row in range(rows):
        for column in range(columns):
            x, y = 40 + column * size, 44 + row * size
            same = (row, column) in {(0, 0), (1, 2), (2, 3), (3, 5)}
            drawing.square(x, y, size, "empty", thick=3)
            if same:
                drawing.box(x + 2, y + 2, size - 4, size - 4, "none", "soft", 2, corner=5)
            for centre, turn, colour in ((18, column, "deepblue"), (42, row, "deepred")):
                cx, cy, angle = x + centre, y + size / 2, turn * 0.5 - math.pi / 2
                drawing.circle(cx, cy, 11, "card", "line")
                tip = (cx + 9 * math.cos(angle), cy + 9 * math.sin(angle))
                drawing.line(cx, cy, *tip, colour, 2.4)
                drawing.circle(cx, cy, 2.2, colour)
    for row, column in ((0, 0), (2, 3)):
        x, y = 40 + column * size, 44 + row * size
        drawing.arrow([(x + 58, y + 44), (x + 122, y + 76)])
    drawing.text(40, 30, "column 0", "deepblue", 13, "start")
    drawing.text(460, 30, f"column {columns - 1}", "deepblue", 13, "end")
    drawing.text(478, 80, "row 0", "deepred", 13, "start")
    drawing.text(478, 260, f"row {rows - 1}", "deepred", 13, "start")
    drawing.arrow([(105, 26), (390, 26)], "deepblue")
    drawing.arrow([(496, 94), (496, 240)], "deepred")
    notes = [
        ("Half of the channels rotate", "deepblue"),
        ("with the column,", "deepblue"),
        ("half with the row.", "deepred"),
        ("Pairs of tokens that are one", "soft"),
        ("row and two columns apart", "soft"),
        ("differ by the same angles", "soft"),
        ("wherever they are. Attention", "soft"),
        ("sees only this difference.", "soft"),
    ]
    for i, (words, colour) in enumerate(notes):
        drawing.text(545, 104 + 20 * i + 10 * (i > 2), words, colour, 14, "start")
    return drawing


def step(
    drawing: Drawing, x: float, y: float, width: float, title: str, words: str, fill: str = "card"
) -> None:
    """Draw a box of 58 units in height with a title and a line below it."""
    drawing.box(x, y, width, 58, fill, "soft")
    drawing.text(x + width / 2, y + 25, title, weight=600)
    drawing.text(x + width / 2, y + 44, words, "ink" if fill != "card" else "soft", 12)


def global_context() -> Drawing:
    """Draw how a window uses information from the whole map."""
    drawing = Drawing(760, 316, "Features of the whole map attend to the keys of a window")
    inside = [column // 4 == 1 and row // 4 == 0 for row in range(8) for column in range(8)]

    def small_map(x: float, y: float, title: str, on: str, off: str) -> None:
        drawing.text(x + 44, y - 12, title, weight=600)
        tokens(drawing, x, y, 11, 8, [on if here else off for here in inside])

    small_map(20, 44, "queries", "blue", "teal")
    drawing.arrow([(114, 88), (136, 88)])
    step(drawing, 142, 59, 226, "convolutions, twice", "3 x 3, channel gates, 1 x 1")
    drawing.arrow([(372, 88), (394, 88)])
    small_map(400, 44, "features of the map", "blue", "teal")
    drawing.arrow([(494, 88), (516, 88)])
    step(drawing, 522, 59, 220, "attention in the window", "features as queries, new keys")

    small_map(20, 186, "keys", "orange", "empty")
    drawing.arrow([(114, 230), (136, 230)])
    step(drawing, 142, 201, 226, "one linear layer", "computes new keys and values")
    drawing.arrow([(372, 230), (560, 230), (560, 124)])
    drawing.text(466, 222, "of the same window", "soft", 12)
    drawing.arrow([(666, 124), (666, 196)])
    step(drawing, 590, 201, 152, "mean of both", "this and plain attention")
    words = "Queries are features of the whole map; half of the output is plain attention."
    drawing.text(380, 302, words, "soft", 13)
    return drawing


def model() -> Drawing:
    """Draw the way from a prompt and noise to an image."""
    drawing = Drawing(760, 392, "From a prompt and noise to an image, through 18 blocks")
    step(drawing, 20, 24, 150, "prompt", '"a red circle ..."')
    drawing.arrow([(174, 53), (204, 53)])
    step(drawing, 210, 24, 190, "text encoder (T5)", "encodes it once")

    step(drawing, 20, 192, 110, "noise", "4 x H/8 x W/8")
    drawing.arrow([(134, 221), (156, 221)])
    step(drawing, 162, 192, 118, "tokens", "2 x 2 latents")
    drawing.arrow([(284, 221), (312, 221)])

    drawing.box(318, 116, 246, 222, "empty", "line")
    drawing.text(441, 138, "18 blocks", weight=600)
    step(drawing, 332, 150, 218, "window attention", "shifted by block mod 4", "blue")
    step(drawing, 332, 212, 218, "cross-attention", "every token to the text", "yellow")
    step(drawing, 332, 274, 218, "feed-forward", "each token separately", "green")
    drawing.arrow([(404, 53), (590, 53), (590, 241), (554, 241)])
    step(drawing, 162, 286, 118, "timestep", "scales, gates")
    drawing.arrow([(284, 315), (312, 315)])

    drawing.arrow([(568, 303), (608, 303)])
    step(drawing, 614, 274, 126, "prediction", "of the noise")
    drawing.arrow([(677, 336), (677, 364), (75, 364), (75, 256)])
    drawing.text(380, 380, "20 steps, each with a little less noise", "soft", 12)
    drawing.arrow([(677, 270), (677, 242)])
    drawing.text(690, 262, "last", "soft", 12, "start")
    step(drawing, 614, 180, 126, "autoencoder", "from latents")
    drawing.arrow([(677, 176), (677, 148)])
    step(drawing, 614, 86, 126, "image", "3 x H x W", "violet")
    return drawing


DRAWINGS = {
    "model": model,
    "windows": windows,
    "shifts": shifts,
    "cyclic-shift": cyclic_shift,
    "rope": rope,
    "global-context": global_context,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        draw().save(IMAGES / f"{name}.svg")
