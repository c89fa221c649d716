import json

import pytest

from benchmarks import tables
from benchmarks.cases import Case
from benchmarks.worker import encode

from . import made_up

ABOUT = {
    "command": "python -m benchmarks.denoiser",
    "machine": "2 threads of a processor",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789",
    "date": "2026-11-24",
    "options": {"batch_size": 1, "text_tokens": 120, "repeats": 3, "warm_up": 1},
}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_case_has_a_row_per_model():
    rows = tables.rows(made_up.record(Case(pixels=256, layers=2, repeats=3)))
    localdit, pixart = (dict(zip(tables.COLUMNS, cells(row), strict=True)) for row in rows)
    assert localdit["pixels"] == "256 x 256"
    assert localdit["seconds (lowest to highest)"] == "2.70 (2.50 to 2.90)"
    assert localdit["other : LocalDiT"] == "1.00 (1.00 to 1.00)"
    assert (pixart["model"], pixart["other : LocalDiT"]) == ("PixArt", "1")


def test_derived_costs_say_so():
    rows = tables.rows(made_up.record(Case(pixels=256, depth="own", layers=1, repeats=3)))
    assert cells(rows[0])[6] == "18, derived from 0 and 4 layers"
    assert cells(rows[1])[6] == "28, derived from 0 and 1 layers"


def test_a_failed_case_is_a_row_with_its_error():
    case = Case(pixels=256)
    (row,) = tables.rows({"case": encode(case), "tokens": 256, "error": "killed by signal 9"})
    assert len(cells(row)) == len(tables.COLUMNS)
    assert "killed by signal 9" in row


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")],
)
def test_seconds_have_three_digits(value, shown):
    assert tables.seconds(value) == shown


def test_the_page_states_machine_versions_commit_and_date(tmp_path):
    records = made_up.records(Case(pixels=256, repeats=3), [256, 512])
    tables.save(tmp_path / "denoiser_000", ABOUT, records)
    page = (tmp_path / "denoiser_000.md").read_text(encoding="utf-8")
    for stated in (ABOUT["command"], ABOUT["machine"], "torch 2.13.0", "0123456789", "2026-11-24"):
        assert stated in page
    assert "Attention kernel of PixArt: made up" in page
    content = json.loads((tmp_path / "denoiser_000.json").read_text(encoding="utf-8"))
    assert content["about"] == ABOUT and len(content["cases"]) == 2
    assert [row["model"] for row in content["exponents"]] == ["LocalDiT", "PixArt"]
    assert not list(tmp_path.glob(".*"))
