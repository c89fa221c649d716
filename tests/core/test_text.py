import logging
import time

import pytest
import torch

from localdit.core.text import MAX_PROMPT_CHARACTERS, TextSpace, check_prompts, pad_states
from tests.tiny import tiny_components, tiny_tokenizer


def test_one_prompt_becomes_a_list_and_an_empty_prompt_is_one():
    assert check_prompts("a cat") == ["a cat"]
    assert check_prompts(["a", ""]) == ["a", ""]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "empty list"),
        (None, TypeError, "NoneType"),
        (("a", "b"), TypeError, "tuple"),
        (["a", 3], TypeError, r"prompt\[1\] must be a str, got int"),
        (["a", "b" * (MAX_PROMPT_CHARACTERS + 1)], ValueError, r"prompt\[1\] has 10001 characters"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(prompt, error, message):
    with pytest.raises(error, match=message):
        check_prompts(prompt)


def tokenize(tokenizer, texts, max_length):
    """Tokenise as for a pipeline's prompts."""
    return TextSpace(tokenizer, None).tokenize(texts, max_length, warn=True, padding="max_length")


def test_prompts_are_prepared_as_captions_were():
    tokenizer = tiny_tokenizer()
    ids, _ = tokenize(tokenizer, [" A RED Circle", "a red circle"], 8)
    assert torch.equal(ids[0], ids[1])
    assert tokenizer.decode(ids[0]) == "a red circle </s> <pad> <pad> <pad> <pad>"


def test_padding_is_masked_and_does_not_depend_on_the_batch():
    tokenizer = tiny_tokenizer()
    ids, mask = tokenize(tokenizer, ["a cat", "a dog on a lake"], 12)
    alone, alone_mask = tokenize(tokenizer, ["a cat"], 12)
    assert ids.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [3, 6]
    assert torch.equal(ids[:1], alone)
    assert torch.equal(mask[:1], alone_mask)


def test_a_warning_quotes_what_was_cut(caplog):
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenize(tiny_tokenizer(), ["a cat", "a red cat and blue dog"], 5)
    (record,) = caplog.records
    assert "'blue dog'" in record.getMessage()
    assert "6 tokens" in record.getMessage()
    assert "first 4" in record.getMessage()
    assert mask.sum(1).tolist() == [3, 5]
    assert ids[1, -1] == 1  # still ends with </s>


def test_a_prompt_that_just_fits_is_not_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        tokenize(tiny_tokenizer(), ["a red cat dog"], 5)
    assert not caplog.records


def test_a_prompt_of_megabytes_is_refused_before_it_is_tokenised(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe.tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenised"))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="10000000 characters"):
        pipe("word " * 2_000_000)
    with pytest.raises(ValueError, match="negative_prompt has 10000000 characters"):
        pipe("a cat", negative_prompt="word " * 2_000_000)
    assert time.perf_counter() - start < 2


def test_encode_prompt_repeats_each_row_for_its_pictures(pipe):
    single = pipe.encode_prompt(["a cat", "a dog"], negative_prompt=["bad", "blurry"])
    double = pipe.encode_prompt(
        ["a cat", "a dog"], negative_prompt=["bad", "blurry"], num_images_per_prompt=2
    )
    assert single[0].shape == (2, 120, 16)
    for one, two in zip(single, double, strict=True):
        assert torch.equal(two, one[[0, 0, 1, 1]])


def test_one_negative_prompt_serves_all(pipe):
    shared = pipe.encode_prompt(["a cat", "a dog"], negative_prompt="bad")
    each = pipe.encode_prompt(["a cat", "a dog"], negative_prompt=["bad", "bad"])
    for one, other in zip(shared, each, strict=True):
        torch.testing.assert_close(one, other)
    nothing = pipe.encode_prompt("a cat", negative_prompt=None)[2]
    assert torch.equal(nothing, pipe.encode_prompt("a cat", negative_prompt="")[2])


def test_without_guidance_nothing_negative_is_encoded(pipe):
    assert pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[2:] == (None, None)


def test_prompts_and_negative_prompts_must_match_in_number(pipe):
    with pytest.raises(ValueError, match="4 prompts but 2 negative prompts"):
        pipe.encode_prompt(["a", "b", "c", "d"], negative_prompt=["x", "y"])
    with pytest.raises(TypeError, match="NoneType"):
        pipe.encode_prompt(None)


CAPTIONS = ["", "a red circle", "A Blue Star above the lake ", "a cat"]


@pytest.fixture(scope="module")
def parts():
    return tiny_components()


@pytest.fixture
def text(parts):
    return TextSpace(parts["tokenizer"], parts["text_encoder"])


def test_captions_are_encoded_as_the_pipeline_encodes_prompts(parts, text):
    from localdit import LocalDiTPipeline

    states, mask = text.encode_batch(CAPTIONS, 120)
    expected, expected_mask, _, _ = LocalDiTPipeline(**parts).encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False
    )
    length = states.shape[1]
    assert torch.equal(mask, expected_mask[:, :length])
    assert expected_mask[:, length:].sum() == 0
    torch.testing.assert_close(states[mask.bool()], expected[expected_mask.bool()])


def test_captions_are_cut(text):
    assert text.encode_batch(["a " * 50], 5)[0].shape == (1, 5, 16)


def test_tokens_are_counted_as_they_are_encoded(parts, text):
    counts = text.count_tokens(CAPTIONS, 120)
    assert counts == text.encode_batch(CAPTIONS, 120)[1].sum(dim=1).tolist() == [1, 4, 7, 3]
    assert text.count_tokens([], 120) == []
    assert TextSpace(parts["tokenizer"], None).count_tokens(["a " * 50], 5) == [5]


def test_text_is_padded_to_few_lengths():
    states = [torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(9, 2, dtype=torch.bfloat16)]
    padded, mask = pad_states(states)
    assert padded.shape == (2, 16, 2)
    assert padded.dtype == torch.bfloat16
    assert mask.sum(dim=1).tolist() == [3, 9]
    assert torch.equal(padded, mask[..., None].expand(2, 16, 2).bfloat16())
    assert pad_states(states[:1])[0].shape == (1, 8, 2)


def test_each_text_is_encoded_once_to_the_states_of_its_tokens(text, monkeypatch):
    batches = []
    encode = text.encode_batch

    def spy(captions, max_length):
        batches.append(list(captions))
        return encode(captions, max_length)

    monkeypatch.setattr(text, "encode_batch", spy)
    captions = [f"a {'red ' * (number % 7)}cat {number}" for number in range(40)]
    states = text.encode_unpadded([*captions, *captions[::-1]], 120)
    assert [len(batch) for batch in batches] == [32, 8]
    assert max(map(len, batches[0])) <= min(map(len, batches[1]))
    assert set(states) == set(captions)
    for caption in captions[::9]:
        assert states[caption].dtype == torch.bfloat16
        torch.testing.assert_close(
            states[caption].float(), encode([caption], 120)[0][0], rtol=1e-2, atol=1e-2
        )
