import json

import pytest
import torch

from benchmarks import breakdown
from benchmarks.breakdown import LINEARS, PARTS, REST, TEXT, WINDOWS, Clock, time_parts, timed
from benchmarks.cases import LOCALDIT, Case
from benchmarks.runs import make_inputs, make_model
from localdit.models import LocalAttnProcessor


@pytest.fixture
def at(monkeypatch):
    """Set the time that the process clock returns."""
    now = [0.0]
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_part_does_not_count_the_parts_inside_it(at):
    clock = Clock()
    clock.enter(REST)
    at(1)
    with clock.part(TEXT):
        at(3)
        with clock.part(LINEARS):
            at(7)
        at(15)
    at(31)
    clock.leave()
    expected = {REST: 1 + 16, TEXT: 2 + 8, LINEARS: 4}
    assert clock.seconds == dict.fromkeys(PARTS, 0.0) | expected


def test_window_attention_includes_the_parts_inside_it(at):
    clock = Clock()
    with clock.part(WINDOWS):
        at(1)
        with clock.part(LINEARS):
            at(3)
        at(7)
    assert clock.seconds == dict.fromkeys(PARTS, 0.0) | {WINDOWS: 7.0}


def test_a_timed_processor_keeps_its_class_and_attributes():
    processor = LocalAttnProcessor()
    processor._attention_backend = "native"
    twin = timed(processor, Clock(), WINDOWS)
    assert isinstance(twin, LocalAttnProcessor)
    assert twin._attention_backend == "native"


@pytest.mark.parametrize("context", [*LOCALDIT])
def test_timing_changes_no_output_and_finds_every_part(context):
    case = Case(pixels=64, text_tokens=8)
    model, inputs = make_model(LOCALDIT[context], 2, case), make_inputs(LOCALDIT[context], case)
    clock = Clock()
    with torch.inference_mode():
        before = model(**inputs)[0]
        for block in model.transformer_blocks:
            time_parts(block, clock)
        after = model(**inputs)[0]
    assert torch.equal(before, after)
    assert all(clock.seconds[part] > 0 for part in PARTS)


def test_shares_sum_to_100_percent(tmp_path, capsys):
    command = "--pixels 64 --text-tokens 8 --repeats 1 --warm-up 1 --device cpu --output"
    assert breakdown.main([*command.split(), str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "breakdown_000.json").read_text())["cases"]
    assert sum(record["percent"].values()) == pytest.approx(100)
    assert sum(record["seconds"][0].values()) == pytest.approx(record["block_seconds"])
    page = (tmp_path / "breakdown_000.md").read_text(encoding="utf-8")
    assert page.split("\n\n")[0] in capsys.readouterr().out
