import re

import numpy as np
import pytest

from localdit.scenes import Scene, SceneObject, describe, describe_often, sample_scenes
from localdit.scenes.phrasing import OPPOSITE, SYNONYMS

ONE = Scene("blue", (SceneObject("circle", "red", "large", 0.25, 0.25),))
TWO = Scene(
    "white",
    (
        SceneObject("circle", "red", "small", 0.25, 0.5),
        SceneObject("square", "green", "large", 0.75, 0.5),
    ),
)


def phrasings(scene, count=400):
    rng = np.random.default_rng(0)
    return [describe(scene, rng) for _ in range(count)]


def says(text, word):
    return any(re.search(rf"\b{re.escape(way)}\b", text) for way in SYNONYMS.get(word, (word,)))


@pytest.mark.parametrize("scene", [ONE, TWO])
def test_complete_captions_mention_every_attribute(scene):
    for caption in phrasings(scene):
        assert says(caption.text, scene.background) and caption.background == scene.background
        for thing in scene.objects:
            for word in (thing.shape, thing.colour, thing.size):
                assert says(caption.text, word), caption.text
        assert (caption.position == "top left") == (scene is ONE)
        assert (caption.relation is not None) == (scene is TWO)


@pytest.mark.parametrize("scene", [ONE, TWO])
def test_there_are_many_phrasings(scene):
    texts = {caption.text for caption in phrasings(scene)}
    assert len(texts) > 100
    assert all(text == text.lower().strip() and "  " not in text for text in texts)


def test_the_relation_is_that_of_the_object_mentioned_first():
    for caption in phrasings(TWO):
        red_first = caption.text.index("red") < caption.text.index("green")
        assert caption.objects[0].colour == ("red" if red_first else "green")
        assert caption.relation == ("left of" if red_first else OPPOSITE["left of"])


def test_plain_relations_read_the_right_way_round():
    joined = [
        c.text for c in phrasings(TWO) if re.search(r"(circle|dis[ck]) to the left of", c.text)
    ]
    assert joined and all(text.index("red") < text.index("green") for text in joined)
    joined = [c.text for c in phrasings(TWO) if "square to the right of" in c.text]
    assert joined and all(text.index("green") < text.index("red") for text in joined)


def test_incomplete_captions_mention_only_their_attributes():
    rng = np.random.default_rng(0)
    for scene in sample_scenes(200, seed=8):
        caption = describe(scene, rng, complete=False)
        if caption.background is None:
            others = {thing.colour for thing in scene.objects}
            assert scene.background in others or not says(caption.text, scene.background)
        for said in caption.objects:
            for word in (said.shape, said.colour, said.size):
                assert word is None or says(caption.text, word), caption.text


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
