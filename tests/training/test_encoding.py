import pytest
import torch

from localdit.training.encoding import (
    CaptionEncoder,
    encode_captions,
    encode_pictures,
    pad_text,
    vae_scale,
)
from tests.tiny import tiny_components

CAPTIONS = ["", "a red circle", "A Blue Star above the lake ", "a cat"]


@pytest.fixture(scope="module")
def parts():
    return tiny_components()


@pytest.fixture
def encode(parts):
    return CaptionEncoder(parts["tokenizer"], parts["text_encoder"], max_length=120)


def test_captions_are_encoded_as_the_pipeline_encodes_prompts(parts, encode):
    from localdit import LocalDiTPipeline

    states, mask = encode(CAPTIONS)
    expected, expected_mask, _, _ = LocalDiTPipeline(**parts).encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False
    )
    length = states.shape[1]
    assert torch.equal(mask, expected_mask[:, :length])
    assert expected_mask[:, length:].sum() == 0
    torch.testing.assert_close(states[mask.bool()], expected[expected_mask.bool()])


def test_captions_are_cut(parts):
    encode = CaptionEncoder(parts["tokenizer"], parts["text_encoder"], max_length=5)
    assert encode(["a " * 50])[0].shape == (1, 5, 16)


def test_tokens_are_counted_as_they_are_encoded(parts, encode):
    assert encode.count_tokens(CAPTIONS) == encode(CAPTIONS)[1].sum(dim=1).tolist() == [1, 4, 7, 3]
    assert encode.count_tokens([]) == []
    assert CaptionEncoder(parts["tokenizer"], None, 5).count_tokens(["a " * 50]) == [5]


def test_captions_are_encoded_once_each_of_the_tokens_there_are(encode):
    batches = []

    def spy(captions):
        batches.append(list(captions))
        return encode(captions)

    captions = [f"a {'red ' * (number % 7)}cat {number}" for number in range(40)]
    text = encode_captions(spy, [*captions, *captions[::-1]])
    assert [len(batch) for batch in batches] == [32, 8]
    assert max(len(caption) for caption in batches[0]) <= min(
        len(caption) for caption in batches[1]
    )
    assert set(text) == set(captions)
    for caption in captions[::9]:
        assert text[caption].dtype == torch.bfloat16
        torch.testing.assert_close(
            text[caption].float(), encode([caption])[0][0], rtol=1e-2, atol=1e-2
        )


def test_text_is_padded_to_few_lengths():
    text = [torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(9, 2, dtype=torch.bfloat16)]
    states, mask = pad_text(text)
    assert states.shape == (2, 16, 2)
    assert states.dtype == torch.bfloat16
    assert mask.sum(dim=1).tolist() == [3, 9]
    assert torch.equal(states, mask[..., None].expand(2, 16, 2).bfloat16())
    assert pad_text(text[:1])[0].shape == (1, 8, 2)


def test_pictures_are_encoded_to_scaled_modes(parts):
    pixels = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    latents = encode_pictures(parts["vae"], pixels)
    with torch.no_grad():
        mode = parts["vae"].encode(pixels / 255 * 2 - 1).latent_dist.mode()
    assert latents.shape == (2, 4, 32 // vae_scale(parts["vae"]), 8)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, mode * 0.13025, rtol=1e-4, atol=1e-5)
    rough = encode_pictures(parts["vae"], pixels, bf16=True)
    assert rough.dtype == torch.float32
    assert 0 < (rough - latents).abs().max() < 0.1
