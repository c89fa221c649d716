"""The command that measures pipelines."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.pipeline_quality import Drawn, Option, row
from benchmarks.pipeline_report import in_own_process, write_report
from localdit.scenes import draw_scene, sample_scenes

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_is_quick_and_wrong_values_are_named():
    start = time.perf_counter()
    assert "what to measure" in run("--help").stdout
    assert time.perf_counter() - start < 2
    assert "--pixels is 100; expected a multiple of 16" in run("large", "--pixels", "100").stderr
    assert "--captions is 0; expected at least 1" in run("quality", "--captions", "0").stderr


def test_a_report_holds_the_table_and_what_it_takes_to_measure_it_again(tmp_path):
    measured = {"columns": ["a", "b"], "rows": [[1, "x"]], "notes": ["As it was."]}
    text = write_report("some", measured, Namespace(output=tmp_path, threads=2))
    assert text.startswith("| a | b |\n|---|---|\n| 1 | x |\n\nAs it was.\n")
    assert "CPU, 2 thread(s), torch " in text
    assert (tmp_path / "pipeline_some.md").read_text() == text
    assert json.loads((tmp_path / "pipeline_some.json").read_text())["rows"] == [[1, "x"]]


@pytest.mark.slow
def test_a_process_of_its_own_tells_its_peak():
    sizes = [
        in_own_process("pipeline_parts:decode", dtype="float32", pixels=pixels, tile=None)
        for pixels in (64, 256)
    ]
    assert 1e8 < sizes[0]["weights"] < sizes[0]["peak_bytes"]
    assert sizes[0]["peak_bytes"] + 2**26 < sizes[1]["peak_bytes"]  # 8 layers of 256 x 256 x 128


def test_a_row_compares_with_the_default_of_the_same_seed():
    scenes = list(sample_scenes(2, 0, False))
    right = [draw_scene(scene, 128) for scene in scenes]
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
        ("quality", "--captions", "2", "--batch-size", "2"),
        ("compile", "--batch-size", "1", "--repeats", "1"),
        ("large", "--pixels", "256", "--steps", "1"),
    ],
)
def test_it_measures(arguments, tmp_path):
    result = run(*arguments, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / f"pipeline_{arguments[0]}.json").read_text())
    assert report["rows"]
    assert all(len(cells) == len(report["columns"]) for cells in report["rows"])
