"""Bytes of files and of parts of files."""

import pickle

import pytest

from localdit.training.data.samples import Blob, Sample


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
