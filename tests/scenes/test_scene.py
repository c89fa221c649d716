import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from localdit.scenes import (
    Background,
    Scene,
    SceneObject,
    draw_scene,
    is_held_out,
    sample_scene,
    sample_scenes,
)
from localdit.scenes.scene import (
    ARRANGEMENT_CENTRES,
    ARRANGEMENTS,
    BACKGROUNDS,
    BANDS,
    COLOURS,
    GRID,
    HORIZON,
    PALETTE,
    POSITION_CENTRE,
    POSITIONS,
    RELATION_DIRECTION,
    RELATIONS,
    SIZE_RADIUS,
    SIZES,
    relation_between,
)
from localdit.scenes.shapes import SHAPES, coverage, outline_bottom, parts_of, shades_of

BLUE = Background.plain("blue")
ALL_BACKGROUNDS = [Background(kind, colours) for kind, choices in BACKGROUNDS.items()
                   for colours in choices]  # fmt: skip


def single(shape, colour, background, size="small"):
    return Scene(background, (SceneObject(shape, colour, size, 0.5, 0.5),))


def cover_of(thing, side=128):
    """Return the share of each pixel that an object covers, in 0..255."""
    radius, centre = SIZE_RADIUS[thing.size] * side, (thing.x * side, thing.y * side)
    return np.asarray(coverage(parts_of(thing.shape), radius, centre, (side, side)))


def three(arrangement, shapes=("circle", "square", "star")):
    return tuple(SceneObject(shape, "red", "small", x, y) for shape, (x, y) in
                 zip(shapes, ARRANGEMENT_CENTRES[arrangement], strict=True))  # fmt: skip


def test_positions_are_the_names_of_their_centres():
    for name, (x, y) in POSITION_CENTRE.items():
        assert SceneObject("circle", "red", "small", x + 0.05, y - 0.05).position == name


def test_relations_point_from_the_second_object_to_the_first():
    for name, (dx, dy) in RELATION_DIRECTION.items():
        assert relation_between((0.5 + 0.2 * dx, 0.5 + 0.2 * dy), (0.55, 0.45)) == name


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_three_objects_know_their_arrangement(arrangement):
    scene = Scene(BLUE, three(arrangement))
    assert scene.arrangement == arrangement and len(scene.relations) == 3
    assert Scene(BLUE, scene.objects[:2]).arrangement is None


def test_a_scene_survives_json():
    for scene in sample_scenes(60, seed=1):
        assert Scene.from_dict(scene.to_dict()) == scene


def test_a_background_may_be_given_as_a_colour():
    scene = single("circle", "red", BLUE)
    assert Scene.from_dict(scene.to_dict() | {"background": "blue"}) == scene


@pytest.mark.parametrize(
    "change",
    [{"shape": "octagon"}, {"colour": "cyan"}, {"size": "medium"}, {"x": 1.2}, {"y": -0.1}],
)
def test_unknown_words_and_places_are_refused(change):
    values = {"shape": "circle", "colour": "red", "size": "small", "x": 0.5, "y": 0.5}
    with pytest.raises(ValueError):
        SceneObject(**(values | change))


def test_impossible_scenes_are_refused():
    red = SceneObject("circle", "red", "small", 0.25, 0.5)
    for background in (Background.plain("red"), Background("stripes", ("red", "white"))):
        with pytest.raises(ValueError, match="own colour"):
            Scene(background, (red,))
    for count in (0, 4):
        with pytest.raises(ValueError, match="1 to 3"):
            Scene(BLUE, (red,) * count)
    with pytest.raises(ValueError, match="one of row, column"):
        Scene(BLUE, three("row")[::-1])


def test_unknown_backgrounds_are_refused():
    with pytest.raises(ValueError, match="kind of background must be one of plain"):
        Background("spots", ("red",))
    with pytest.raises(ValueError, match="plain background must be one of red, .* got 'cyan'"):
        Background.plain("cyan")
    with pytest.raises(ValueError, match="got 'red and green'"):
        Background("gradient", ("red", "green"))


def test_scenes_need_no_torch():
    code = "import sys, localdit.scenes, localdit.scenes.score; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Drawing


def test_the_same_scene_gives_the_same_pixels():
    for scene in sample_scenes(5, seed=2):
        assert draw_scene(scene).tobytes() == draw_scene(scene).tobytes()


