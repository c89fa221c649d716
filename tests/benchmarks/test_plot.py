import sys

import pytest
from PIL import Image

from benchmarks.cases import Case
from benchmarks.plot import draw

from . import made_up


def test_every_group_has_a_row_of_panels(tmp_path):
    pytest.importorskip("matplotlib")
    one = made_up.records(Case(pixels=512, contexts=("local", "global")), [512, 1024, 2048])
    own = made_up.records(Case(pixels=512, depth="own"), [512, 1024])
    assert draw(one, tmp_path / "one.png")
    sana = made_up.records(Case(512, against="sana", contexts=("local", "f32")), [512, 1024])
    assert draw([*one, *own, *sana], tmp_path / "three.png")
    heights = [Image.open(tmp_path / name).height for name in ("one.png", "three.png")]
    assert heights[1] == 3 * heights[0]


def test_without_results_there_is_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    failed = {"case": {}, "tokens": 256, "error": "killed"}
    assert not draw([failed], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ModuleNotFoundError, match="requirements-train.txt"):
        draw(made_up.records(Case(pixels=512), [512]), tmp_path / "none.png")
