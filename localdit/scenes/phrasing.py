"""Phrasings of captions: words and their synonyms, templates, and names of backgrounds."""

from __future__ import annotations

# Each word of a scene and its synonyms; the first is used half of the time.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "circle": ("circle", "disc", "disk"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus", "plus sign"),
    "moon": ("moon", "crescent", "crescent moon"),
    "house": ("house", "cottage", "home"),
    "tree": ("tree", "fir tree", "pine tree"),
    "flower": ("flower", "blossom"),
    "boat": ("boat", "sailboat", "sailing boat", "ship"),
    "turquoise": ("turquoise", "teal"),
    "purple": ("purple", "violet"),
    "grey": ("grey", "gray"),
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
# Skies and grounds by colour, besides "a blue sky" and "green ground".
SKIES: dict[str, tuple[str, ...]] = {
    "blue": ("the blue sky",),
    "black": ("a night sky", "the night sky", "a black night sky"),
}
GROUNDS: dict[str, tuple[str, ...]] = {
    "green": ("grass", "green grass", "a meadow", "a green meadow"),
    "brown": ("earth", "brown earth", "soil", "brown soil"),
    "yellow": ("sand", "yellow sand", "a beach", "a yellow beach"),
    "white": ("snow", "white snow", "snowy ground"),
    "grey": ("grey stone",),
}

# How two objects can be arranged, the left or upper one first, by the first one's relation.
PAIR_OF_RELATION: dict[str, tuple[str, tuple[int, int]]] = {
    "left of": ("side by side", (0, 1)),
    "right of": ("side by side", (1, 0)),
    "above": ("one above the other", (0, 1)),
    "below": ("one above the other", (1, 0)),
}
PAIRS: tuple[str, ...] = ("side by side", "one above the other")

# In these templates {0}, {1} and {2} are the objects by their place in the arrangement, {two} are
# twins, {three} three that look alike, and {left}, {right}, {above}, {below} are relations.
ARRANGED: dict[str, tuple[str, ...]] = {
    "side by side": (
        "{0} {left} {1}", "{0} {left} {1}", "{0} {left} {1}",
        "{1} {right} {0}", "{1} {right} {0}", "{1} {right} {0}",
        "{0} that is {left} {1}",
        "{1} that is {right} {0}",
        "{0} with {1} to its right",
        "{1} with {0} to its left",
        "{0} and {1} to its right",
        "{1} and {0} to its left",
        "{left} {1} is {0}",
        "{right} {0} is {1}",
        "{0} and {1} side by side",
        "{0} and {1}, side by side",
        "from left to right, {0} and {1}",
        "from right to left, {1} and {0}",
    ),
    "one above the other": (
        "{0} {above} {1}", "{0} {above} {1}", "{0} {above} {1}",
        "{1} {below} {0}", "{1} {below} {0}", "{1} {below} {0}",
        "{0} that is {above} {1}",
        "{1} that is {below} {0}",
        "{0} with {1} below it",
        "{1} with {0} above it",
        "{0} and {1} below it",
        "{1} and {0} above it",
        "{below} {0} is {1}",
        "{above} {1} is {0}",
        "{0} on top of {1}",
        "{0} and {1}, one above the other",
        "from top to bottom, {0} and {1}",
    ),
    "row": (
        "a row of three: {0}, {1} and {2}",
        "a row of {0}, {1} and {2}",
        "from left to right, {0}, {1} and {2}",
        "from left to right: {0}, {1}, {2}",
        "{0}, {1} and {2} from left to right",
        "{0}, then {1}, then {2}, side by side",
        "{0}, {1} and {2} side by side",
        "{0}, {1} and {2} in a row",
        "{0}, {1}, {2} in a row",
        "from right to left, {2}, {1} and {0}",
        "{1} between {0} and {2}", "{1} between {0} and {2}",
        "{1} between {0} on the left and {2} on the right",
        "{1} between {2} on the right and {0} on the left",
        "{1} with {0} to its left and {2} to its right",
        "{1} with {2} to its right and {0} to its left",
        "between {0} and {2} is {1}",
        "{0} and {2} with {1} between them",
        "{0} {left} {1} and {2} {right} it",
    ),
    "column": (
        "a column of three: {0}, {1} and {2}",
        "a column of {0}, {1} and {2}",
        "from top to bottom, {0}, {1} and {2}",
        "from top to bottom: {0}, {1}, {2}",
        "{0}, {1} and {2} from top to bottom",
        "{0}, {1} and {2} one above the other",
        "{0}, {1} and {2} in a column",
        "from bottom to top, {2}, {1} and {0}",
        "{0} {above} {1} {above} {2}", "{0} {above} {1} {above} {2}",
        "{2} {below} {1} {below} {0}",
        "{0} on top of {1} on top of {2}",
        "{0}, below it {1}, and below that {2}",
        "{1} between {0} above and {2} below",
        "{1} between {0} above it and {2} below it",
        "{1} with {0} above it and {2} below it",
        "{1} with {2} below it and {0} above it",
        "{0} {above} {1} and {2} below it",
    ),
    "one above two": (
        "{0} {above} {1} and {2}", "{0} {above} {1} and {2}", "{0} {above} {1} and {2}",
        "{1} and {2} {below} {0}", "{1} and {2} {below} {0}",
        "{0} {above} {1} on the left and {2} on the right",
        "{1} and {2} side by side {below} {0}",
        "{0} with {1} and {2} below it",
        "{0} with {1} below it on the left and {2} below it on the right",
        "{0} above, {1} and {2} below",
        "{below} {0} are {1} on the left and {2} on the right",
        "{1} {left} {2}, and {0} above them",
        "{2} {right} {1}, and {0} above both",
        "{1} and {2} with {0} above them",
        "{1} next to {2} with {0} above them",
    ),
    "two above one": (
        "{0} and {1} {above} {2}", "{0} and {1} {above} {2}", "{0} and {1} {above} {2}",
        "{2} {below} {0} and {1}", "{2} {below} {0} and {1}",
        "{2} {below} {0} on the left and {1} on the right",
        "{0} and {1} side by side {above} {2}",
        "{2} with {0} and {1} above it",
        "{2} with {0} above it on the left and {1} above it on the right",
        "{0} and {1} above, {2} below",
        "{above} {2} are {0} on the left and {1} on the right",
        "{0} {left} {1}, and {2} below them",
        "{1} {right} {0}, and {2} below both",
        "{0} and {1} with {2} below them",
        "{0} next to {1} with {2} below them",
    ),
}  # fmt: skip

