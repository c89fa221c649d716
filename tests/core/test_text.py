import logging
import time

import pytest
import torch
import transformers

from localdit import Config, LocalDiTPipeline, load_model
from localdit.core.text import (
    MAX_PROMPT_CHARACTERS,
    TextSpace,
    check_prompts,
    pad_states,
)
from tests.tiny import TEXT_WIDTHS as WIDTHS
from tests.tiny import tiny_components, tiny_pipeline, tiny_text_encoder, tiny_tokenizer


@pytest.mark.parametrize("wrong", ["\0", "\ud83d", "\udd34", "\udcff"])
def test_prompts_with_what_is_no_character_are_refused(wrong):
    with pytest.raises(ValueError, match=r"prompt\[1\] has '\\.*' at position 2, which is not a "):
        check_prompts(["a cat", f"a {wrong} cat"])
    assert check_prompts("a \x1b\t\ufffd\U0001f534") == ["a \x1b\t\ufffd\U0001f534"]


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


def tokenize(texts, max_length):
    """Tokenise as for a pipeline's prompts."""
    return TextSpace(tiny_tokenizer(), None).tokenize(texts, max_length, warn=True)


def test_prompts_are_lower_cased_and_stripped():
    first, second = tokenize([" A RED Circle\n", "a red circle"], 8)
    assert first == second
    assert tiny_tokenizer().decode(first) == "a red circle </s>"


def test_a_warning_quotes_what_was_cut(caplog):
    with caplog.at_level(logging.WARNING):
        short, cut = tokenize(["a cat", "a red cat and blue dog"], 5)
    (record,) = caplog.records
    assert "'blue dog'" in record.getMessage()
    assert "6 tokens" in record.getMessage()
    assert "first 4" in record.getMessage()
    assert (len(short), len(cut)) == (3, 5)
    assert cut[-1] == 1  # still ends with </s>


def test_a_prompt_that_just_fits_is_not_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        tokenize(["a red cat dog"], 5)
    assert not caplog.records


def test_a_pipeline_warns_of_unknown_pieces_once_each(caplog):
    pipe = LocalDiTPipeline(**tiny_components())
    for prompts in (["a zebra", "a cat, zebra"], ["a zebra"], ["a zebra and koala"], ["a cat"]):
        pipe.encode_prompt(prompts, negative_prompt="zebra")
    first, second = (record.getMessage() for record in caplog.records)
    assert "'zebra' (2 times), ','" in first
    assert "'koala'" in second
    assert "zebra" not in second


def test_a_pipeline_of_whole_words_names_unknown_ones_once_per_call(caplog):
    pipe = tiny_pipeline()
    pipe.register_to_config(whole_words=True)
    draw = {"num_inference_steps": 1, "output_type": "latent"}
    for _ in range(2):
        pipe(["a shiny cat", "a red dodecahedron"], negative_prompt="bad zebra", **draw)
    line = "The model does not know these words and ignores them: shiny, dodecahedron, zebra"
    assert [record.getMessage() for record in caplog.records] == [line] * 2
    caplog.clear()
    pipe("a red cat", negative_prompt="zebra", guidance_scale=1.0, **draw)  # which is not read
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "The negative prompt has no effect" in warning and "zebra" not in warning
    caplog.clear()
    embeddings = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[:2]
    given = dict(zip(("prompt_embeds", "prompt_attention_mask"), embeddings, strict=True))
    pipe(**given, guidance_scale=1.0, **draw)
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
    with pytest.raises(ValueError, match="exactly one of them is needed"):
        pipe.encode_prompt(None)


CAPTIONS = ["", "a red circle", "A Blue Star above the lake ", "a cat"]


@pytest.fixture(scope="module")
def parts():
    return tiny_components()


@pytest.fixture
def text(parts):
    return TextSpace(parts["tokenizer"], parts["text_encoder"])