def test_pictures_have_the_given_size_and_the_colours_of_the_scene():
    scene = Scene(BLUE, (SceneObject("square", "yellow", "large", 0.25, 0.75),))
    for side in (64, 128, 200):
        picture = draw_scene(scene, side)
        assert picture.size == (side, side) and picture.mode == "RGB"
        assert picture.getpixel((side - 1, 0)) == PALETTE["blue"]
        assert picture.getpixel((side // 4, 3 * side // 4)) == PALETTE["yellow"]


@pytest.mark.parametrize("background", ALL_BACKGROUNDS, ids=str)
def test_backgrounds_have_their_colours(background):
    pixels = background.pixels(128)
    assert pixels.shape == (128, 128, 3)
    first, last = (np.array(PALETTE[background.colours[i]]) for i in (0, -1))
    if background.kind == "gradient":
        steps = np.diff(pixels[:, 0] @ (last - first))
        assert (pixels == pixels[:, :1]).all() and (steps > 0).all()
        assert np.abs(pixels[0, 0] - first).max() < 1.5 and np.abs(pixels[-1, 0] - last).max() < 1.5
        return
    bands = (pixels == last).all(axis=-1)
    assert (bands | (pixels == first).all(axis=-1)).all()
    if background.kind == "stripes":
        assert (bands == bands[:1]).all() and np.diff(bands[0]).sum() == BANDS - 1
        assert not bands[0, 0]
    elif background.kind == "ground":
        assert (bands == (np.arange(128) >= HORIZON * 128)[:, None]).all()


def test_a_colour_near_one_of_the_background_does_not_show():
    assert not BLUE.shows("blue") and BLUE.shows("white")
    assert not Background("stripes", ("red", "white")).shows("white")
    # Grey lies about halfway between blue and white.
    assert not Background("gradient", ("blue", "white")).shows("grey")


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_shades_of_their_colour(shape):
    scene = single(shape, "red", BLUE, "large")
    colours = Counter(map(tuple, np.asarray(draw_scene(scene, 128)).reshape(-1, 3).tolist()))
    shades = shades_of(PALETTE["red"])
    used = {shade for _, shade in parts_of(shape)} - {"hole"}
    assert all(colours[shades[shade]] > 10 for shade in used)


@pytest.mark.parametrize("size", SIZES)
def test_size_does_not_give_the_shape_away(size):
    areas = [cover_of(SceneObject(shape, "red", size, 0.5, 0.5)).sum() for shape in SHAPES]
    assert max(areas) / min(areas) < 1.9


def test_small_things_are_smaller_than_large_ones():
    areas = {size: [cover_of(SceneObject(shape, "red", size, 0.5, 0.5)).sum() for shape in SHAPES]
             for size in SIZES}  # fmt: skip
    assert max(areas["small"]) < 0.6 * min(areas["large"])


def test_shapes_are_centred_where_they_should_be():
    for shape in SHAPES:
        cover = cover_of(SceneObject(shape, "red", "large", 0.5, 0.5))
        for axis in (0, 1):
            inside = np.flatnonzero(cover.max(axis=axis))
            assert abs(inside[0] + inside[-1] - 127) <= 1
        assert abs(inside[-1] - 63.5 - outline_bottom(shape) * SIZE_RADIUS["large"] * 128) < 1.0


def test_a_ring_shows_the_background_through_its_hole():
    picture = draw_scene(single("ring", "red", BLUE, "large"), 128)
    assert picture.getpixel((64, 64)) == PALETTE["blue"]
    assert picture.getpixel((64, 64 - 16)) == PALETTE["red"]


def test_edges_are_smooth():
    assert len(np.unique(cover_of(SceneObject("circle", "red", "large", 0.5, 0.5)))) > 8


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
    lonely = [scene for scene in held_out if len(scene.objects) == 1]
    seen = set().union(*(triples(scene) for scene in train))
    assert not seen & set().union(*(triples(scene) for scene in lonely))


def test_about_a_tenth_of_the_triples_is_held_out():
    scenes = [
        single(shape, colour, background)
        for background in ALL_BACKGROUNDS
        for colour in COLOURS
        for shape in SHAPES
        if colour not in background.colours
    ]
    assert 0.09 < np.mean([is_held_out(scene) for scene in scenes]) < 0.11


def test_the_split_is_the_same_everywhere_and_always():
    held_out = [
        f"{colour} {shape}"
        for shape in SHAPES
        for colour in COLOURS
        if colour != "white" and is_held_out(single(shape, colour, Background.plain("white")))
    ]
    assert held_out == [
        "blue circle", "pink square", "red triangle", "purple diamond", "black diamond",
        "orange heart", "red hexagon", "purple hexagon", "blue moon", "brown house", "grey house",
        "blue tree", "black tree", "purple sun", "pink sun", "black cloud", "green boat",
    ]  # fmt: skip


def test_the_split_ignores_order_size_and_place():
    for scene in sample_scenes(200, seed=5):
        if len(scene.objects) == 2:
            first, second = scene.objects
            moved = replace(first, size="small", y=0.9)
            assert not is_held_out(Scene(scene.background, (second, moved)))


def test_a_scene_depends_on_its_index_not_on_the_count():
    assert list(sample_scenes(20, 3))[:5] == list(sample_scenes(5, 3))
    assert list(sample_scenes(5, 3)) != list(sample_scenes(5, 4))
    assert sample_scene(np.random.default_rng(1)) == sample_scene(np.random.default_rng(1))


def test_all_words_are_about_equally_frequent():
    scenes = list(sample_scenes(4000, seed=0))
    lonely = [scene.objects[0] for scene in scenes if len(scene.objects) == 1]
    things = [thing for scene in scenes for thing in scene.objects]
    pairs = [scene.relations[0] for scene in scenes if len(scene.objects) == 2]
    triads = [scene.arrangement for scene in scenes if len(scene.objects) == 3]
    counts = {
        "count": (Counter(len(scene.objects) for scene in scenes), (1, 2, 3)),
        "background": (Counter(scene.background.kind for scene in scenes), tuple(BACKGROUNDS)),
        "position": (Counter(thing.position for thing in lonely), POSITIONS),
        "relation": (Counter(pairs), RELATIONS),
        "arrangement": (Counter(triads), ARRANGEMENTS),
        "colour": (Counter(thing.colour for thing in things), COLOURS),
        "shape": (Counter(thing.shape for thing in things), SHAPES),
    }
    for name, (counter, words) in counts.items():
        assert set(counter) == set(words), name
        assert min(counter.values()) > 0.4 * sum(counter.values()) / len(words), name


def test_objects_lie_inside_the_picture_and_apart():
    for scene in sample_scenes(300, seed=6):
        covers = [cover_of(thing) > 0 for thing in scene.objects]
        for cover in covers:
            assert not (
                cover[0].any() or cover[-1].any() or cover[:, 0].any() or cover[:, -1].any()
            )
        for index, cover in enumerate(covers):
            grown = np.pad(cover, 2)
            for other in covers[index + 1 :]:
                for dy in range(5):
                    for dx in range(5):
                        assert not (grown[dy : dy + 128, dx : dx + 128] & other).any()


def test_objects_show_on_their_background():
    for scene in sample_scenes(300, seed=7):
        assert all(scene.background.shows(thing.colour) for thing in scene.objects)


def test_what_looks_alike_differs_in_nothing_and_is_not_rare():
    scenes = [scene for scene in sample_scenes(2000, seed=8) if len(scene.objects) > 1]
    twins = 0
    for scene in scenes:
        looks = [thing.look for thing in scene.objects]
        assert len({look[:2] for look in looks}) == len(set(looks))
        twins += len(set(looks)) < len(looks)
    assert 0.05 < twins / len(scenes) < 0.3


def test_things_side_by_side_stand_on_one_line_of_the_ground():
    counts = set()
    for scene in sample_scenes(600, seed=9):
        beside = {"left of", "right of"}.issuperset(scene.relations)
        if scene.background.kind == "ground" and len(scene.objects) > 1 and beside:
            counts.add(len(scene.objects))
            for thing in scene.objects:
                bottom = thing.y + outline_bottom(thing.shape) * SIZE_RADIUS[thing.size]
                assert HORIZON < 0.85 - 0.5 / GRID <= bottom <= 0.85 + 0.5 / GRID
    assert counts == {2, 3}
