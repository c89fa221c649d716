"""From listings to samples, in order, whatever is broken on the way."""

import sys
import warnings

import pytest

from localdit.training.data import candidates
from localdit.training.data.candidates import CHUNK, MANY, Candidate, examine
from localdit.training.data.captions import CaptionFile
from localdit.training.data.faults import Fault
from localdit.training.data.samples import Blob, Sample
from tests.training.data.drawn import picture_bytes, png_claiming


def test_order_is_kept_and_faults_are_counted(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture_bytes(height=20, width=30))
    picture, gone = Blob(str(path)), Blob(str(tmp_path / "gone"))
    listing = []
    for number in range(3 * CHUNK):
        listing += [
            Candidate(f"{number}", picture, f"caption {number}"),
            Candidate(f"{number} missing", gone, "a"),
            Candidate(f"{number} silent", picture, ""),
            Candidate(f"{number} unreadable", picture, CaptionFile("txt", gone)),
            Fault("duplicate", f"{number} again"),
        ]
    samples, faults = examine(listing)
    assert samples == [
        Sample(f"{number}", picture, (f"caption {number}",), 20, 30) for number in range(3 * CHUNK)
    ]
    kinds = ("missing", "no caption", "unreadable", "duplicate")
    assert faults.counts == dict.fromkeys(kinds, 3 * CHUNK)
    assert [fault.id for fault in faults.examples["missing"]][:2] == ["0 missing", "1 missing"]


def test_nothing():
    samples, faults = examine([])
    assert (samples, faults.total) == ([], 0)


def test_no_warnings_of_large_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(png_claiming(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, faults = examine([Candidate("a", Blob(str(tmp_path / "a.png")), "a")])
    assert faults.counts == {"too large": 1}


@pytest.mark.parametrize(
    ("number", "progress", "shown"),
    [
        (MANY, True, True),
        (MANY, False, False),
        (MANY - 1, True, False),
    ],
)
def test_a_progress_bar_where_there_are_many(number, progress, shown, capsys, monkeypatch):
    monkeypatch.setattr(candidates, "_examine", lambda candidate: Fault("empty", candidate.id))
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        examine([Candidate("a", Blob("a"), "a")] * number, progress)
        assert ("Looking at the data" in capsys.readouterr().err) == (shown and terminal)
