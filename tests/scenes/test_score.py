from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from localdit.scenes import Scene, SceneObject, draw_scene, sample_scenes
from localdit.scenes.recognition import connected_components, read_picture, reported_scene
from localdit.scenes.scene import BACKGROUNDS, PALETTE, Background
from localdit.scenes.score import edge_contrast, mean_scores, psnr, score_picture
from localdit.scenes.shapes import SHAPES

ONE = Scene(Background.plain("blue"), (SceneObject("circle", "red", "large", 0.25, 0.25),))
TWO = Scene(
    Background.plain("white"),
    (
        SceneObject("circle", "red", "small", 0.25, 0.5),
        SceneObject("square", "green", "large", 0.75, 0.5),
    ),
)
THREE = Scene(
    Background("gradient", ("turquoise", "white")),
    (
        SceneObject("house", "red", "large", 0.25, 0.25),
        SceneObject("heart", "purple", "small", 0.75, 0.25),
        SceneObject("boat", "black", "large", 0.5, 0.75),
    ),
)
FIRST_BACKGROUNDS = [Background(kind, colours[0]) for kind, colours in BACKGROUNDS.items()]


def blurred(picture, radius=1.0):
    return picture.filter(ImageFilter.GaussianBlur(radius))


def noisy(picture):
    pixels = np.asarray(blurred(picture), dtype=float)
    return np.clip(pixels + np.random.default_rng(0).normal(0, 6, pixels.shape), 0, 255)


def tinted(picture):
    return np.clip(np.asarray(blurred(picture), dtype=float) + np.array((8, -8, 8)), 0, 255)


def changed(scene, index=0, **values):
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **values)
    return replace(scene, objects=tuple(objects))


def wrong(picture, expected):
    scores = score_picture(picture, expected)
    return {name for name, share in scores.items() if share < 1.0} - {"all"}


def right(picture, expected):
    return score_picture(picture, expected)["all"] == 1.0


@pytest.mark.parametrize("held_out", [False, True])
def test_true_drawings_are_all_right(held_out):
    scenes = list(sample_scenes(60, 0, held_out))
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    assert {scene.background.kind for scene in scenes} == set(BACKGROUNDS)
    assert [scene for scene in scenes if not right(draw_scene(scene), scene)] == []


@pytest.mark.parametrize("spoil", [lambda picture: blurred(picture, 1.5), noisy, tinted])
def test_spoilt_drawings_are_still_right(spoil):
    scenes = list(sample_scenes(34, 1))
    assert sum(right(spoil(draw_scene(scene)), scene) for scene in scenes) >= 33


@pytest.mark.parametrize("side", [128, 512])
def test_pictures_of_other_sizes_are_read(side):
    scenes = list(sample_scenes(8, seed=1))
    assert [scene for scene in scenes if not right(draw_scene(scene, side), scene)] == []


@pytest.mark.parametrize("background", FIRST_BACKGROUNDS, ids=str)
def test_every_background_of_a_kind_is_told_apart(background):
    for colours in BACKGROUNDS[background.kind]:
        behind = Background(background.kind, colours)
        colour = next(name for name in PALETTE if behind.shows(name))
        thing = SceneObject("star", colour, "large", 0.5, 0.5)
        seen, objects = read_picture(blurred(draw_scene(Scene(behind, (thing,))), 1.5))
        assert seen == behind
        assert [(one.shape, one.colour, one.size) for one in objects] == [thing.look]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_shapes_are_read_though_their_light_parts_vanish_on_white(shape, size):
    scene = Scene(Background.plain("white"), (SceneObject(shape, "pink", size, 0.5, 0.25),))
    assert right(draw_scene(scene), scene)


@pytest.mark.parametrize(
    ("values", "attribute"),
    [
        ({"shape": "square"}, "shape"),
        ({"shape": "hexagon"}, "shape"),
        ({"shape": "boat"}, "shape"),
        ({"colour": "orange"}, "colour"),
        ({"size": "small"}, "size"),
        ({"x": 0.5}, "position"),
        ({"y": 0.75}, "position"),
    ],
)
def test_each_wrong_attribute_is_found_and_no_other(values, attribute):
    assert wrong(draw_scene(changed(ONE, **values)), ONE) == {attribute}


@pytest.mark.parametrize("background", FIRST_BACKGROUNDS, ids=str)
def test_a_wrong_background_is_found(background):
    scene = replace(TWO, objects=(replace(TWO.objects[0], colour="purple"),))
    other = replace(scene, background=background)
    assert wrong(draw_scene(other), scene) == {"background"}


def test_swapped_objects_have_the_wrong_relation():
    first, second = TWO.objects
    swapped = replace(TWO, objects=(replace(first, x=0.75), replace(second, x=0.25)))
    assert wrong(draw_scene(swapped), TWO) == {"relation"}
    upright = replace(TWO, objects=(replace(first, x=0.5, y=0.25), replace(second, x=0.5, y=0.75)))
    assert wrong(draw_scene(upright), TWO) == {"relation"}


def test_of_three_relations_each_counts():
    house, heart, boat = THREE.objects
    swapped = (replace(heart, x=0.25), replace(house, x=0.75), boat)
    scores = score_picture(draw_scene(replace(THREE, objects=swapped)), THREE)
    assert scores["relation"] == pytest.approx(2 / 3)
    assert scores["shape"] == scores["count"] == 1.0 and scores["all"] == 0.0