# The same with twins, by arrangement and the places of those that look alike.
TWINS: dict[tuple[str, tuple[int, ...]], tuple[str, ...]] = {
    ("side by side", (0, 1)): (
        "{two} side by side",
        "{two} side by side",
        "{two} next to each other",
        "{two} in a row",
        "{two}, one on the left and one on the right",
    ),
    ("one above the other", (0, 1)): (
        "{two}, one above the other",
        "{two} one above the other",
        "{two} on top of each other",
        "{two}, one below the other",
        "{two}, one at the top and one at the bottom",
    ),
    ("row", (0, 1)): (
        "{two} {left} {2}",
        "{2} {right} {two}",
        "{two} and {2} to their right",
        "from left to right, {two} and {2}",
        "{2} with {two} to its left",
    ),
    ("row", (0, 2)): (
        "{1} between {two}",
        "{1} between {two}",
        "{1} in the middle of {two}",
        "{two} with {1} between them",
        "{1} with {two} to its left and right",
        "between {two} is {1}",
    ),
    ("row", (1, 2)): (
        "{0} {left} {two}",
        "{two} {right} {0}",
        "{two} and {0} to their left",
        "from left to right, {0} and {two}",
        "{0} with {two} to its right",
    ),
    ("row", (0, 1, 2)): (
        "{three} in a row",
        "{three} side by side",
        "{three} next to each other",
    ),
    ("column", (0, 1)): (
        "from top to bottom, {two} and {2}",
        "{two} one above the other, and {2} below them",
        "{2} {below} a column of {two}",
    ),
    ("column", (0, 2)): (
        "{1} between {two}, one above and one below",
        "{1} between {two}, one above it and one below it",
        "{two} one above the other, and {1} between them",
        "{1} with {two}, one above it and one below it",
    ),
    ("column", (1, 2)): (
        "from top to bottom, {0} and {two}",
        "{two} one above the other, and {0} above them",
        "{0} {above} a column of {two}",
    ),
    ("column", (0, 1, 2)): (
        "{three} one above the other",
        "{three} in a column",
        "{three} on top of each other",
    ),
    ("one above two", (1, 2)): (
        "{0} {above} {two}",
        "{0} {above} {two}",
        "{two} {below} {0}",
        "{two} side by side {below} {0}",
        "{two} with {0} above them",
        "{0} with {two} below it",
    ),
    ("one above two", (0, 1, 2)): (
        "{three}, one above two",
        "{three}, one above the other two",
    ),
    ("two above one", (0, 1)): (
        "{two} {above} {2}",
        "{two} {above} {2}",
        "{2} {below} {two}",
        "{two} side by side {above} {2}",
        "{two} with {2} below them",
        "{2} with {two} above it",
    ),
    ("two above one", (0, 1, 2)): (
        "{three}, two above one",
        "{three}, one below the other two",
    ),
}

