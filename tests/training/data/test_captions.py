"""What counts as a caption, and where captions are looked for."""

import json

import pytest

from localdit.core.text import MAX_PROMPT_CHARACTERS
from localdit.training.data.samples import (
    MAX_FILE_BYTES,
    Blob,
    BrokenSample,
    CaptionFile,
    read_captions,
)


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
    ],
)
def test_values_that_are_none(tmp_path, source, kind):
    for place in (source, caption_file(tmp_path, "json", json.dumps(source))):
        with pytest.raises(BrokenSample) as raised:
            read_captions(place)
        assert raised.value.kind == kind


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
def test_files_without_a_caption(tmp_path, suffix, content, kind):
    with pytest.raises(BrokenSample) as raised:
        read_captions(caption_file(tmp_path, suffix, content))
    assert raised.value.kind == kind


def test_a_caption_within_a_tar_ends_where_its_file_ends(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"headera bearfooter")
    assert read_captions(CaptionFile("txt", Blob(str(path), 6, 6))) == ("a bear",)
