import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from localdit.training.reporting import draw_curves, read_metrics, smoothed

pytest.importorskip("matplotlib")

BLUE, ORANGE, GREEN, GRAY = (31, 119, 180), (255, 127, 14), (44, 160, 44), (127, 127, 127)


def write(folder, lines, tail=""):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def pixels(png, colour, rows=slice(None)):
    """Count the pixels of a colour in some rows of a picture."""
    image = np.asarray(Image.open(png).convert("RGB")).astype(int)[rows]
    return (np.abs(image - colour).sum(axis=2) < 12).sum()


def training(steps):
    return [{"step": n, "loss": 1 / n, "learning_rate": 1e-4} for n in range(1, steps + 1)]


def test_losses_and_learning_rate_are_drawn(tmp_path):
    metrics, png = write(tmp_path, training(60)), tmp_path / "loss.png"
    draw_curves(metrics, png)
    assert Image.open(png).size == (900, 600)
    assert pixels(png, BLUE, slice(0, 400)) > 300
    assert pixels(png, GRAY, slice(420, 560)) > 300
    assert pixels(png, ORANGE) == pixels(png, GREEN) == 0
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_validation_losses_are_drawn_if_there_are_any(tmp_path):
    lines = training(60)
    lines[20] |= {"validation/model/loss": 0.05, "validation/ema/loss": 0.04}
    lines.append({"step": 60, "validation/model/loss": 0.04, "validation/ema/loss": 0.03})
    draw_curves(write(tmp_path, lines), tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png", ORANGE) > 100
    assert pixels(tmp_path / "loss.png", GREEN) > 100


def test_a_high_start_is_cut_off_but_no_validation_loss(tmp_path):
    calm = [{"step": n, "loss": 0.2 + 0.1 * (n % 2)} for n in range(2, 60)]
    overfitted = {"step": 59, "validation/model/loss": 0.9}
    draw_curves(write(tmp_path, calm), tmp_path / "calm.png")
    draw_curves(write(tmp_path, [{"step": 1, "loss": 50.0}, *calm]), tmp_path / "start.png")
    draw_curves(write(tmp_path, [*calm, overfitted]), tmp_path / "overfitted.png")
    inked = [pixels(tmp_path / f"{name}.png", BLUE) for name in ("calm", "start", "overfitted")]
    assert inked[1] > 0.5 * inked[0]
    assert pixels(tmp_path / "overfitted.png", ORANGE, slice(20, 380)) > 30


@pytest.mark.parametrize("losses", [[0.5], [0.5, math.nan, math.inf], [0.0] * 30])
def test_short_and_odd_runs_are_drawn(tmp_path, losses):
    metrics = write(tmp_path, [{"step": n, "loss": loss} for n, loss in enumerate(losses)])
    draw_curves(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_run_without_losses_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no line with a step and a loss"):
        draw_curves(write(tmp_path, [{"step": 1}]), tmp_path / "loss.png")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    metrics = write(tmp_path, training(3))
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(OSError):
        draw_curves(metrics, tmp_path / "loss.png")
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]


def test_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -r requirements-train\.txt"):
        draw_curves(write(tmp_path, training(3)), tmp_path / "loss.png")


def test_an_incomplete_last_line_is_left_out_and_any_other_is_an_error(tmp_path):
    path = write(tmp_path, training(3), tail='{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    for damaged in (b"nonsense", b"\xff\xfe"):
        path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n')
        with pytest.raises(ValueError, match=r"jsonl, line 2, is no JSON object"):
            read_metrics(path)


def test_repeated_steps_replace_the_earlier_ones(tmp_path):
    first = [{"step": n, "loss": 1.0} for n in (10, 20, 30, 40)]
    again = [{"step": n, "loss": 2.0} for n in (25, 35)]
    lines = read_metrics(write(tmp_path, first + again))
    assert [(line["step"], line["loss"]) for line in lines] == [
        (10, 1.0), (20, 1.0), (25, 2.0), (35, 2.0),
    ]  # fmt: skip


def test_smoothing_keeps_a_slope_and_reduces_noise():
    slope = [float(n) for n in range(200)]
    assert smoothed(slope)[:190] == pytest.approx(slope[:190])
    noise = [(-1.0) ** n for n in range(200)]
    assert max(map(abs, smoothed(noise)[10:])) < 0.25
    holes = [1.0, math.nan, *[1.0] * 198]
    assert smoothed(holes)[2:] == [1.0] * 198
    assert math.isnan(smoothed([math.nan])[0])


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, localdit.training.reporting; print('matplotlib' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
