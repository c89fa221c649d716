import re
from dataclasses import replace

import numpy as np
import pytest

from localdit.scenes import (
    Background,
    Scene,
    SceneObject,
    describe,
    describe_often,
    sample_scene,
    sample_scenes,
)
from localdit.scenes.captions import Caption, Said, made_up_word
from localdit.scenes.phrasing import GROUNDS, PAIRS, SKIES, SYNONYMS
from localdit.scenes.scene import ARRANGEMENT_CENTRES, ARRANGEMENTS, BACKGROUNDS

CIRCLE = SceneObject("circle", "red", "small", 0.25, 0.5)
SQUARE = SceneObject("square", "green", "large", 0.75, 0.5)
STAR = SceneObject("star", "black", "small", 0.5, 0.5)
ON_BLUE = Background.plain("blue")
ONE = Scene(ON_BLUE, (replace(CIRCLE, y=0.25),))
TWO = Scene(Background.plain("white"), (CIRCLE, SQUARE))


def arranged(arrangement, looks=(CIRCLE, SQUARE, STAR), background=ON_BLUE):
    centres = ARRANGEMENT_CENTRES[arrangement]
    return Scene(
        background,
        tuple(replace(o, x=x, y=y) for o, (x, y) in zip(looks, centres, strict=True)),
    )


ALL_PLACES = [ONE, TWO, *(arranged(name) for name in ARRANGEMENTS)]


def phrasings(scene, count=400, **options):
    rng = np.random.default_rng(0)
    return [describe(scene, rng, **options) for _ in range(count)]


def says(text, word):
    return any(
        re.search(rf"\b{re.escape(way)}(s|es)?\b", text) for way in SYNONYMS.get(word, (word,))
    )


def said_by_place(caption):
    return dict(zip(caption.places, caption.objects, strict=True))


@pytest.mark.parametrize("scene", ALL_PLACES)
def test_complete_captions_mention_every_attribute(scene):
    for caption in phrasings(scene):
        assert caption.background == "plain"
        assert caption.colours == (scene.background.colours[0], None)
        assert says(caption.text, caption.colours[0])
        assert len(caption.objects) == len(scene.objects)
        for thing in scene.objects:
            for word in thing.look:
                assert says(caption.text, word), caption.text
        assert (caption.position == "top left") == (scene is ONE)
        assert (caption.arrangement is None) == (scene is ONE)


@pytest.mark.parametrize("scene", ALL_PLACES)
def test_there_are_many_phrasings(scene):
    texts = {caption.text for caption in phrasings(scene)}
    assert len(texts) > 200
    for text in texts:
        assert text == text.lower().strip() and "  " not in text and "{" not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_complete_captions_name_the_background(kind):
    rng = np.random.default_rng(0)
    for colours in BACKGROUNDS[kind]:
        thing = replace(STAR, colour=next(c for c in ("red", "blue", "black") if c not in colours))
        scene = Scene(Background(kind, colours), (thing,))
        for _ in range(30):
            caption = describe(scene, rng)
            assert caption.background == kind
            assert caption.colours == (*colours, None)[:2]
            if kind == "ground":
                assert says_any(caption.text, SKIES.get(colours[0], ()), colours[0], "sky")
                assert says_any(caption.text, GROUNDS[colours[1]], colours[1], "ground", "land")
            else:
                assert all(says(caption.text, colour) for colour in colours), caption.text


def says_any(text, ways, colour, *nouns):
    plain = [f"{way} {noun}" for way in SYNONYMS.get(colour, (colour,)) for noun in nouns]
    return any(re.sub("^(a|the) ", "", way) in text for way in (*ways, *plain))


def test_the_places_are_those_of_the_mentioned_objects():
    for scene in sample_scenes(300, seed=3):
        by_place = scene.objects
        if scene.relations[:1] in (("right of",), ("below",)):
            by_place = scene.objects[::-1]
        for caption in phrasings(scene, 5):
            if len(by_place) == 1:
                assert caption.places == ()
                continue
            names = PAIRS if len(by_place) == 2 else (scene.arrangement,)
            assert caption.arrangement in names
            looks = {place: (o.shape, o.colour, o.size)
                     for place, o in said_by_place(caption).items()}  # fmt: skip
            assert looks == {place: thing.look for place, thing in enumerate(by_place)}


