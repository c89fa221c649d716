"""Captions of scenes in English: many phrasings, complete or with attributes left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import permutations

import numpy as np

from localdit.scenes.scene import RELATIONS, Background, Scene, SceneObject

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
_PAIR_OF_RELATION: dict[str, tuple[str, tuple[int, int]]] = {
    "left of": ("side by side", (0, 1)),
    "right of": ("side by side", (1, 0)),
    "above": ("one above the other", (0, 1)),
    "below": ("one above the other", (1, 0)),
}
PAIRS: tuple[str, ...] = ("side by side", "one above the other")

# In these templates {0}, {1} and {2} are the objects by their place in the arrangement, {two} are
# twins, {three} three that look alike, and {left}, {right}, {above}, {below} are relations.
_ARRANGED: dict[str, tuple[str, ...]] = {
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
_TWINS: dict[tuple[str, tuple[int, ...]], tuple[str, ...]] = {
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
_LEFT = ("on the left", "on the left", "at the left", "on the left side")
_RIGHT = ("on the right", "on the right", "at the right", "on the right side")
_TOP, _BOTTOM = ("at the top", "at the top", "on top"), ("at the bottom",)
_MIDDLE = ("in the middle", "in the centre", "in the center")
_TOP_LEFT = ("at the top left", "at the upper left", "in the top left corner")
_TOP_RIGHT = ("at the top right", "at the upper right", "in the top right corner")
_BOTTOM_LEFT = ("at the bottom left", "at the lower left", "in the bottom left corner")
_BOTTOM_RIGHT = ("at the bottom right", "at the lower right", "in the bottom right corner")
_PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "side by side": (_LEFT, _RIGHT),
    "one above the other": (_TOP, _BOTTOM),
    "row": (_LEFT, _MIDDLE, _RIGHT),
    "column": (_TOP, _MIDDLE, _BOTTOM),
    "one above two": (_TOP, _BOTTOM_LEFT, _BOTTOM_RIGHT),
    "two above one": (_TOP_LEFT, _TOP_RIGHT, _BOTTOM),
}

# Objects without their places, by number of phrases.
_TOGETHER: dict[int, tuple[str, ...]] = {
    1: ("{}",),
    2: ("{} and {}", "{} and {}", "{} with {}", "{}, {}"),
    3: ("{}, {} and {}", "{}, {} and {}", "{} with {} and {}", "{} and {} and {}", "{}, {}, {}"),
}
_NEIGHBOURS = ("{} next to {}", "{} beside {}")

# Backgrounds by kind and by which of the colours are said: names, and whole phrases after the
# objects. {0} and {1} are the colours; on the ground, the sky and the ground with their colours.
_ON = ("on {}", "on {}", "on {}", "against {}", "in front of {}")
_NAMES: dict[tuple[str, bool, bool], tuple[str, ...]] = {
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
_PHRASES: dict[tuple[str, bool, bool], tuple[str, ...]] = {
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
_OPENINGS = (
    "a picture of", "a picture with", "a picture that shows", "an image of", "an illustration of",
    "a drawing of", "a drawing with", "a simple drawing of", "a flat illustration of",
    "a painting of", "clip art of", "draw", "please draw", "show me", "i want", "please make",
)  # fmt: skip
_ADJECTIVES = (
    "beautiful", "nice", "pretty", "lovely", "cute", "simple", "flat", "simple flat", "neat",
)  # fmt: skip
_ENDINGS = (
    ", please", ", simple flat style", ", flat colours", ", in a simple style", ", minimalist",
    ", clean and simple", ", digital art", ", vector art", ", simple shapes",
)  # fmt: skip
_FILLED = 0.15  # share of the captions with such words


@dataclass(frozen=True)
class Said:
    """The attributes of one object that a caption mentions; None for the others."""

    shape: str | None
    colour: str | None
    size: str | None


@dataclass(frozen=True)
class Caption:
    """A caption and the attributes that it mentions.

    Args:
        text: Lower-case English.
        background: Kind of the background; None if left out.
        colours: The background's first and second colour; None for those left out, and for the
            second colour of a plain background.
        objects: Objects in the order in which the text mentions them.
        position: Position of a single object; None if left out, or for several objects.
        arrangement: One of `PAIRS` for two objects, or of `ARRANGEMENTS` for three; None if left
            out, or for one object.
        places: Place of each of `objects` in the arrangement: 0 is the left or upper one of two;
            of three, places are in the order of `ARRANGEMENT_CENTRES`. Empty if left out.
    """

    text: str
    background: str | None
    colours: tuple[str | None, str | None]
    objects: tuple[Said, ...]
    position: str | None
    arrangement: str | None
    places: tuple[int, ...]

    def describes(self, scene: Scene) -> bool:
        """Return whether a scene has all that the caption mentions, and no other objects."""
        things, arrangement = _by_place(scene)
        behind = scene.background
        pairs = [
            (self.background, behind.kind),
            (self.colours[0], behind.colours[0]),
            (self.colours[1], behind.colours[-1]),
            (self.arrangement, arrangement),
            (self.position, things[0].position),
        ]
        if len(things) != len(self.objects) or not _agree(pairs):
            return False
        orders = [self.places] if self.places else permutations(range(len(things)))
        return any(
            all(_agree(zip(astuple(said), things[place].look, strict=True))
                for said, place in zip(self.objects, order, strict=True))
            for order in orders
        )  # fmt: skip


def describe(
    scene: Scene, rng: np.random.Generator, complete: bool = True, noise: float = 0.0
) -> Caption:
    """Describe a scene in one of many phrasings.

    Args:
        scene: The scene.
        rng: Chooses phrasing and synonyms.
        complete: Mention every attribute. Otherwise each may be left out: sizes, background,
            position and arrangement often, colours and shapes sometimes.
        noise: Probability of one or two made-up words, which mean nothing.
    """
    things, arrangement = _by_place(scene)
    looks = {thing.look: _look(thing, rng, complete) for thing in things}
    said = tuple(looks[thing.look] for thing in things)
    placed = complete or bool(rng.random() < 0.6)
    position = None
    order: tuple[int, ...] = (0,)
    places: tuple[int, ...] = ()
    if arrangement is None:
        position = things[0].position if placed else None
        core = _single(said[0], position, rng)
    else:
        alike = _alike(things)
        if placed:
            template = _arranged(arrangement, alike, rng)
        else:
            template, arrangement = _unplaced(arrangement, alike, rng)
        core, order = _fill(template, said, alike, rng)
        places = order if placed else ()
    kind, colours = _said_background(scene.background, rng, complete)
    text = core if kind is None else _on_background(core, kind, colours, rng)
    text = _garnish(text, rng, noise)
    objects = tuple(said[index] for index in order)
    return Caption(text, kind, colours, objects, position, arrangement, places)


def describe_often(
    scene: Scene,
    rng: np.random.Generator,
    count: int = 4,
    complete_share: float = 0.75,
    noise: float = 0.0,
) -> list[Caption]:
    """Return `count` captions of different wording, of which the given share is complete (rounded).

    Raises:
        ValueError: if `count` is not from 1 to 16.
    """
    if not 1 <= count <= 16:
        raise ValueError(f"count must be from 1 to 16, got {count}")
    captions: dict[str, Caption] = {}
    while len(captions) < count:
        complete = len(captions) < round(count * complete_share)
        caption = describe(scene, rng, complete, noise)
        captions.setdefault(caption.text, caption)
    return list(captions.values())


def made_up_word(rng: np.random.Generator) -> str:
    """Return a random word of 3 to 9 letters; half of these can be pronounced."""
    length = int(rng.integers(3, 10))
    letters = ("abcdefghijklmnopqrstuvwxyz",) * 2
    if rng.random() < 0.5:
        letters = ("bcdfghjklmnprstvwz", "aeiou")
    return "".join(_pick(rng, tuple(letters[i % 2])) for i in range(length))


# What is said


def _agree(pairs: Iterable[tuple[str | None, str | None]]) -> bool:
    """Return whether all pairs (said, seen) are equal; where nothing is said, None, any will do."""
    return all(said in (None, seen) for said, seen in pairs)


def _by_place(scene: Scene) -> tuple[tuple[SceneObject, ...], str | None]:
    """Return the objects in the order of their places, and the arrangement of several."""
    if len(scene.objects) != 2:
        return scene.objects, scene.arrangement
    arrangement, (first, second) = _PAIR_OF_RELATION[scene.relations[0]]
    return (scene.objects[first], scene.objects[second]), arrangement


def _alike(things: tuple[SceneObject, ...]) -> tuple[int, ...]:
    """Return the places of the objects that look like another one."""
    looks = [thing.look for thing in things]
    return tuple(place for place, look in enumerate(looks) if looks.count(look) > 1)


def _look(thing: SceneObject, rng: np.random.Generator, complete: bool) -> Said:
    shape, colour, size = (complete or keep for keep in rng.random(3) < (0.9, 0.85, 0.6))
    return Said(
        thing.shape if shape else None,
        thing.colour if colour else None,
        thing.size if size else None,
    )


def _said_background(background: Background, rng: np.random.Generator, complete: bool
                     ) -> tuple[str | None, tuple[str | None, str | None]]:  # fmt: skip
    """Return the kind and the two colours that a caption mentions."""
    kind, first, second = background.kind, background.colours[0], background.colours[-1]
    if not complete and rng.random() < 0.4:
        return None, (None, None)
    if kind == "plain":
        return kind, (first, None)
    if complete or rng.random() < 0.7:
        return kind, (first, second)
    parts = {
        "gradient": ((None, None),),
        "stripes": ((None, None), (first, None)),
        "ground": ((first, None), (None, second)),
    }[kind]
    return kind, parts[int(rng.integers(len(parts)))]


# How it is said


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _say(word: str, rng: np.random.Generator) -> str:
    ways = SYNONYMS.get(word, (word,))
    return ways[0] if rng.random() < 0.5 else _pick(rng, ways)


def _noun(thing: Said, rng: np.random.Generator, plural: bool = False) -> str:
    size, colour = (_say(word, rng) if word else "" for word in (thing.size, thing.colour))
    shape = _say(thing.shape, rng) if thing.shape else "shape"
    if plural:
        shape += "es" if shape.endswith("s") else "s"
    order = rng.random()
    if size and colour and order < 0.04:
        size += ","
    elif colour and order < 0.08:
        shape, colour = f"{shape} in {colour}", ""
    return " ".join(word for word in (size, colour, shape) if word)


def _place(position: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a position as an adverbial and as bare words."""
    if position == "centre":
        word = _pick(rng, ("centre", "center", "middle"))
        return _pick(rng, ("in the {}", "in the {}", "in the {} of the picture")).format(word), word
    if " " in position:
        upper = position.replace("top", "upper").replace("bottom", "lower")
        corner = _pick(rng, (position, position, position.replace(" ", "-"), upper))
        at = _pick(rng, ("at the {}", "in the {}", "in the {} corner", "in the {} corner"))
        return at.format(corner), corner
    preposition = "on" if position in ("left", "right") and rng.random() < 0.7 else "at"
    end = _pick(rng, ("", "", "", " of the picture")) if preposition == "at" else ""
    return f"{preposition} the {position}{end}", position


