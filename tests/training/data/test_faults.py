"""Counting broken samples, and stopping at too many."""

import pytest

from localdit.training.data.faults import (
    EXAMPLES,
    KINDS,
    BrokenSample,
    Fault,
    Faults,
    require_few,
)


def test_counts_by_kind_with_the_first_as_examples():
    faults = Faults([Fault("empty", f"{number}.png") for number in range(1000)])
    faults.add(Fault("truncated", "cut.jpg"))
    assert faults.counts == {"empty": 1000, "truncated": 1}
    assert faults.total == 1001
    assert [fault.id for fault in faults.examples["empty"]] == [
        f"{number}.png" for number in range(EXAMPLES)
    ]
    first, second = str(faults).splitlines()
    assert first == "1,000 empty (zero bytes): 0.png, 1.png, 2.png, ..."
    assert second.startswith("1 truncated (")
    assert second.endswith("): cut.jpg")


def test_no_faults():
    assert Faults().total == 0
    assert str(Faults()) == ""
    require_few(Faults(), 0, 0.0)


def test_a_broken_sample_explains_itself():
    assert str(BrokenSample("empty")) == KINDS["empty"]
    broken = BrokenSample("damaged", "bad Huffman code")
    assert (broken.kind, broken.detail, str(broken)) == ("damaged", *["bad Huffman code"] * 2)
    with pytest.raises(AssertionError):
        BrokenSample("odd")


def test_the_threshold():
    faults = Faults(Fault("empty", str(number)) for number in range(10))
    require_few(faults, 90, 0.1)
    require_few(faults, 0, 1.0)
    with pytest.raises(ValueError, match=r"10 of 99 samples are broken, 10\.1%") as raised:
        require_few(faults, 89, 0.1)
    assert "--max-broken" in str(raised.value)
    assert "10 empty (zero bytes): 0, 1, 2, ..." in str(raised.value)
    with pytest.raises(ValueError, match=r"1 of 1,000"):
        require_few(Faults([Fault("empty", "a")]), 999, 0.0)
