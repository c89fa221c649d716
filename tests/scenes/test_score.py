from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from localdit.scenes import Scene, SceneObject, draw_scene, sample_scenes
from localdit.scenes.score import (
    connected_components,
    mean_scores,
    read_picture,
    score_picture,
)

ONE = Scene("blue", (SceneObject("circle", "red", "large", 0.25, 0.25),))
TWO = Scene(
    "white",
    (
        SceneObject("circle", "red", "small", 0.25, 0.5),
        SceneObject("square", "green", "large", 0.75, 0.5),
    ),
)


def spoil(picture, seed):
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.0)), dtype=float)
    noise = np.random.default_rng(seed).normal(0, 8, blurred.shape)
    return np.clip(blurred + noise, 0, 255)


def changed(scene, index=0, **values):
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **values)
    return replace(scene, objects=tuple(objects))


def wrong(picture, expected):
    scores = score_picture(picture, expected)
    return {name for name, share in scores.items() if share < 1.0} - {"all"}


@pytest.mark.parametrize("held_out", [False, True])
def test_true_drawings_are_all_right_even_blurred_and_noisy(held_out):
    for i, scene in enumerate(sample_scenes(40, 0, held_out)):
        picture = draw_scene(scene)
        assert score_picture(picture, scene)["all"] == 1.0
        assert score_picture(spoil(picture, i), scene)["all"] == 1.0


@pytest.mark.parametrize("side", [64, 256])
def test_pictures_of_other_sizes_are_read(side):
    for scene in sample_scenes(8, seed=1):
        assert score_picture(draw_scene(scene, side), scene)["all"] == 1.0


@pytest.mark.parametrize(
    ("values", "attribute"),
    [
        ({"shape": "square"}, "shape"),
        ({"shape": "diamond"}, "shape"),
        ({"colour": "orange"}, "colour"),
        ({"size": "small"}, "size"),
        ({"x": 0.5}, "position"),
        ({"y": 0.75}, "position"),
    ],
)
def test_each_wrong_attribute_is_found_and_no_other(values, attribute):
    assert wrong(draw_scene(changed(ONE, **values)), ONE) == {attribute}


def test_a_wrong_background_is_found():
    assert wrong(draw_scene(replace(ONE, background="green")), ONE) == {"background"}


def test_swapped_objects_have_the_wrong_relation():
    first, second = TWO.objects
    swapped = replace(TWO, objects=(replace(first, x=0.75), replace(second, x=0.25)))
    assert wrong(draw_scene(swapped), TWO) == {"relation"}
    upright = replace(TWO, objects=(replace(first, x=0.5, y=0.25), replace(second, x=0.5, y=0.75)))
    assert wrong(draw_scene(upright), TWO) == {"relation"}


def test_half_of_two_shapes_wrong_is_half_right():
    scores = score_picture(draw_scene(changed(TWO, shape="cross")), TWO)
    assert scores["shape"] == 0.5 and scores["colour"] == 1.0 and scores["all"] == 0.0


def test_swapped_colours_are_not_right():
    swapped = changed(changed(TWO, 0, colour="green"), 1, colour="red")
    assert score_picture(draw_scene(swapped), TWO)["all"] == 0.0


def test_missing_and_superfluous_objects_are_counted():
    lonely = replace(TWO, objects=TWO.objects[:1])
    assert {"count", "shape", "colour", "size", "relation"} == wrong(draw_scene(lonely), TWO)
    assert score_picture(draw_scene(TWO), lonely)["count"] == 0.0


def test_an_empty_or_noisy_picture_scores_nothing():
    empty = Image.new("RGB", (128, 128), "white")
    assert read_picture(empty) == ("white", [])
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3))
    for picture in (empty, noise):
        scores = score_picture(picture, ONE)
        assert scores["shape"] == scores["all"] == 0.0


def test_a_blob_unlike_any_shape_has_none():
    picture = np.full((128, 128, 3), 245)
    picture[20:100, 20:26] = 20  # a long bar
    assert [seen.shape for seen in read_picture(picture)[1]] == [None]


def test_components_touch_at_edges_not_at_corners():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=bool)
    parts = connected_components(mask)
    assert sorted(int(part.sum()) for part in parts) == [1, 3, 3]
    assert (np.sum(parts, axis=0) == mask).all()


def test_means_are_over_the_pictures_to_which_an_attribute_applies():
    means = mean_scores([{"shape": 1.0, "position": 0.0}, {"shape": 0.5, "relation": 1.0}])
    assert means == {"shape": 0.75, "position": 0.0, "relation": 1.0}


def test_a_picture_without_three_channels_is_refused():
    with pytest.raises(ValueError, match="RGB"):
        score_picture(np.zeros((8, 8)), ONE)