def _single(thing: Said, position: str | None, rng: np.random.Generator) -> str:
    noun = _noun(thing, rng)
    if position is None:
        return f"a {noun}" if rng.random() < 0.8 else noun
    at, bare = _place(position, rng)
    return _pick(rng, (
        f"a {noun} {at}",
        f"a {noun} {at}",
        f"a {noun}, {bare}",
        f"{at}, a {noun}",
        f"{at} is a {noun}",
        f"{noun} {bare}",
        f"{noun}, {at}",
        f"a {noun} placed {at}",
    ))  # fmt: skip


def _arranged(arrangement: str, alike: tuple[int, ...], rng: np.random.Generator) -> str:
    """Return a template that says where each object is."""
    twins = _TWINS.get((arrangement, alike))
    if twins and rng.random() < 0.75:
        return _pick(rng, twins)
    if rng.random() < 0.8:
        return _pick(rng, _ARRANGED[arrangement])
    places = [_pick(rng, ways) for ways in _PLACES[arrangement]]
    form = _pick(rng, ("{{{0}}} {1}", "{{{0}}} {1}", "{1} {{{0}}}", "{1} is {{{0}}}"))
    order = rng.permutation(len(places)).tolist()
    *most, last = (form.format(index, places[index]) for index in order)
    return ", ".join(most) + _pick(rng, (" and ", ", and ", ", ")) + last


