import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from localdit.scenes import (
    Scene,
    SceneObject,
    draw_scene,
    is_held_out,
    sample_scene,
    sample_scenes,
)
from localdit.scenes.scene import (
    COLOURS,
    PALETTE,
    POSITION_CENTRE,
    POSITIONS,
    RELATION_DIRECTION,
    RELATIONS,
    SHAPES,
    SIZES,
    coverage,
    relation_between,
)


def test_positions_are_the_names_of_their_centres():
    for name, (x, y) in POSITION_CENTRE.items():
        assert SceneObject("circle", "red", "small", x + 0.05, y - 0.05).position == name


def test_relations_point_from_the_second_object_to_the_first():
    for name, (dx, dy) in RELATION_DIRECTION.items():
        assert relation_between((0.5 + 0.2 * dx, 0.5 + 0.2 * dy), (0.55, 0.45)) == name


def test_a_scene_survives_json():
    for scene in sample_scenes(20, seed=1):
        assert Scene.from_dict(scene.to_dict()) == scene


@pytest.mark.parametrize(
    "change",
    [{"shape": "hexagon"}, {"colour": "pink"}, {"size": "medium"}, {"x": 1.2}, {"y": -0.1}],
)
def test_unknown_words_and_places_are_refused(change):
    values = {"shape": "circle", "colour": "red", "size": "small", "x": 0.5, "y": 0.5}
    with pytest.raises(ValueError):
        SceneObject(**(values | change))


def test_impossible_scenes_are_refused():
    red = SceneObject("circle", "red", "small", 0.25, 0.5)
    with pytest.raises(ValueError, match="own colour"):
        Scene("red", (red,))
    with pytest.raises(ValueError, match="1 or 2"):
        Scene("blue", ())
    with pytest.raises(ValueError, match="1 or 2"):
        Scene("blue", (red, red, red))
    with pytest.raises(ValueError, match="background"):
        Scene("grey", (red,))


def test_scenes_need_no_torch():
    code = "import sys, localdit.scenes, localdit.scenes.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_same_scene_gives_the_same_pixels():
    for scene in sample_scenes(5, seed=2):
        assert draw_scene(scene).tobytes() == draw_scene(scene).tobytes()


def test_pictures_have_the_given_size_and_the_colours_of_the_scene():
    scene = Scene("blue", (SceneObject("square", "yellow", "large", 0.25, 0.75),))
    for side in (64, 128, 200):
        picture = draw_scene(scene, side)
        assert picture.size == (side, side) and picture.mode == "RGB"
        assert picture.getpixel((side - 1, 0)) == PALETTE["blue"]
        assert picture.getpixel((side // 4, 3 * side // 4)) == PALETTE["yellow"]


@pytest.mark.parametrize("size", SIZES)
def test_size_does_not_give_the_shape_away(size):
    areas = [
        np.asarray(coverage(SceneObject(shape, "red", size, 0.5, 0.5), 128)).sum()
        for shape in SHAPES
    ]
    assert max(areas) / min(areas) < 1.25


def test_shapes_are_centred_where_they_should_be():
    for shape in SHAPES:
        cover = np.asarray(coverage(SceneObject(shape, "red", "large", 0.5, 0.5), 128))
        for axis in (0, 1):
            inside = np.flatnonzero(cover.max(axis=axis))
            assert abs(inside[0] + inside[-1] - 127) <= 1


def test_edges_are_smooth():
    cover = np.asarray(coverage(SceneObject("circle", "red", "large", 0.5, 0.5), 128))
    assert len(np.unique(cover)) > 8


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ValueError, match="side"):
        draw_scene(next(sample_scenes(1, seed=0)), 0)


# Random scenes


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


def test_all_words_are_about_equally_frequent():
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
