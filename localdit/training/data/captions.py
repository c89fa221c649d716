"""Captions as they are stored, and the checks on them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from localdit.core.text import MAX_PROMPT_CHARACTERS
from localdit.training.data.samples import Blob, BrokenSample

# In order of preference, among the files beside a picture and the keys of a JSON object.
CAPTION_SUFFIXES = ("txt", "caption", "json")
CAPTION_KEYS = ("text", "caption", "captions", "prompt")
MAX_FILE_BYTES = 1_000_000


class CaptionFile(NamedTuple):
    """A stored caption: the suffixes "txt" and "caption" stand for plain text, "json" for JSON."""

    suffix: str
    blob: Blob


def read_captions(source: object) -> tuple[str, ...]:
    """Return the captions of a picture.

    Args:
        source: a caption; a list of captions; an object with them under one of `CAPTION_KEYS`; or
            a file with any of these.

    Returns:
        At least one caption, each stripped, in their order, without duplicates.

    Raises:
        BrokenSample: "no caption" or "bad caption".
    """
    if isinstance(source, CaptionFile):
        source = _read_file(source)
    if isinstance(source, dict):
        source = next((source[key] for key in CAPTION_KEYS if key in source), None)
    texts = source if isinstance(source, list) else [source]
    captions = dict.fromkeys(_clean(text) for text in texts if text is not None)
    captions.pop("", None)
    if not captions:
        raise BrokenSample("no caption")
    return tuple(captions)


def _read_file(file: CaptionFile) -> Any:
    path, offset, size = file.blob
    limit = MAX_FILE_BYTES + 1
    data = Blob(path, offset, limit if size is None else min(size, limit)).read()
    if len(data) == limit:
        raise BrokenSample("bad caption", f"the file has more than {MAX_FILE_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text) if file.suffix == "json" and text.strip() else text
    except UnicodeDecodeError as error:
        raise BrokenSample("bad caption", "it is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BrokenSample("bad caption", f"the file is not JSON: {error}") from error


def _clean(text: object) -> str:
    if not isinstance(text, str):
        raise BrokenSample("bad caption", f"it is of type {type(text).__name__}, expected text")
    text = text.strip()
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise BrokenSample(
            "bad caption", f"it has {len(text):,} characters, more than {MAX_PROMPT_CHARACTERS:,}"
        )
    if not is_unicode(text):
        raise BrokenSample("bad caption", "it has half of a surrogate pair")
    return text


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded; half surrogate pairs, which JSON may hold, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
