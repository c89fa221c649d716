import pytest

from benchmarks.cases import Case
from benchmarks.worker import WorkerError, decode, encode, in_own_process


def test_encoding_a_case_is_reversible():
    case = Case(pixels=64, depth="own", layers=None, contexts=("local", "global"))
    assert decode(encode(case)) == case


def test_a_failing_process_raises(capfd):
    with pytest.raises(WorkerError, match="failed with status 1"):
        in_own_process("worker:nothing")
    assert "AttributeError" in capfd.readouterr().err