def test_captions_are_encoded_as_the_pipeline_encodes_prompts(parts, text):
    states, mask = text.encode_batch(CAPTIONS, 120)
    expected, expected_mask, _, _ = LocalDiTPipeline(**parts).encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False
    )
    length = states.shape[1]
    assert length == 8
    assert torch.equal(mask, expected_mask[:, :length])
    assert expected_mask[:, length:].sum() == 0
    torch.testing.assert_close(states, expected[:, :length])


def test_captions_are_cut(text):
    states, mask = text.encode_batch(["a " * 50], 5)
    assert states.shape == (1, 8, 16)
    assert mask.tolist() == [[1] * 5 + [0] * 3]


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
    assert pad_states(states, 20)[0].shape == (2, 20, 2)


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
        expected = encode([caption], 120)[0][0, : len(states[caption])]
        torch.testing.assert_close(states[caption].float(), expected, rtol=1e-2, atol=1e-2)


def test_padding_does_not_change_the_states_of_a_text(text):
    """A text alone, in a batch, and at another length: the sums may round otherwise, no more."""
    alone, _ = text.encode(["a cat"], 120, torch.device("cpu"))
    shorter, _ = text.encode(["a cat"], 8, torch.device("cpu"))
    batch, _ = text.encode_batch(["a cat", "a small red dog on the left of a lake"], 120)
    assert torch.equal(alone[:, :8], shorter)
    assert alone[:, 3:].abs().sum() == 0
    torch.testing.assert_close(batch[0, :3], alone[0, :3], rtol=1e-5, atol=1e-6)
    assert batch[0, 3:].abs().sum() == 0


# Text encoders of other kinds


@pytest.mark.parametrize("kind", WIDTHS)
def test_padding_has_no_effect_with_any_text_encoder(kind):
    space = TextSpace(tiny_tokenizer(), tiny_text_encoder(kind))
    assert space.width == WIDTHS[kind]
    texts = ["a cat", "a small red dog on the left", ""]
    states, mask = space.encode_batch(texts, 120)
    assert mask.sum(dim=1).tolist() == space.count_tokens(texts, 120)
    for text, row, keep in zip(texts, states, mask.bool(), strict=True):
        alone, alone_mask = space.encode([text], 120, torch.device("cpu"))
        torch.testing.assert_close(row[keep], alone[alone_mask.bool()], rtol=1e-4, atol=1e-5)
        ids = torch.tensor(space.tokenize([text], 120))
        with torch.no_grad():
            bare = space.text_encoder(ids).last_hidden_state[0]  # without any padding
        torch.testing.assert_close(row[keep], bare, rtol=1e-4, atol=1e-5)


def test_a_clip_encoder_cuts_at_its_positions(caplog):
    space = TextSpace(tiny_tokenizer(), tiny_text_encoder("clip"))
    states, mask = space.encode(["a cat " * 20], 120, torch.device("cpu"))
    assert states.shape == (1, 120, 32)
    assert mask.sum() == 12
    assert "cut to the first 11" in caplog.text


def test_a_model_that_predicts_tokens_is_refused():
    settings = tiny_text_encoder("gemma").config
    space = TextSpace(tiny_tokenizer(), transformers.Gemma2ForCausalLM(settings))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM predicts tokens.*base_model"):
        space.encode_batch(["a cat"], 8)


@pytest.mark.parametrize("kind", WIDTHS)
def test_pipelines_with_other_text_encoders_draw_save_and_load(kind, tmp_path):
    parts = tiny_components(caption_channels=WIDTHS[kind])
    pipe = LocalDiTPipeline(**parts | {"text_encoder": tiny_text_encoder(kind)})
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red cat", num_inference_steps=2, generator=generator, output_type="pt")[0]

    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = LocalDiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.text_encoder) is type(pipe.text_encoder)
    assert torch.equal(draw(loaded), expected)
    config = Config(
        ckpt_path=tmp_path / "transformer", text_encoder=tmp_path, vae=tmp_path, scheduler=tmp_path
    )
    assembled = load_model(config, device="cpu", dtype="float32")
    assert type(assembled.text_encoder) is type(pipe.text_encoder)
    assert torch.equal(draw(assembled), expected)
