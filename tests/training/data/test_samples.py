"""Tests of samples: their bytes, their captions, and the counts of broken ones."""

import json
import pickle
import threading
import time

import pytest

from localdit.core.text import MAX_PROMPT_CHARACTERS
from localdit.training.data.samples import (
    EXAMPLES,
    KINDS,
    MAX_FILE_BYTES,
    THREADS,
    Blob,
    BrokenSample,
    CaptionFile,
    Fault,
    Faults,
    Sample,
    caption_files,
    map_reads,
    read_captions,
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


def test_a_sample_can_be_pickled_and_is_frozen():
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
    faults = Faults([Fault("damaged", "a.png", "bad Huffman code"), Fault("damaged", "b.png", "?")])
    assert str(faults).endswith("): a.png, b.png; a.png: bad Huffman code")


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


def test_the_threshold_of_broken_samples():
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


def test_waiting_is_done_in_threads():
    start = time.perf_counter()
    assert 1 < threads_of(lambda: time.sleep(0.01), 160) <= THREADS + 1
    assert time.perf_counter() - start < 0.8  # 1.6 s one after the other


def test_work_is_done_in_one_thread():
    assert threads_of(lambda: sum(range(50_000)), 20) == 1


def test_nothing():
    assert list(map_reads(str, [])) == []


def caption_file(tmp_path, suffix, content):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return CaptionFile(suffix, Blob(str(path)))


@pytest.mark.parametrize(
    ("source", "captions"),
    [
        (" a bear\n", ("a bear",)),
        (["a bear", "Bär ", "a bear", "", None], ("a bear", "Bär")),
        ({"caption": "two", "text": "one"}, ("one",)),
        ({"caption": ["two", "three"]}, ("two", "three")),
        ({"captions": ["two"], "other": 5}, ("two",)),
        ({"prompt": "p"}, ("p",)),
        ({"text": None, "caption": "two"}, ("two",)),
        ({"text": " \n", "caption": [None, ""], "captions": ["three"]}, ("three",)),
        ("x" * MAX_PROMPT_CHARACTERS, ("x" * MAX_PROMPT_CHARACTERS,)),
    ],
)
def test_values(tmp_path, source, captions):
    assert read_captions(source) == captions
    assert read_captions(caption_file(tmp_path, "json", json.dumps(source))) == captions


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (None, "no caption"),
        (" \n", "no caption"),
        ([], "no caption"),
        ([None, ""], "no caption"),
        ({"title": "a"}, "no caption"),
        ({"text": None}, "no caption"),
        (5, "bad caption"),
        (["a", 5], "bad caption"),
        ({"text": {"de": "Bär"}}, "bad caption"),
        ("x" * (MAX_PROMPT_CHARACTERS + 1), "bad caption"),
        ("half \ud83d", "bad caption"),
        ("zero \0 byte", "bad caption"),
    ],
)
def test_values_that_are_none(tmp_path, source, kind):
    for place in (source, caption_file(tmp_path, "json", json.dumps(source))):
        with pytest.raises(BrokenSample) as raised:
            read_captions(place)
        assert raised.value.kind == kind


@pytest.mark.parametrize("empty", [b"", b" \n", b"\xef\xbb\xbf"])
def test_a_second_file_counts_when_the_first_is_empty(tmp_path, empty):
    files = {
        "json": caption_file(tmp_path, "json", '{"text": "", "caption": "third"}').blob,
        "txt": caption_file(tmp_path, "txt", empty).blob,
    }
    assert read_captions(caption_files(files)) == ("third",)
    files["caption"] = caption_file(tmp_path, "caption", "second").blob
    assert read_captions(caption_files(files)) == ("second",)
    files["txt"] = caption_file(tmp_path, "txt", "first").blob
    assert read_captions(caption_files(files)) == ("first",)
    assert caption_files({"cls": files["txt"]}) is None


def test_the_keys_that_lie_there_are_named():
    with pytest.raises(BrokenSample, match="its keys are title, width, expected text or caption"):
        read_captions({"title": "a", "width": 5})


def test_captions_in_other_encodings(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        file = caption_file(tmp_path, "txt", "Bär\r\n".encode(encoding))
        assert read_captions(file) == ("Bär",)
    for data in ("Bär".encode("latin-1"), "Bär".encode("utf-16-le")):
        with pytest.raises(BrokenSample, match="is not UTF-8 text"):
            read_captions(caption_file(tmp_path, "txt", data))


def test_a_text_file_is_one_caption(tmp_path):
    for suffix in ("txt", "caption"):
        both = caption_file(tmp_path, suffix, "\ufeffone\ntwo\n")
        assert read_captions(both) == ("one\ntwo",)


@pytest.mark.parametrize(
    ("suffix", "content", "kind"),
    [
        ("txt", b"", "no caption"),
        ("json", b"", "no caption"),
        ("txt", "Bär".encode("latin-1"), "bad caption"),
        ("txt", b"x" * (MAX_FILE_BYTES + 1), "bad caption"),
        ("json", b"{", "bad caption"),
        ("json", b"[" * 100_000, "bad caption"),
        ("json", b"a bear", "bad caption"),
    ],
)
def test_files_without_a_caption_are_broken(tmp_path, suffix, content, kind):
    with pytest.raises(BrokenSample) as raised:
        read_captions(caption_file(tmp_path, suffix, content))
    assert raised.value.kind == kind


def test_a_caption_within_a_tar_ends_where_its_file_ends(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"headera bearfooter")
    assert read_captions(CaptionFile("txt", Blob(str(path), 6, 6))) == ("a bear",)
