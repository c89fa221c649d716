from collections import Counter

import numpy as np

from localdit.scenes import Scene, SceneObject, is_held_out, sample_scene, sample_scenes
from localdit.scenes.scene import COLOURS, POSITIONS, RELATIONS, SHAPES, coverage


def triples(scene):
    return {(thing.shape, thing.colour, scene.background) for thing in scene.objects}


def test_training_and_held_out_scenes_share_no_combination_that_is_held_out():
    train, held_out = list(sample_scenes(3000, 0)), list(sample_scenes(600, 0, held_out=True))
    assert not any(is_held_out(scene) for scene in train)
    assert all(is_held_out(scene) for scene in held_out)
    single = [scene for scene in held_out if scene.relation is None]
    seen = set().union(*(triples(scene) for scene in train))
    assert not seen & set().union(*(triples(scene) for scene in single))


def test_about_a_tenth_of_the_triples_is_held_out():
    scenes = [
        Scene(ground, (SceneObject(shape, colour, "small", 0.5, 0.5),))
        for ground in COLOURS
        for colour in COLOURS
        for shape in SHAPES
        if colour != ground
    ]
    assert 0.06 < np.mean([is_held_out(scene) for scene in scenes]) < 0.15


def test_the_split_is_the_same_everywhere_and_always():
    held_out = [
        f"{colour} {shape} on white"
        for shape in SHAPES
        for colour in COLOURS
        if colour != "white"
        and is_held_out(Scene("white", (SceneObject(shape, colour, "small", 0.5, 0.5),)))
    ]
    assert held_out == ["blue circle on white", "blue cross on white"]


def test_the_split_ignores_order_size_and_place():
    for scene in sample_scenes(200, seed=5):
        if scene.relation is not None:
            first, second = scene.objects
            moved = SceneObject(first.shape, first.colour, "small", first.x, 0.9)
            assert not is_held_out(Scene(scene.background, (second, moved)))


def test_a_scene_depends_on_its_index_not_on_the_count():
    assert list(sample_scenes(20, 3))[:5] == list(sample_scenes(5, 3))
    assert list(sample_scenes(5, 3)) != list(sample_scenes(5, 4))
    assert sample_scene(np.random.default_rng(1)) == sample_scene(np.random.default_rng(1))


def test_every_word_comes_up_about_evenly():
    scenes = list(sample_scenes(4000, seed=0))
    singles = [scene for scene in scenes if scene.relation is None]
    assert 0.45 < len(singles) / len(scenes) < 0.55
    counts = {
        "position": (Counter(scene.objects[0].position for scene in singles), POSITIONS),
        "relation": (Counter(scene.relation for scene in scenes if scene.relation), RELATIONS),
        "colour": (Counter(o.colour for scene in scenes for o in scene.objects), COLOURS),
        "shape": (Counter(o.shape for scene in scenes for o in scene.objects), SHAPES),
    }
    for name, (counter, words) in counts.items():
        assert set(counter) == set(words), name
        assert min(counter.values()) > 0.6 * sum(counter.values()) / len(words), name


def test_objects_lie_inside_the_picture_and_apart():
    for scene in sample_scenes(150, seed=6):
        covers = [np.asarray(coverage(thing, 128)) > 0 for thing in scene.objects]
        for cover in covers:
            assert not (
                cover[0].any() or cover[-1].any() or cover[:, 0].any() or cover[:, -1].any()
            )
        if len(covers) == 2:
            grown = np.pad(covers[0], 2)
            for dy in range(5):
                for dx in range(5):
                    assert not (grown[dy : dy + 128, dx : dx + 128] & covers[1]).any()
