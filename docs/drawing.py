"""A small SVG canvas for the docs' drawings: a card for light and dark pages."""

from __future__ import annotations

import math
from pathlib import Path

# name: (on a light page, on a dark page)
COLOURS = {
    "card": ("#f7f8fb", "#20242f"),
    "ink": ("#1f2937", "#e5e7eb"),
    "soft": ("#5b6472", "#a3acba"),
    "line": ("#c3cad6", "#454c5c"),
    "empty": ("#e6e9f0", "#2d3340"),
    "blue": ("#8fb4f5", "#3f6cc0"),
    "green": ("#8fd6ac", "#2f8559"),
    "yellow": ("#f6d37a", "#a67c1a"),
    "red": ("#f2a3a0", "#b04a46"),
    "violet": ("#c3a8f0", "#7652b8"),
    "teal": ("#86d3d6", "#24818a"),
    "orange": ("#f5b98a", "#b4672a"),
    "pink": ("#f0a6cf", "#a94583"),
    "olive": ("#c9d58a", "#75842c"),
    "deepblue": ("#2456b8", "#8db4ff"),
    "deepred": ("#b3312c", "#ff9b95"),
}
WINDOWS = ["blue", "yellow", "green", "red", "violet", "teal", "orange", "pink", "olive"]


class Drawing:
    """Shapes on a card of `width x height` units; colours are names in `COLOURS`."""

    def __init__(self, width: int, height: int, description: str) -> None:
        self.width, self.height = width, height
        self.description = description
        self.parts: list[str] = []

    def square(
        self, x: float, y: float, size: float, fill: str, stroke: str = "card", thick: float = 1.5
    ) -> None:
        """Draw a square with its upper left corner at (x, y)."""
        self.box(x, y, size, size, fill, stroke, thick, corner=2.5)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        stroke: str = "line",
        thick: float = 1.5,
        corner: float = 6,
    ) -> None:
        """Draw a rectangle with round corners."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{corner}" stroke-width="{thick}" class="f-{fill} s-{stroke}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, thick: float) -> None:
        """Draw a straight line."""
        self.parts.append(
            f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke-width="{thick}" '
            f'class="f-none s-{stroke}"/>'
        )

    def arrow(self, points: list[tuple[float, float]], stroke: str = "soft") -> None:
        """Draw a line through points with an arrowhead at its end."""
        (x1, y1), (x2, y2) = points[-2:]
        angle = math.atan2(y2 - y1, x2 - x1)
        head = [
            (x2 - 8 * math.cos(angle + turn), y2 - 8 * math.sin(angle + turn))
            for turn in (0.45, -0.45)
        ]
        trunk = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        tip = "L".join(f"{x:.1f} {y:.1f}" for x, y in (head[0], (x2, y2), head[1]))
        self.parts.append(
            f'<path d="M{trunk}M{tip}" stroke-width="1.8" class="f-none s-{stroke}"/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str, stroke: str = "none") -> None:
        """Draw a circle around (x, y)."""
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="f-{fill} s-{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = "ink",
        size: float = 14,
        anchor: str = "middle",
        weight: int = 400,
    ) -> None:
        """Draw text on the baseline y."""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
            f'text-anchor="{anchor}" class="f-{colour} s-none">{words}</text>'
        )

    def save(self, path: Path) -> None:
        """Write the SVG."""
        path.write_text(self.svg(), encoding="utf-8")

    def svg(self) -> str:
        """Return the drawing as SVG; its colours follow the reader's light or dark mode."""
        light, dark = (
            "".join(
                f".f-{name}{{fill:{shades[i]}}}.s-{name}{{stroke:{shades[i]}}}"
                for name, shades in COLOURS.items()
            )
            for i in (0, 1)
        )
        style = (
            f".f-none{{fill:none}}.s-none{{stroke:none}}{light}"
            f"@media(prefers-color-scheme:dark){{{dark}}}"
            "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
            "path{stroke-linecap:round;stroke-linejoin:round}"
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{self.description}</title>\n<style>{style}</style>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="10" class="f-card s-none"/>\n'
            f"{body}\n</svg>\n"
        )
