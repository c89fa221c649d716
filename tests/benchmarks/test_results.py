import pytest

from benchmarks.cases import PIXART, Case
from benchmarks.results import cost, curve, exponents, groups, summary

from . import made_up

CASE = Case(pixels=512, layers=2, repeats=3)


def test_costs_at_equal_depth_are_the_measured_ones():
    found = made_up.record(CASE)["summary"]["models"]["PixArt"]
    blocks = [2 * 4.0**2 * (1 + turn / 10) for turn in range(3)]
    assert found["obtained"] == "measured"
    assert found["seconds"] == pytest.approx(
        {"median": 0.5 + blocks[1], "lowest": 0.5 + blocks[0], "highest": 0.5 + blocks[2]}
    )
    assert found["memory"] == {"total": 1400 + 400, "weights": 1400, "beside": 400}
    assert found["error"] is None


def test_costs_at_own_depth_are_derived_and_say_so():
    case = Case(pixels=256, depth="own", layers=1, repeats=1)
    models = made_up.record(case)["summary"]["models"]
    assert models["PixArt"]["obtained"] == "derived from 0 and 1 layers"
    assert models["LocalDiT"]["obtained"] == "derived from 0 and 4 layers"
    assert models["PixArt"]["seconds"]["median"] == pytest.approx(0.5 + 28)
    assert models["LocalDiT"]["seconds"]["median"] == pytest.approx(0.5 + 18)


def test_inference_holds_all_weights_and_the_activations_of_one_block():
    case = Case(pixels=256, depth="own", layers=1, repeats=1)
    memory = made_up.record(case)["summary"]["models"]["PixArt"]["memory"]
    assert memory == {"total": 6600 + 350, "weights": 1000 + 28 * 200, "beside": 300 + 50}


def test_training_holds_the_activations_of_all_blocks():
    case = Case(pixels=256, task="training", depth="own", layers=1, repeats=1)
    memory = made_up.record(case)["summary"]["models"]["PixArt"]["memory"]
    assert memory["beside"] == 300 + 28 * 50


def test_ratios_follow_from_the_raw_times():
    record = made_up.record(CASE)
    raw = {name: result["runs"][0]["seconds"] for name, result in record["results"].items()}
    ratios = sorted(a / b for a, b in zip(raw["PixArt"], raw["LocalDiT"], strict=True))
    assert record["summary"]["ratios"] == {
        "LocalDiT": {"median": ratios[1], "lowest": ratios[0], "highest": ratios[2]}
    }


def test_compile_time_is_the_first_call_minus_the_median():
    assert made_up.record(CASE)["summary"]["models"]["PixArt"]["compile_seconds"] is None
    compiled = made_up.record(Case(pixels=512, mode="compiled", repeats=3))
    assert compiled["summary"]["models"]["PixArt"]["compile_seconds"] == pytest.approx(10)


def test_a_model_that_ran_out_of_memory_has_no_costs():
    results = made_up.times(CASE)
    results["PixArt"]["runs"] = [{"layers": 2, "seconds": [], "error": "out of memory"}]
    found = summary(CASE, results)
    assert found["ratios"] == {}
    assert found["models"]["PixArt"]["error"] == "out of memory"
    assert found["models"]["PixArt"]["seconds"] is None
    assert found["models"]["LocalDiT"]["seconds"]["median"] > 0


def test_running_out_of_memory_is_reported():
    run = {"layers": 2, "seconds": [1.0], "first_call": 1.0, "memory": {"error": "out of memory"}}
    assert cost(CASE, PIXART, [run])["memory"] == {"error": "out of memory"}


def test_curves_join_cases_that_differ_only_in_size():
    sizes = made_up.records(CASE, [512, 256])
    other = made_up.record(Case(pixels=256, dtype="bfloat16"))
    found = groups([*sizes, other, {"case": {}, "error": "killed"}])
    assert [len(members) for members in found.values()] == [2, 1]
    points = curve(sizes, "LocalDiT", "seconds", "lowest")
    assert points == [(256, 0.5 + 2), (1024, 0.5 + 2 * 4)]


def test_exponents_match_the_growth():
    linear, quadratic = exponents(made_up.records(CASE, [2048, 4096]))
    assert (linear["model"], quadratic["model"]) == ("LocalDiT", "PixArt")
    assert linear["seconds"] == pytest.approx(1, abs=0.02)
    assert quadratic["seconds"] == pytest.approx(2, abs=0.001)
    assert linear["tokens"] == [16384, 65536]
    assert exponents(made_up.records(CASE, [512])) == []
