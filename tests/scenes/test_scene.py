import subprocess
import sys

import numpy as np
import pytest

from localdit.scenes import Scene, SceneObject, draw_scene, sample_scenes
from localdit.scenes.scene import (
    PALETTE,
    POSITION_CENTRE,
    RELATION_DIRECTION,
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


def test_a_scene_survives_the_way_through_json_values():
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


def test_pictures_have_the_asked_size_and_the_scene_s_colours():
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


def test_no_pixels_are_refused():
    with pytest.raises(ValueError, match="side"):
        draw_scene(next(sample_scenes(1, seed=0)), 0)