# What each place of an arrangement is called when each object is named with its place.
LEFT = ("on the left", "on the left", "at the left", "on the left side")
RIGHT = ("on the right", "on the right", "at the right", "on the right side")
_TOP, _BOTTOM = ("at the top", "at the top", "on top"), ("at the bottom",)
MIDDLE = ("in the middle", "in the centre", "in the center")
TOP_LEFT = ("at the top left", "at the upper left", "in the top left corner")
TOP_RIGHT = ("at the top right", "at the upper right", "in the top right corner")
BOTTOM_LEFT = ("at the bottom left", "at the lower left", "in the bottom left corner")
BOTTOM_RIGHT = ("at the bottom right", "at the lower right", "in the bottom right corner")
PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "side by side": (LEFT, RIGHT),
    "one above the other": (_TOP, _BOTTOM),
    "row": (LEFT, MIDDLE, RIGHT),
    "column": (_TOP, MIDDLE, _BOTTOM),
    "one above two": (_TOP, BOTTOM_LEFT, BOTTOM_RIGHT),
    "two above one": (TOP_LEFT, TOP_RIGHT, _BOTTOM),
}

# Objects without their places, by number of phrases.
TOGETHER: dict[int, tuple[str, ...]] = {
    1: ("{}",),
    2: ("{} and {}", "{} and {}", "{} with {}", "{}, {}"),
    3: ("{}, {} and {}", "{}, {} and {}", "{} with {} and {}", "{} and {} and {}", "{}, {}, {}"),
}
NEIGHBOURS = ("{} next to {}", "{} beside {}")

# Backgrounds by kind and by which of the colours are said: names, and whole phrases after the
# objects. {0} and {1} are the colours; on the ground, the sky and the ground with their colours.
ON = ("on {}", "on {}", "on {}", "against {}", "in front of {}")
NAMES: dict[tuple[str, bool, bool], tuple[str, ...]] = {
    ("plain", True, False): ("a {0} background", "a {0} background", "a plain {0} background",
                             "a {0} backdrop", "a solid {0} background"),
    ("gradient", True, True): (
        "a gradient from {0} to {1}", "a gradient from {0} to {1}", "a gradient of {0} to {1}",
        "a {0} to {1} gradient", "a {0} to {1} gradient", "a {0}-to-{1} gradient",
        "a gradient background from {0} to {1}",
        "a background that fades from {0} to {1}",
        "a background that fades from {0} at the top to {1} at the bottom",
        "a background that fades from {1} at the bottom to {0} at the top",
        "a background fading from {0} to {1}",
        "a background that turns from {0} to {1}",
        "a gradient with {0} at the top and {1} at the bottom",
        "a gradient with {1} at the bottom and {0} at the top",
    ),
    ("gradient", False, False): ("a gradient", "a gradient background", "a colour gradient"),
    ("stripes", True, True): (
        "{0} and {1} stripes", "{0} and {1} stripes", "{1} and {0} stripes",
        "a {0} and {1} striped background", "a {1} and {0} striped background",
        "a striped background in {0} and {1}", "a background of {0} and {1} stripes",
        "stripes of {0} and {1}", "vertical {0} and {1} stripes",
        "a {0}-and-{1} striped background",
    ),
    ("stripes", True, False): ("{0} stripes", "a {0} striped background"),
    ("stripes", False, False): ("stripes", "a striped background", "vertical stripes"),
    ("ground", True, True): (
        "{0} over {1}", "{0} above {1}", "{1} under {0}", "{1} below {0}", "{1} beneath {0}",
    ),
    ("ground", True, False): ("{0}",),
    ("ground", False, True): ("{1}",),
}  # fmt: skip
PHRASES: dict[tuple[str, bool, bool], tuple[str, ...]] = {
    ("plain", True, False): ("on {0}", "on plain {0}"),
    ("ground", True, True): (
        "on {1} under {0}", "on {1} under {0}", "on {1} under {0}", "on {1} below {0}",
        "on {1} beneath {0}", "under {0} on {1}", "with {1} below {0}", "with {1} and {0}",
        "with {0} over {1}", "with {0} above {1}", "with {0} and {1}",
    ),
    ("ground", True, False): ("under {0}", "under {0}", "below {0}", "with {0}"),
    ("ground", False, True): ("on {1}", "on {1}", "with {1}"),
}  # fmt: skip

# Words that say nothing about the scene.
OPENINGS = (
    "a picture of", "a picture with", "a picture that shows", "an image of", "an illustration of",
    "a drawing of", "a drawing with", "a simple drawing of", "a flat illustration of",
    "a painting of", "clip art of", "draw", "please draw", "show me", "i want", "please make",
)  # fmt: skip
ADJECTIVES = (
    "beautiful", "nice", "pretty", "lovely", "cute", "simple", "flat", "simple flat", "neat",
)  # fmt: skip
ENDINGS = (
    ", please", ", simple flat style", ", flat colours", ", in a simple style", ", minimalist",
    ", clean and simple", ", digital art", ", vector art", ", simple shapes",
)  # fmt: skip
FILLED = 0.15  # share of the captions with such words
