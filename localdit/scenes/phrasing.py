"""Captions of scenes in English: many phrasings, complete or with attributes left out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from localdit.scenes.scene import Scene, SceneObject

# Each word of a scene and its synonyms; the first is used half of the time.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "circle": ("circle", "disc", "disk"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "purple": ("purple", "violet"),
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SIDE = {
    "left of": ("on the left", "at the left"),
    "right of": ("on the right", "at the right"),
    "above": ("at the top", "on top"),
    "below": ("at the bottom", "at the bottom"),
}
_BESIDE_IT = {
    "left of": "to its left",
    "right of": "to its right",
    "above": "above it",
    "below": "below it",
}
_BACKGROUNDS: tuple[str, ...] = (
    "{core} on {a_colour} background",
    "{core} on {colour}",
    "on {a_colour} background, {core}",
    "{a_colour} background with {core}",
    "{core}, {colour} background",
    "{colour} background, {core}",
    "{core} against {a_colour} backdrop",
    "{a_colour} picture with {core}",
)
_NO_BACKGROUNDS: tuple[str, ...] = ("{core}", "{core}", "a picture of {core}", "there is {core}")


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
        background: Colour of the background; None if left out.
        objects: Objects in the order in which the text mentions them.
        position: Position of a single object; None if left out, or for two objects.
        relation: Relation of the object mentioned first to the other; None if left out, or for one
            object.
    """

    text: str
    background: str | None
    objects: tuple[Said, ...]
    position: str | None
    relation: str | None


# A clause without its background, the objects as mentioned, and the first one's relation.
_Clause = tuple[str, tuple[Said, ...], str | None]


def describe(scene: Scene, rng: np.random.Generator, complete: bool = True) -> Caption:
    """Describe a scene in one of many phrasings.

    Args:
        scene: The scene.
        rng: Chooses phrasing and synonyms.
        complete: Mention every attribute. Otherwise each may be left out: sizes, background,
            position and relation often, colours and shapes sometimes.
    """
    things = tuple(_look(thing, rng, complete) for thing in scene.objects)
    background = scene.background if complete or rng.random() < 0.6 else None
    placed = complete or bool(rng.random() < 0.6)
    position = relation = None
    if scene.relation is None:
        position = scene.objects[0].position if placed else None
        core = _single(things[0], position, rng)
    else:
        core, things, relation = _pair(things, scene.relation if placed else None, rng)
    text = _on_background(core, background, rng) + ("." if rng.random() < 0.1 else "")
    return Caption(text, background, things, position, relation)


def describe_often(
    scene: Scene, rng: np.random.Generator, count: int = 4, complete_share: float = 0.75
) -> list[Caption]:
    """Return `count` captions of different wording, of which the given share is complete (rounded).

    Raises:
        ValueError: if `count` is not from 1 to 16.
    """
    if not 1 <= count <= 16:
        raise ValueError(f"count must be from 1 to 16, got {count}")
    captions: dict[str, Caption] = {}
    while len(captions) < count:
        caption = describe(scene, rng, complete=len(captions) < round(count * complete_share))
        captions.setdefault(caption.text, caption)
    return list(captions.values())


def _look(thing: SceneObject, rng: np.random.Generator, complete: bool) -> Said:
    shape, colour, size = (complete or keep for keep in rng.random(3) < (0.9, 0.85, 0.6))
    return Said(
        thing.shape if shape else None,
        thing.colour if colour else None,
        thing.size if size else None,
    )


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _say(word: str, rng: np.random.Generator) -> str:
    ways = SYNONYMS.get(word, (word,))
    return ways[0] if rng.random() < 0.5 else _pick(rng, ways)


def _with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _noun(thing: Said, rng: np.random.Generator) -> str:
    words = [_say(word, rng) for word in (thing.size, thing.colour) if word is not None]
    return " ".join([*words, _say(thing.shape, rng) if thing.shape else "shape"])


def _place(position: str, rng: np.random.Generator) -> tuple[str, str]:
    """Return a position as an adverbial and as bare words."""
    if position == "centre":
        word = _pick(rng, ("centre", "center", "middle"))
        return f"in the {word}", word
    if " " in position:
        upper = position.replace("top", "upper").replace("bottom", "lower")
        corner = _pick(rng, (position, position, position.replace(" ", "-"), upper))
        at = _pick(rng, ("at the {}", "in the {}", "in the {} corner", "in the {} corner"))
        return at.format(corner), corner
    preposition = "on" if position in ("left", "right") and rng.random() < 0.7 else "at"
    return f"{preposition} the {position}", position


def _single(thing: Said, position: str | None, rng: np.random.Generator) -> str:
    noun = _noun(thing, rng)
    if position is None:
        return _with_article(noun) if rng.random() < 0.8 else noun
    at, bare = _place(position, rng)
    a_noun = _with_article(noun)
    return _pick(rng, (
        f"{a_noun} {at}",
        f"{a_noun} {at}",
        f"{a_noun}, {bare}",
        f"{at}, {a_noun}",
        f"{noun} {bare}",
        f"{noun}, {at}",
        f"{a_noun} placed {at}",
    ))  # fmt: skip


def _pair(things: tuple[Said, ...], relation: str | None, rng: np.random.Generator) -> _Clause:
    if rng.random() < 0.5:  # mention the other one first
        things = things[::-1]
        relation = OPPOSITE[relation] if relation else None
    first, second = (_with_article(_noun(thing, rng)) for thing in things)
    if relation is None:
        joint = _pick(rng, ("{} and {}", "{} next to {}", "{} with {}", "{}, {}"))
        return joint.format(first, second), things, None
    says = partial(_say, rng=rng)
    here, there = _pick(rng, _SIDE[relation]), _pick(rng, _SIDE[OPPOSITE[relation]])
    text = _pick(rng, (
        f"{first} {says(relation)} {second}",
        f"{first} {says(relation)} {second}",
        f"{first} {says(relation)} {second}",
        f"{first} that is {says(relation)} {second}",
        f"{first} {here} and {second} {there}",
        f"{here} {first}, {there} {second}",
        f"{first} with {second} {_BESIDE_IT[OPPOSITE[relation]]}",
        f"{says(OPPOSITE[relation])} {first} is {second}",
    ))  # fmt: skip
    return text, things, relation


def _on_background(core: str, colour: str | None, rng: np.random.Generator) -> str:
    if colour is None:
        return _pick(rng, _NO_BACKGROUNDS).format(core=core)
    word = _say(colour, rng)
    return _pick(rng, _BACKGROUNDS).format(core=core, colour=word, a_colour=_with_article(word))
