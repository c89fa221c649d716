"""What a tokenizer does not know of a text, and the messages that tell it."""

import json
import string

import pytest
import transformers

from localdit.core.encoders import text_encoder_whole_words
from localdit.core.vocabulary import (
    unknown_message,
    unknown_pieces,
    unknown_words,
    unknown_words_message,
)
from localdit.utils import model_in_the_box
from tests.tiny import tiny_pipeline, tiny_tokenizer


@pytest.mark.parametrize(
    ("texts", "pieces"),
    [
        ([], {}),
        (["", " a RED circle\n"], {}),
        ("日本の猫", {"日本の猫": 1}),
        (["a large red 😀", "red 😀, é #@"], {"😀": 2, "é": 1, "#@": 1}),
    ],
)
def test_unknown_pieces_of_text_are_counted(texts, pieces):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_in_the_box() / "tokenizer")
    assert unknown_pieces(tokenizer, texts) == pieces


def test_tokenizers_without_offsets_tell_unknown_pieces_too():
    class Slow:
        is_fast, unk_token_id = False, 2
        tokenize = staticmethod(lambda text: ["\u2581" + word for word in text.split()])
        convert_tokens_to_ids = staticmethod(lambda words: [2 if len(w) > 4 else 7 for w in words])

    assert unknown_pieces(Slow(), ["a zebra", "a cat"]) == {"zebra": 1}


def test_tokenizers_that_know_everything_have_no_unknown_pieces():
    assert unknown_pieces(type("Bytes", (), {"unk_token_id": None})(), "日本") == {}


def test_a_message_names_the_first_unknown_pieces():
    message = unknown_message({"日本": 2, **{f"zebra {i}": 1 for i in range(11)}})
    assert "does not know 13 pieces" in message
    assert "'日本' (2 times), 'zebra 0', " in message
    assert message.endswith("'zebra 8' and 2 more.")


def spelling_tokenizer(*words):
    """A tokenizer of whole words, as in the box: it spells others, and knows no capitals."""
    pieces = [*words, "\u2581", *string.ascii_lowercase, *string.digits, *".,;:!?-'\"()/&"]
    vocabulary = ["<pad>", "</s>", "<unk>", *pieces]
    scores = [(piece, -1.0 if piece in words else -20.0) for piece in vocabulary]
    return transformers.T5TokenizerFast(vocab=scores, extra_ids=0)


@pytest.mark.skipif(transformers.__version__ < "5", reason="T5TokenizerFast takes no vocabulary")
@pytest.mark.parametrize(
    ("texts", "unknown"),
    [
        ([], []),
        (["", "  "], []),
        (["A red circle, at the top-left.", "a red circle (a circle)"], ["(a"]),
        (["a shiny red gem.", "gem; a red, shiny circle"], ["shiny", "gem"]),
        (["circles", "red-shiny circle b & 2 -"], ["circles", "red-shiny", "b", "2"]),
        (["red\U0001f534 \u65e5\u672c circle ..."], ["red\U0001f534", "\u65e5\u672c"]),
    ],
)
def test_words_that_are_not_one_token_are_unknown(texts, unknown):
    known = "\u2581a \u2581red \u2581circle \u2581at \u2581the \u2581top left"
    assert unknown_words(spelling_tokenizer(*known.split()), texts) == unknown


def test_unknown_words_are_those_that_become_the_unknown_token():
    assert unknown_words(tiny_tokenizer(), ["a zebra,", "A cat, zebra!"]) == ["zebra"]


def test_a_message_names_the_first_unknown_words():
    expected = "The model does not know this word and ignores it: shiny"
    assert unknown_words_message(["shiny"]) == expected
    message = unknown_words_message(["\x1b[31m", *(f"word{i}" for i in range(11))])
    assert message.startswith(r"The model does not know these words and ignores them: \x1b[31m, ")
    assert message.endswith("word8 and 2 more")


def test_the_index_beside_a_text_encoder_says_whether_it_knows_whole_words_alone(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "own")
    (tmp_path / "result").mkdir()
    link = tmp_path / "result/text_encoder"
    link.symlink_to(tmp_path / "own/text_encoder")
    index = tmp_path / "own/model_index.json"

    def said(source):
        return text_encoder_whole_words({"text_encoder": str(source)})

    places = (tmp_path / "own", tmp_path / "own/text_encoder", link)
    assert [said(place) for place in places] == [False] * 3
    index.write_text(json.dumps(json.loads(index.read_text()) | {"whole_words": True}))
    assert [said(place) for place in places] == [True] * 3
    (tmp_path / "result/model_index.json").write_text('{"whole_words": false}')
    assert said(link) is False
    index.write_text(json.dumps(json.loads(index.read_text()) | {"whole_words": 1}))
    with pytest.raises(TypeError, match=r"model_index\.json: whole_words is 1; expected true or"):
        said(tmp_path / "own")
    index.unlink()
    assert said(tmp_path / "own/text_encoder") is False