def test_a_share_of_the_shapes_is_a_share_of_the_score():
    scores = score_picture(draw_scene(changed(TWO, shape="cross")), TWO)
    assert scores["shape"] == 0.5 and scores["colour"] == 1.0 and scores["all"] == 0.0
    scores = score_picture(draw_scene(changed(THREE, 2, shape="sun")), THREE)
    assert scores["shape"] == pytest.approx(2 / 3) and scores["relation"] == 1.0


def test_swapped_colours_are_not_right():
    swapped = changed(changed(TWO, 0, colour="green"), 1, colour="red")
    assert not right(draw_scene(swapped), TWO)


def test_twins_may_be_seen_in_any_order():
    twin = replace(THREE.objects[0], x=0.75)
    scene = replace(THREE, objects=(THREE.objects[0], twin, THREE.objects[2]))
    assert right(draw_scene(scene), scene)


def test_missing_and_superfluous_objects_are_counted():
    lonely = replace(TWO, objects=TWO.objects[:1])
    assert wrong(draw_scene(lonely), TWO) == {"count", "shape", "colour", "size", "relation"}
    assert score_picture(draw_scene(TWO), lonely)["count"] == 0.0
    assert score_picture(draw_scene(THREE), replace(THREE, objects=THREE.objects[:2]))["count"] == 0


@pytest.mark.parametrize("side", [8, 128])
def test_an_empty_or_noisy_picture_scores_nothing(side):
    empty = Image.new("RGB", (side, side), PALETTE["white"])
    assert read_picture(empty) == (Background.plain("white"), [])
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3))
    for picture in (empty, noise):
        scores = score_picture(picture, ONE)
        assert scores["shape"] == scores["all"] == 0.0


def test_wide_pictures_are_read():
    wide = np.full((128, 256, 3), PALETTE["white"])
    wide[:, :128] = np.asarray(draw_scene(replace(TWO, objects=TWO.objects[1:]), 128))
    background, (seen,) = read_picture(wide)
    assert background == TWO.background
    assert (seen.shape, seen.size) == ("square", "large") and abs(seen.x - 0.375) < 0.01


def test_a_blob_unlike_any_shape_has_none():
    picture = np.full((128, 128, 3), 245)
    picture[20:100, 20:26] = 20  # a long bar
    assert [seen.shape for seen in read_picture(picture)[1]] == [None]
    assert reported_scene(Image.fromarray(picture.astype(np.uint8))) is None


def test_a_mangled_shape_is_not_forgiven():
    for shape in SHAPES:
        scene = replace(ONE, objects=(replace(ONE.objects[0], shape=shape),))
        picture = np.array(draw_scene(scene))
        picture[:, 64:] = picture[0, 0]  # without its right half
        assert not right(picture, scene)
    bitten = np.array(draw_scene(ONE))
    bitten[20:60, 66:] = bitten[0, 0]
    assert wrong(bitten, ONE) >= {"shape"}


def test_slivers_at_sharp_edges_of_the_background_are_no_objects():
    scene = replace(TWO, background=Background("ground", ("blue", "white")))
    scene = changed(changed(scene, 0, colour="black"), 1, colour="red")
    picture = np.array(draw_scene(scene))
    picture[192:194] = PALETTE["blue"]  # the horizon is two pixels too low
    picture[192:194, 170:214] = np.asarray(draw_scene(scene))[192:194, 170:214]
    assert right(picture, scene)


def test_reported_scenes_are_the_scenes_that_were_drawn():
    contrasts = []
    for scene in sample_scenes(30, seed=3):
        picture = draw_scene(scene)
        found = reported_scene(picture)
        assert found.background == scene.background
        assert found.arrangement == scene.arrangement
        assert sorted(one.look for one in found.objects) == sorted(
            one.look for one in scene.objects
        )
        contrasts.append(edge_contrast(picture, found))
        assert psnr(picture, draw_scene(found)) > 35
    assert min(contrasts) > 0.97 and np.mean(contrasts) == pytest.approx(1.0, abs=0.01)


def test_blur_lowers_the_contrast_across_edges():
    pictures = [draw_scene(THREE), *(blurred(draw_scene(THREE), one) for one in (0.5, 1.0, 2.0))]
    contrasts = [edge_contrast(picture, reported_scene(picture)) for picture in pictures]
    assert contrasts == sorted(contrasts, reverse=True)
    assert contrasts[0] > 0.97 and contrasts[-1] < 0.5


def test_an_empty_picture_reports_no_scene():
    assert reported_scene(Image.new("RGB", (64, 64), PALETTE["white"])) is None


def test_components_touch_at_edges_not_at_corners():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=bool)
    parts = connected_components(mask)
    assert [int(part.sum()) for part in parts] == [3, 3, 1]
    assert (np.sum(parts, axis=0) == mask).all()
    assert connected_components(np.zeros((3, 3), dtype=bool)) == []


def test_components_of_a_spiral_are_one():
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1],
                     [1, 1, 1, 1, 1]], dtype=bool)  # fmt: skip
    (part,) = connected_components(mask)
    assert (part == mask).all()


def test_means_are_over_the_pictures_to_which_an_attribute_applies():
    means = mean_scores([{"shape": 1.0, "position": 0.0}, {"shape": 0.5, "relation": 1.0}])
    assert means == {"shape": 0.75, "position": 0.0, "relation": 1.0}


def test_a_picture_without_three_channels_is_refused():
    with pytest.raises(ValueError, match="RGB"):
        score_picture(np.zeros((8, 8)), ONE)
