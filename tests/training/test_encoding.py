import pytest
import torch

from localdit.training.encoding import CaptionEncoder, encode_captions
from tests.tiny import tiny_components


@pytest.fixture
def encode():
    parts = tiny_components()
    return CaptionEncoder(parts["tokenizer"], parts["text_encoder"], max_length=120)


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
