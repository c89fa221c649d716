"""The words that a model knows: what its folder says of them, and messages about unknown ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import INDEX
from ..errors import FieldTypeError
from ..files import read_json

SHOWN = 10  # unknown pieces or words in a message
SPACE_SIGN = "\u2581"  # SentencePiece's, at the start of a word's first token
CLOSING_MARKS = ".,;:!?)]}'\""  # may follow a word without being part of it


def read_whole_words(folder: Path) -> bool | None:
    """Return `whole_words` of the folder of a pipeline; None if it says nothing."""
    index = folder / INDEX
    value = read_json(index).get("whole_words") if index.is_file() else None
    if not isinstance(value, bool | None):
        raise FieldTypeError(f"{index}: whole_words is {value!r}; expected true or false.")
    return value


def prepare(text: str) -> str:
    """Return a text as tokenizers get it: lower-cased, without spaces around it."""
    return text.lower().strip()


def unknown_pieces(tokenizer: Any, texts: str | Sequence[str]) -> dict[str, int]:
    """Return the pieces of texts that a tokenizer does not know, and how often each occurs.

    The tokenizer turns each of them into the same unknown token: to the model, texts that differ
    in such pieces alone are the same.

    Args:
        texts: prompts or captions. They are lower-cased and stripped, as for encoding, but not cut.

    Returns:
        The number of times by piece, in the order of their first occurrence; {} if all is known.
    """
    texts = [prepare(text) for text in ([texts] if isinstance(texts, str) else texts)]
    unknown = getattr(tokenizer, "unk_token_id", None)
    found: Counter[str] = Counter()
    if unknown is None or not texts:
        return {}
    if tokenizer.is_fast:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans = zip(texts, encoded.offset_mapping, strict=True)
        pieces = [[text[start:end] for start, end in of_one] for text, of_one in spans]
        tokens = encoded.input_ids
    else:  # without offsets; `tokenize` returns unknown pieces unchanged
        pieces = [tokenizer.tokenize(text) for text in texts]
        tokens = [tokenizer.convert_tokens_to_ids(of_one) for of_one in pieces]
    for of_one, ids in zip(pieces, tokens, strict=True):
        found.update(
            piece.strip(f"{SPACE_SIGN} \n\t")
            for piece, number in zip(of_one, ids, strict=True)
            if number == unknown
        )
    return {piece: count for piece, count in found.items() if piece}


def unknown_message(pieces: Mapping[str, int]) -> str:
    """Return one sentence that names unknown pieces of text, as `unknown_pieces` counts them."""
    names = [
        f"{piece[:40]!r}" + (f" ({count} times)" if count > 1 else "")
        for piece, count in pieces.items()
    ]
    count = sum(pieces.values())
    return (
        f"The tokenizer does not know {count} piece{'s' * (count > 1)} of the text, and replaces "
        f"each with the same token: {_first_of(names)}."
    )


def unknown_words(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Return the words of texts that a tokenizer does not hold as one token each.

    To a model whose vocabulary is whole words, all others are letters without a meaning. A word is
    what stands between spaces, without the marks that follow it. Each part of a compound such as
    "top-left" has to be a token.

    Args:
        tokenizer: a Transformers tokenizer. It spells other words, or has one token for them all.
        texts: prompts or captions. They are lower-cased and stripped, as for encoding, but not cut.

    Returns:
        Each word once, in the order of their first occurrence.
    """
    spaced = [word for text in texts for word in prepare(text).split()]
    words = list(dict.fromkeys(word.rstrip(CLOSING_MARKS) or word for word in spaced))
    if not words:
        return []
    encoded = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    return [
        word
        for word, ids in zip(words, encoded, strict=True)
        if unknown in ids or not _holds_parts(word, tokenizer.convert_ids_to_tokens(ids))
    ]


def _holds_parts(word: str, tokens: Sequence[str]) -> bool:
    """Return whether each part of a word, between its marks, is one of the word's tokens."""
    parts = set(re.findall(r"\w+", word))
    if parts and tokens[:1] == [SPACE_SIGN]:  # as a token of its own: single letters follow
        return False
    return parts <= {token.removeprefix(SPACE_SIGN) for token in tokens}


def unknown_words_message(words: Sequence[str]) -> str:
    """Return one sentence that names unknown words of a prompt."""
    names = [repr(word[:40])[1:-1] for word in words]  # no control characters
    what = "these words and ignores them" if len(words) > 1 else "this word and ignores it"
    return f"The model does not know {what}: {_first_of(names)}"


def _first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
