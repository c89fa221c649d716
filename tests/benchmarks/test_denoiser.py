import json
import subprocess
import sys

import pytest

from benchmarks import denoiser
from benchmarks.worker import ROOT, WorkerError, decode

from . import made_up

MACHINE = {"device": "cpu", "machine": "a processor", "versions": {"torch": "2.13.0"}}


@pytest.fixture
def workers(monkeypatch):
    """Record the worker processes instead of starting them, and return made-up results."""
    started = []

    def start(name, **arguments):
        started.append(name)
        if name == "provenance:describe":
            return dict(MACHINE)
        if name == "worker:times":
            return made_up.times(decode(arguments["case"]))
        return made_up.memory(arguments["layers"])

    monkeypatch.setattr(denoiser, "in_own_process", start)
    monkeypatch.setattr("benchmarks.plot.draw", lambda records, png: png.touch())  # slow
    return started


def load(folder):
    return json.loads((folder / "denoiser_000.json").read_text(encoding="utf-8"))


def test_every_combination_is_measured(workers, tmp_path, capsys):
    command = "--pixels 64 128 --dtype float32 bfloat16 --task inference training --depth own equal"
    assert denoiser.main([*command.split(), "--output", str(tmp_path)]) == 0
    content = load(tmp_path)
    cases = {
        (case["pixels"], case["dtype"], case["task"], case["depth"])
        for case in (record["case"] for record in content["cases"])
    }
    assert len(cases) == 16 == len(content["cases"])
    assert workers.count("worker:times") == 16
    assert (
        workers.count("worker:memory") == 8 * 4 + 8 * 2
    )  # own depths are derived from two models each
    assert content["about"]["command"].endswith(f"--output {tmp_path}")
    assert (tmp_path / "denoiser_000.png").exists()
    page = (tmp_path / "denoiser_000.md").read_text(encoding="utf-8")
    assert page.split("\n\n")[0] in capsys.readouterr().out


def test_both_contexts_share_pixarts_turns(workers, tmp_path):
    denoiser.main(["--pixels", "64", "--context", "local", "global", "--output", str(tmp_path)])
    (record,) = load(tmp_path)["cases"]
    assert list(record["results"]) == ["LocalDiT", "LocalDiT with global context", "PixArt"]
    assert len(record["summary"]["ratios"]) == 2


def test_each_rival_is_compared_with_the_localdit_of_its_latents(workers, tmp_path):
    sizes = ["--pixels", "64", "128", "--output", str(tmp_path)]
    denoiser.main(["--against", "pixart", "sana", *sizes])
    content = load(tmp_path)
    names = [list(record["results"]) for record in content["cases"]]
    assert names == 2 * [["LocalDiT", "PixArt"]] + 2 * [["LocalDiT f32", "Sana-0.6B"]]
    assert [list(record["summary"]["ratios"]) for record in content["cases"][1:3]] == [
        ["LocalDiT"], ["LocalDiT f32"],
    ]  # fmt: skip
    tokens = {row["model"]: row["tokens"] for row in content["exponents"]}
    assert tokens["PixArt"] == [16, 64] and tokens["Sana-0.6B"] == [4, 16]
    assert "Sana-0.6B | 2 |" in (tmp_path / "denoiser_000.md").read_text(encoding="utf-8")


def test_localdits_of_any_latents_are_compared_with_sana(workers, tmp_path):
    options = "--pixels 64 --against sana --context local f32 --output"
    denoiser.main([*options.split(), str(tmp_path)])
    (record,) = load(tmp_path)["cases"]
    assert list(record["results"]) == ["LocalDiT", "LocalDiT f32", "Sana-0.6B"]
    assert list(record["summary"]["ratios"]) == ["LocalDiT", "LocalDiT f32"]


def test_an_interrupted_run_keeps_its_results(workers, tmp_path, monkeypatch, capsys):
    start = denoiser.in_own_process

    def interrupted(name, **arguments):
        if arguments.get("case", {}).get("pixels") == 256:
            raise KeyboardInterrupt
        return start(name, **arguments)

    monkeypatch.setattr(denoiser, "in_own_process", interrupted)
    assert denoiser.main(["--pixels", "64", "128", "256", "--output", str(tmp_path)]) == 130
    assert [record["case"]["pixels"] for record in load(tmp_path)["cases"]] == [64, 128]
    assert "interrupted" in capsys.readouterr().err


def test_a_failed_case_does_not_stop_the_others(workers, tmp_path, monkeypatch):
    start = denoiser.in_own_process

    def killed(name, **arguments):
        if arguments.get("case", {}).get("pixels") == 128:
            raise WorkerError("killed by signal 9")
        return start(name, **arguments)

    monkeypatch.setattr(denoiser, "in_own_process", killed)
    assert denoiser.main(["--pixels", "64", "128", "256", "--output", str(tmp_path)]) == 1
    errors = [record.get("error") for record in load(tmp_path)["cases"]]
    assert errors == [None, "killed by signal 9", None]


def test_results_are_never_overwritten(workers, tmp_path):
    for _ in range(2):
        denoiser.main(["--pixels", "64", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "denoiser_000.json",
        "denoiser_001.json",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pixels", "100"], "100 given; expected a multiple of 16"),
        (["--pixels", "48", "--against", "sana"], "48 given; LocalDiT f32 needs a multiple of 32"),
        (["--pixels", "many"], "'many' given; expected a whole number"),
        (["--measured-layers", "0"], "0 given; expected at least 1"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--output", "/dev/null/folder"], "can't write to the output folder"),
    ],
)
def test_an_error_in_the_command_is_one_line_and_status_2(options, message, workers, capsys):
    with pytest.raises(SystemExit) as exit:
        denoiser.main(options)
    assert exit.value.code == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out
    assert not workers


@pytest.mark.parametrize("module", ["denoiser", "breakdown"])
def test_help_loads_nothing_heavy(module):
    code = (
        f"import sys, benchmarks.{module} as m; m.build_parser(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_command_measures(tmp_path):
    options = "--pixels 64 --layers 1 --repeats 2 --warm-up 1 --device cpu --output"
    command = [sys.executable, "-m", "benchmarks.denoiser", *options.split(), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (record,) = load(tmp_path)["cases"]
    raw = {name: found["runs"][0]["seconds"] for name, found in record["results"].items()}
    ratios = [a / b for a, b in zip(raw["PixArt"], raw["LocalDiT"], strict=True)]
    assert record["summary"]["ratios"]["LocalDiT"]["highest"] == max(ratios)
    memory = record["summary"]["models"]["PixArt"]["memory"]
    assert memory["total"] == memory["weights"] + memory["beside"]
    assert 2**27 < memory["total"] < 2**29
