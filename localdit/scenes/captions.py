"""Captions of scenes in English: many phrasings, complete or with attributes left out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import permutations

import numpy as np

from localdit.scenes.phrasing import (
    ADJECTIVES,
    ARRANGED,
    ENDINGS,
    FILLED,
    GROUNDS,
    NAMES,
    NEIGHBOURS,
    ON,
    OPENINGS,
    PAIR_OF_RELATION,
    PHRASES,
    PLACES,
    SKIES,
    SYNONYMS,
    TOGETHER,
    TWINS,
)
from localdit.scenes.scene import RELATIONS, Background, Scene, SceneObject


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
    arrangement, (first, second) = PAIR_OF_RELATION[scene.relations[0]]
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
    twins = TWINS.get((arrangement, alike))
    if twins and rng.random() < 0.75:
        return _pick(rng, twins)
    if rng.random() < 0.8:
        return _pick(rng, ARRANGED[arrangement])
    places = [_pick(rng, ways) for ways in PLACES[arrangement]]
    form = _pick(rng, ("{{{0}}} {1}", "{{{0}}} {1}", "{1} {{{0}}}", "{1} is {{{0}}}"))
    order = rng.permutation(len(places)).tolist()
    *most, last = (form.format(index, places[index]) for index in order)
    return ", ".join(most) + _pick(rng, (" and ", ", and ", ", ")) + last


def _unplaced(arrangement: str, alike: tuple[int, ...], rng: np.random.Generator
              ) -> tuple[str, str | None]:  # fmt: skip
    """Return a template that does not say where each object is, and the arrangement if it does."""
    count = len(PLACES[arrangement])
    names = [f"{{{place}}}" for place in range(count) if place not in alike]
    names += [f"{{{place}}}" for place in alike] if rng.random() < 0.25 else _together(alike)
    names = [names[index] for index in rng.permutation(len(names))]
    if arrangement == "side by side" and len(names) == 2 and rng.random() < 0.4:
        return _pick(rng, NEIGHBOURS).format(*names), arrangement
    return _pick(rng, TOGETHER[len(names)]).format(*names), None


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
    name = _pick(rng, NAMES[key]).format(*words)
    behind = _pick(rng, ON).format(name)
    if kind == "ground" or (key in PHRASES and rng.random() < 0.25):
        behind = _pick(rng, PHRASES[key]).format(*words)
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
    if rng.random() < FILLED:
        way = rng.random()
        if way < 0.45 and _is_noun(text):
            text = f"{_pick(rng, OPENINGS)} {text}"
        elif way < 0.75:
            text = _with_adjective(text, _pick(rng, ADJECTIVES), rng)
        else:
            text += _pick(rng, ENDINGS)
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
