"""`localdit bench`: three kinds of attention, in turns."""

import json

import pytest
import torch

from localdit.cli import bench, main
from localdit.models import FullAttnProcessor, LocalAttnProcessor

SMALL = ["--pixels", "64", "--layers", "1", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24}
    monkeypatch.setattr(bench, "SHAPE", bench.SHAPE | shape | {"caption_channels": 8})


def test_each_turn_times_all_models(capsys):
    assert main(["bench", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (result,) = found["results"]
    assert result["pixels"] == 64
    assert list(result["seconds"]) == ["windows", "full attention", "PixArt"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["seconds"].values())
    assert (found["dtype"], found["layers"]) == ("float32", 1)


def test_the_table_names_its_limits(capsys):
    assert main(["bench", *SMALL]) == 0
    said = capsys.readouterr()
    assert sum(line.startswith("    64  ") for line in said.out.splitlines()) == 3
    assert "python -m benchmarks.denoiser" in said.out
    assert said.err == ""


def test_the_models_differ_only_in_their_attention():
    device = torch.device("cpu")
    windows, full, pixart = (
        bench._model(name, 64, 1, device, torch.float32)
        for name in (bench.WINDOWS, bench.FULL, bench.PIXART)
    )
    kinds = [type(m.transformer_blocks[0].attn1.processor) for m in (windows, full)]
    assert kinds == [LocalAttnProcessor, FullAttnProcessor]
    assert type(pixart).__name__ == "PixArtTransformer2DModel"


def test_rows_compare_the_fastest():
    rows = bench._rows(64, {"windows": [1.0, 2.0], "full attention": [], "PixArt": [8.0, 2.0]})
    assert rows[0].split() == ["64", "windows", "1", "(2)", "1.00"]
    assert rows[1].split() == ["64", "full", "attention", "out", "of", "memory"]
    assert rows[2].split() == ["64", "PixArt", "2", "(8)", "2.00"]


def test_the_notes_mention_a_busy_machine():
    results = [{"seconds": {"windows": [1.0, 1.2], "full attention": []}}]
    assert "busy" not in bench._notes(results, load=0.1)
    assert "7.5 processes per core" in bench._notes(results, load=7.5)
    results += [{"seconds": {"windows": [1.0, 3.0]}}]
    assert "3.0 times as long" in bench._notes(results, load=0.1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--pixels", "100"],
            "--pixels must be a positive multiple of 16 pixels, got 100; the nearest",
        ),
        (["--repeats", "0"], "--repeats is 0; expected at least 1"),
        (["--device", "cuda:77"], "--device is 'cuda:77'"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err
