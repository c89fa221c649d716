import numpy as np
import pytest

from localdit.scenes import Scene, SceneObject, draw_scene, sample_scenes
from localdit.scenes.draw import coverage
from localdit.scenes.scene import PALETTE, SHAPES, SIZES


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