def _unplaced(arrangement: str, alike: tuple[int, ...], rng: np.random.Generator
              ) -> tuple[str, str | None]:  # fmt: skip
    """Return a template that does not say where each object is, and the arrangement if it does."""
    count = len(_PLACES[arrangement])
    names = [f"{{{place}}}" for place in range(count) if place not in alike]
    names += [f"{{{place}}}" for place in alike] if rng.random() < 0.25 else _together(alike)
    names = [names[index] for index in rng.permutation(len(names))]
    if arrangement == "side by side" and len(names) == 2 and rng.random() < 0.4:
        return _pick(rng, _NEIGHBOURS).format(*names), arrangement
    return _pick(rng, _TOGETHER[len(names)]).format(*names), None


def _together(alike: tuple[int, ...]) -> list[str]:
    return {0: [], 2: ["{two}"], 3: ["{three}"]}[len(alike)]


def _fill(
    template: str, said: tuple[Said, ...], alike: tuple[int, ...], rng: np.random.Generator
) -> tuple[str, tuple[int, ...]]:
    """Return the text of a template, and the place of each object in the order of mention."""
    article = "" if rng.random() < 0.08 else "a "
    words = {relation.split()[0]: _say(relation, rng) for relation in RELATIONS}
    if alike:
        number = "a pair of" if rng.random() < 0.1 else "two"
        nouns = _noun(said[alike[0]], rng, plural=True)
        words |= {"two": f"{number} {nouns}", "three": f"three {nouns}"}
    text = template.format(*(article + _noun(thing, rng) for thing in said), **words)
    order: list[int] = []
    for name in re.findall(r"\{(\d|two|three)\}", template):
        order += [int(name)] if name.isdigit() else alike
    return text, tuple(order)


