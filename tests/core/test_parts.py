import copy

import pytest
import torch

from localdit.core.parts import Encoders
from tests.tiny import tiny_components, tiny_tokenizer


@pytest.fixture
def encoders():
    parts = tiny_components()
    return Encoders(parts["tokenizer"], parts["text_encoder"], parts["vae"])


def test_where_and_how_encoders_are_kept_does_not_matter(encoders, tmp_path):
    expected = encoders.fingerprints()
    assert {len(fingerprint) for fingerprint in expected.values()} == {64}
    encoders.tokenizer(["a cat", "a"], padding=True, truncation=True, max_length=5)
    encoders.vae.to(memory_format=torch.channels_last)
    encoders.text_encoder.to(torch.bfloat16)  # as on a GPU
    for name, part in zip(encoders._fields, encoders, strict=True):
        part.save_pretrained(tmp_path / name)
    loaded = Encoders(
        *(
            type(part).from_pretrained(tmp_path / name)
            for name, part in zip(encoders._fields, encoders, strict=True)
        )
    )
    assert encoders.fingerprints() == loaded.fingerprints() == expected


@pytest.mark.parametrize("part", Encoders._fields)
def test_a_change_of_one_part_is_seen_in_its_fingerprint(encoders, part):
    changed = copy.deepcopy(getattr(encoders, part))
    if part == "tokenizer":
        changed = tiny_tokenizer()
        changed.add_tokens(["dragon"])
    else:
        next(changed.parameters()).data[0] *= 1.01
    before = encoders.fingerprints()
    after = encoders._replace(**{part: changed}).fingerprints()
    assert [name for name in before if before[name] != after[name]] == [part]
