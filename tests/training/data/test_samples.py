"""Bytes of files and of parts of files."""

import pickle
import threading
import time

import pytest

from localdit.training.data.samples import (
    EXAMPLES,
    KINDS,
    THREADS,
    Blob,
    BrokenSample,
    Fault,
    Faults,
    Sample,
    map_reads,
    require_few,
)


def test_a_blob_is_a_file_or_a_part_of_one(tmp_path):
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    assert Blob(str(path)).read() == b"0123456789"
    assert Blob(str(path), 3).read() == b"3456789"
    assert Blob(str(path), 3, 4).read() == b"3456"
    assert Blob(str(path), 8, 4).read() == b"89"
    assert Blob(str(path), 3, 0).read() == b""
    with pytest.raises(FileNotFoundError):
        Blob(str(tmp_path / "gone")).read()


def test_a_sample_can_be_sent_to_a_worker_and_not_be_changed():
    sample = Sample("a", Blob("a.png", 1, 2), ("red", "blue"), 3, 4)
    assert pickle.loads(pickle.dumps(sample)) == sample
    with pytest.raises(AttributeError):
        sample.height = 5


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


def threads_of(function, number):
    seen = []

    def record(item):
        seen.append(threading.get_ident())
        function()
        return -item

    assert list(map_reads(record, range(number))) == [-item for item in range(number)]
    return len({*seen})


def test_waiting_is_done_together():
    start = time.perf_counter()
    assert 1 < threads_of(lambda: time.sleep(0.01), 160) <= THREADS + 1
    assert time.perf_counter() - start < 0.8  # 1.6 s one after the other


def test_work_is_done_alone():
    assert threads_of(lambda: sum(range(50_000)), 20) == 1


def test_nothing():
    assert list(map_reads(str, [])) == []