def _say_sky(colour: str | None, rng: np.random.Generator) -> str:
    if colour is None:
        return ""
    if colour in SKIES and rng.random() < 0.4:
        return _pick(rng, SKIES[colour])
    return f"a {_say(colour, rng)} sky"


def _say_ground(colour: str | None, rng: np.random.Generator) -> str:
    if colour is None:
        return ""
    if rng.random() < 0.5:
        return _pick(rng, GROUNDS[colour])
    return f"{_say(colour, rng)} {_pick(rng, ('ground', 'ground', 'land'))}"


def _on_background(
    core: str, kind: str, colours: tuple[str | None, str | None], rng: np.random.Generator
) -> str:
    first, second = colours
    key = (kind, first is not None, second is not None)
    if kind == "ground":
        words = [_say_sky(first, rng), _say_ground(second, rng)]
    else:
        words = [_say(colour, rng) if colour else "" for colour in colours]
    name = _pick(rng, _NAMES[key]).format(*words)
    behind = _pick(rng, _ON).format(name)
    if kind == "ground" or (key in _PHRASES and rng.random() < 0.25):
        behind = _pick(rng, _PHRASES[key]).format(*words)
    forms = [f"{core} {behind}"] * 6
    forms += [f"{behind}, {core}", f"{core}, {name.removeprefix('a ')}", f"{core}, {behind}"]
    forms += [f"{name.removeprefix('a ')}, {core}", f"{core}. {name}"]
    if _is_noun(core):
        forms += [f"{name} with {core}"] * 2
    return _pick(rng, tuple(forms))


def _is_noun(text: str) -> bool:
    return text.startswith(("a ", "two ", "three "))


def _garnish(text: str, rng: np.random.Generator, noise: float) -> str:
    """Add words that mean nothing, a final full stop and the right articles."""
    if rng.random() < _FILLED:
        way = rng.random()
        if way < 0.45 and _is_noun(text):
            text = f"{_pick(rng, _OPENINGS)} {text}"
        elif way < 0.75:
            text = _with_adjective(text, _pick(rng, _ADJECTIVES), rng)
        else:
            text += _pick(rng, _ENDINGS)
    if rng.random() < noise:
        for _ in range(1 + int(rng.integers(2))):
            text = _with_adjective(text, made_up_word(rng), rng)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text + ("." if rng.random() < 0.1 else "")


def _with_adjective(text: str, word: str, rng: np.random.Generator) -> str:
    """Add a word after one of the articles; for a third of the texts, at the end."""
    articles = [match.end() for match in re.finditer(r"\ban? ", text)]
    if not articles or rng.random() < 1 / 3:
        return text + _pick(rng, (", ", " ")) + word
    at = articles[int(rng.integers(len(articles)))]
    return f"{text[:at]}{word} {text[at:]}"