@pytest.mark.parametrize("scene", ALL_PLACES[1:])
def test_objects_are_in_the_order_of_the_text(scene):
    for caption in phrasings(scene):
        shapes = {o.shape: min(caption.text.find(way) % 1000 for way in SYNONYMS.get(
            o.shape, (o.shape,))) for o in scene.objects}  # fmt: skip
        assert [said.shape for said in caption.objects] == sorted(shapes, key=shapes.get)


def test_plain_relations_read_the_right_way_round():
    joined = [
        c.text for c in phrasings(TWO) if re.search(r"(circle|dis[ck]) to the left of", c.text)
    ]
    assert joined and all(text.index("red") < text.index("green") for text in joined)
    joined = [c.text for c in phrasings(TWO) if "square to the right of" in c.text]
    assert joined and all(text.index("green") < text.index("red") for text in joined)


def test_something_between_two_others_is_in_the_middle():
    for arrangement in ("row", "column"):
        texts = [c.text for c in phrasings(arranged(arrangement))]
        between = [text for text in texts if re.search(r"^\w+ \w+ green square between", text)]
        assert between and all(("below" in text) == (arrangement == "column") for text in between)


# Twins


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("looks", [(STAR, STAR, SQUARE), (STAR, SQUARE, STAR),
                                   (SQUARE, STAR, STAR), (STAR, STAR, STAR)])  # fmt: skip
def test_objects_that_look_alike_are_mentioned_together(arrangement, looks):
    scene = arranged(arrangement, looks)
    captions = phrasings(scene)
    number = "three" if looks.count(STAR) == 3 else "two"
    together = [
        c for c in captions if re.search(rf"(\b{number}|a pair of) \S+ (black )?stars", c.text)
    ]
    possible = {"one above two": (SQUARE, STAR, STAR), "two above one": (STAR, STAR, SQUARE)}
    alike_in_place = looks.count(STAR) == 3 or looks == possible.get(arrangement, looks)
    assert bool(together) == alike_in_place
    for caption in captions:
        assert [o.shape for _, o in sorted(said_by_place(caption).items())] == [
            thing.shape for thing in looks
        ]


def test_two_that_look_alike_are_a_pair():
    for centres, words in (
        (((0.25, 0.5), (0.75, 0.5)), "side by side"),
        (((0.5, 0.25), (0.5, 0.75)), "one above the other"),
    ):
        twins = tuple(replace(STAR, x=x, y=y) for x, y in centres)
        captions = phrasings(Scene(ON_BLUE, twins))
        assert {c.arrangement for c in captions} == {words}
        assert any("stars" in c.text and words in c.text for c in captions)


# Meaning


def variants(scene):
    """Yield scenes that differ from one in a single respect."""
    yield scene
    yield replace(scene, background=Background("gradient", ("blue", "turquoise")))
    yield replace(scene, background=Background("gradient", ("turquoise", "blue")))
    yield replace(scene, background=Background("stripes", ("blue", "white")))
    yield replace(scene, background=Background("ground", ("blue", "yellow")))
    yield replace(scene, background=Background("ground", ("turquoise", "yellow")))
    first, *others = scene.objects
    for change in ({"shape": "boat"}, {"colour": "pink"}, {"size": "large"}):
        yield replace(scene, objects=(replace(first, **change), *others))
    if others:
        looks = [thing.look for thing in scene.objects]
        swapped = [looks[1], looks[0], *looks[2:]]
        yield replace(scene, objects=tuple(
            replace(thing, shape=shape, colour=colour, size=size)
            for thing, (shape, colour, size) in zip(scene.objects, swapped, strict=True)
        ))  # fmt: skip
    else:
        yield replace(scene, objects=(replace(first, x=0.5),))


def test_complete_captions_of_different_scenes_differ():
    two = (replace(STAR, x=0.25), replace(SQUARE, x=0.75))
    stacked = (replace(STAR, y=0.25), replace(SQUARE, x=0.5, y=0.75))
    scenes = [*variants(Scene(ON_BLUE, two[:1])), *variants(Scene(ON_BLUE, two))]
    scenes += variants(Scene(ON_BLUE, stacked))
    for arrangement in ARRANGEMENTS:
        scenes += variants(arranged(arrangement, (STAR, SQUARE, CIRCLE)))
    meaning = {}
    for index, scene in enumerate(scenes):
        for caption in phrasings(scene, 300):
            assert meaning.setdefault(caption.text, index) == index, caption.text


