import json
import math
import os
from pathlib import Path

import pytest
import torch

from localdit.training.run import Metrics, RunFolder, require_finite, whole_folder


def test_settings_are_written_and_a_used_folder_is_refused(tmp_path):
    run = RunFolder(tmp_path / "new/run")
    run.create({"seed": 3, "output": Path("x")})
    assert json.loads((run.path / "config.json").read_text()) == {"seed": 3, "output": "x"}
    with pytest.raises(FileExistsError, match="not empty"):
        run.create({})


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def write(fail):
        with whole_folder(tmp_path / "a") as folder:
            (folder / "one").write_text("1")
            assert not (tmp_path / "a").exists()
            if fail:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(fail=True)
    assert os.listdir(tmp_path) == []
    write(fail=False)
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["one"]


def test_metrics_are_means_since_the_last_line():
    metrics = Metrics(images_per_step=8)
    metrics.add(1.0, 0.5)
    metrics.add(3.0, 1.5)
    line = metrics.collect()
    assert (line["loss"], line["grad_norm"]) == (2.0, 1.0)
    assert line["images_per_second"] > 0
    metrics.add(5.0, 0.0)
    assert metrics.collect()["loss"] == 5.0


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_stops_the_run(loss, norm):
    with pytest.raises(FloatingPointError, match="Step 7"):
        require_finite(7, torch.tensor(loss), torch.tensor(norm))


def test_overflowing_scaled_gradients_are_the_scalers_business():
    require_finite(7, torch.tensor(1.0), torch.tensor(math.inf), scaled=True)
    with pytest.raises(FloatingPointError):
        require_finite(7, torch.tensor(math.nan), torch.tensor(math.inf), scaled=True)
