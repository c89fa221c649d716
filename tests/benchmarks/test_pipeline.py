"""Tests of `python -m benchmarks.pipeline`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import pipeline, pipeline_seams
from benchmarks.pipeline_quality import Drawn, Option, row
from benchmarks.worker import in_own_process
from localdit.scenes import draw_scene, sample_scenes

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_is_quick_and_wrong_values_are_named():
    start = time.perf_counter()
    assert "what to measure" in run("--help").stdout
    assert time.perf_counter() - start < 2
    assert (
        "--pixels: 100 given; expected a multiple of 16" in run("large", "--pixels", "100").stderr
    )
    assert "--captions: 0 given; expected at least 1" in run("quality", "--captions", "0").stderr


def test_a_report_has_the_table_and_the_command(tmp_path, monkeypatch):
    measured = {"columns": ["a", "b"], "rows": [[1, "x"]], "notes": ["As it was."]}
    monkeypatch.setattr(pipeline_seams, "measure", lambda args: measured)
    for number in range(2):  # results are not overwritten
        assert pipeline.main(["seams", "--output", str(tmp_path)]) == 0
        page = (tmp_path / f"pipeline_seams_00{number}.md").read_text()
        assert page.startswith("| a | b |\n|---|---|\n| 1 | x |\n\nAs it was.\n")
        assert "`python -m benchmarks.pipeline seams --output" in page
    report = json.loads((tmp_path / "pipeline_seams_001.json").read_text())
    assert report["rows"] == [[1, "x"]]
    assert report["about"]["versions"]["torch"]


@pytest.mark.slow
def test_a_separate_process_reports_its_peak():
    sizes = [
        in_own_process("pipeline_parts:decode", dtype="float32", pixels=pixels, tile=None)
        for pixels in (64, 256)
    ]
    assert 1e8 < sizes[0]["weights"] < sizes[0]["peak"]
    assert sizes[0]["peak"] + 2**26 < sizes[1]["peak"]  # 8 layers of 256 x 256 x 128


def test_a_row_compares_with_the_default_at_the_same_seed():
    scenes = list(sample_scenes(2, 0, False))
    right = [draw_scene(scene, 256) for scene in scenes]
    wrong = [right[0], Image.fromarray(255 - np.asarray(right[1]))]
    reference = Drawn(seconds=[2.0, 4.0], pictures=right)
    assert row(Option("default"), reference, reference, scenes)[2:] == ["1.00", "100 %", "0.0"]
    cells = row(Option("fast"), Drawn(seconds=[1.0, 1.0], pictures=wrong), reference, scenes)
    assert cells[:4] == ["fast", "1.000", "3.00", "50 %"]
    assert float(cells[4]) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("whole", "--pixels", "64", "--steps", "1", "--text-layers", "1"),
        ("quality", "--captions", "2", "--batch-size", "2"),
        ("compile", "--batch-size", "1", "--repeats", "1"),
        ("large", "--pixels", "256", "--steps", "1"),
        ("seams", "--pixels", "256"),
    ],
)
def test_it_measures(arguments, tmp_path):
    result = run(*arguments, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / f"pipeline_{arguments[0]}_000.json").read_text())
    assert report["rows"]
    assert all(len(cells) == len(report["columns"]) for cells in report["rows"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sizes_that_were_drawn():
    before, first, second = in_own_process("pipeline_sizes:draw_sizes", capacity=None, count=60)
    assert first < 1.05 * before and second < 1.05 * before