def test_incomplete_captions_mention_only_their_attributes():
    rng = np.random.default_rng(0)
    for scene in sample_scenes(300, seed=8):
        caption = describe(scene, rng, complete=False)
        colours = {thing.colour for thing in scene.objects}
        for said, colour in zip(caption.colours, scene.background.colours, strict=False):
            assert said in (None, colour)
            if said is None and colour not in colours and scene.background.kind != "gradient":
                assert not says(caption.text, colour) or colour == "white", caption.text
        for said in caption.objects:
            for word in (said.shape, said.colour, said.size):
                assert word is None or says(caption.text, word), caption.text


def test_incomplete_captions_leave_each_attribute_out_sometimes():
    rng = np.random.default_rng(0)
    captions = [describe(sample_scene(rng), rng, complete=False) for _ in range(500)]
    for left_out in (
        [c.background is None for c in captions],
        [c.background is not None and c.colours == (None, None) for c in captions],
        [c.background == "ground" and c.colours[0] is None for c in captions],
        [c.places == () and len(c.objects) > 1 for c in captions],
        [c.places == () and c.arrangement == "side by side" for c in captions],
        [any(said.size is None for said in c.objects) for c in captions],
        [any(said.shape is None for said in c.objects) for c in captions],
    ):
        assert 0 < sum(left_out) < len(captions)


@pytest.mark.parametrize("complete", [True, False])
def test_a_caption_describes_its_scene_and_not_others(complete):
    rng = np.random.default_rng(2)
    scenes = list(sample_scenes(300, seed=11))
    others = 0
    for scene, other in zip(scenes, [*scenes[1:], scenes[0]], strict=True):
        caption = describe(scene, rng, complete, noise=0.1)
        assert caption.describes(scene), caption
        if len(scene.objects) < 3:  # three have one order
            assert caption.describes(Scene(scene.background, scene.objects[::-1])), caption
        others += caption.describes(other)
    assert others == 0 if complete else others < 15


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"colour": "red"}, False), ({"shape": "star"}, False), ({"size": "large"}, True),
        ({"x": 0.25}, False),
    ],
)  # fmt: skip
def test_what_a_caption_leaves_out_may_be_anything(change, same):
    behind = Background.plain("white")
    first, second = (SceneObject("circle", "green", "small", x, 0.5) for x in (0.25, 0.75))
    second = replace(second, colour="blue")
    said = (Said("circle", "blue", None), Said("circle", "green", "small"))
    caption = Caption("", "plain", (None, None), said, None, "side by side", (1, 0))
    assert caption.describes(Scene(behind, (first, second)))
    assert caption.describes(Scene(Background.plain("yellow"), (second, first)))
    assert not caption.describes(Scene(behind, (first,)))
    assert not caption.describes(Scene(Background("stripes", ("red", "white")), (first, second)))
    moved = replace(second, **change)
    first = replace(first, x=0.75) if "x" in change else first
    assert caption.describes(Scene(behind, (first, moved))) == same


def test_captions_of_one_picture_differ():
    rng = np.random.default_rng(0)
    for scene in sample_scenes(50, seed=9):
        captions = describe_often(scene, rng, count=8, complete_share=0.75)
        assert len({caption.text for caption in captions}) == 8
        complete = [c for c in captions if c.background and all(o.size for o in c.objects)]
        assert len(complete) >= 6


def test_a_count_out_of_range_is_refused():
    for count in (0, 17):
        with pytest.raises(ValueError, match="count"):
            describe_often(ONE, np.random.default_rng(0), count)


# Made-up words


def test_made_up_words_come_only_when_asked_for():
    known = {word for c in phrasings(TWO, 3000) for word in re.findall(r"[a-z]+", c.text)}

    def unknown(noise):
        captions = phrasings(TWO, 1000, noise=noise)
        return [len(set(re.findall(r"[a-z]+", c.text)) - known) for c in captions]

    assert 0.05 < np.mean([count > 0 for count in unknown(0.1)]) < 0.15
    assert set(unknown(1.0)) == {1, 2}


def test_made_up_words_have_3_to_9_letters():
    rng = np.random.default_rng(0)
    words = [made_up_word(rng) for _ in range(500)]
    assert {len(word) for word in words} == set(range(3, 10))
    assert all(re.fullmatch("[a-z]+", word) for word in words) and len(set(words)) > 450
