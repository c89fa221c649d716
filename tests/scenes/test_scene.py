import subprocess
import sys

import pytest

from localdit.scenes import Scene, SceneObject, sample_scenes
from localdit.scenes.scene import POSITION_CENTRE, RELATION_DIRECTION, relation_between


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
