"""Texts of any kind: prompts, caption files and lists of pictures."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localdit.core.text import check_prompts
from localdit.files import decode_text
from localdit.training.data.finding import examine
from localdit.training.data.listings import list_files, list_metadata, list_pictures
from localdit.training.data.samples import KINDS
from tests.robustness.mutations import bounded, mutated
from tests.tiny import tiny_pipeline
from tests.training.data.drawn import picture_bytes

# Any code point, lone surrogates, NUL and unassigned ones included.
ANY_TEXT = st.text(st.characters(codec=None), max_size=60)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")


def encode_prompt(pipe, prompt):
    """Encode a prompt, or see it refused with a `ValueError`."""
    try:
        check_prompts(prompt)
    except ValueError:
        with pytest.raises(ValueError):
            pipe.encode_prompt(prompt)
        return
    embeds, mask, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    assert embeds.isfinite().all() and mask.any()


def check_decoding(data):
    """Decode bytes as a text, or see them refused."""
    try:
        text = decode_text(data)
    except ValueError:
        return
    assert "\r\n" not in text and not text.startswith("\ufeff")
    text.encode()  # no lone surrogates


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompt=ANY_TEXT)
@pytest.mark.filterwarnings("ignore")
def test_some_prompts(pipe, prompt):
    encode_prompt(pipe, prompt)


@pytest.mark.robustness
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(prompt=ANY_TEXT)
@pytest.mark.filterwarnings("ignore")
def test_prompts(pipe, prompt):
    encode_prompt(pipe, prompt)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), encoding=st.sampled_from(ENCODINGS), tail=st.binary(max_size=3))
def test_bytes_are_decoded_or_refused(text, encoding, tail):
    check_decoding(text.encode(encoding, errors="replace") + tail)
    check_decoding(tail)


def lists():
    """Return sound lists of pictures in each format, and the names of the caption files."""
    rows = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(4)]
    jsonl = "\n".join(json.dumps(row) for row in rows)
    table = "file_name,text\n" + "".join(f"{n}.png,caption {n}\n" for n in range(4))
    return {"metadata.jsonl": jsonl.encode(), "metadata.csv": table.encode()}


def try_lists(folder, seeds):
    """List and examine folders with a mutated list or caption file."""
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture_bytes("PNG", 4, 4))
    for seed in seeds:
        rng = random.Random(seed)
        name, data = rng.choice(
            [*lists().items(), ("0.txt", b"caption"), ("0.json", b'{"text": "a"}')]
        )
        if rng.random() < 0.3:
            data = data.decode().encode(rng.choice(ENCODINGS))
        path = folder / name
        path.write_bytes(mutated(data, rng))
        with bounded(f"text {seed}"):
            files = list_files(folder)
            try:
                listing = (list_metadata if "metadata" in name else list_pictures)(folder, files)
                samples, faults = examine(listing, progress=False)
            except ValueError as error:
                assert name in str(error), seed
            else:
                assert {*faults.counts} <= {*KINDS}, seed
                for sample in samples:
                    for caption in sample.captions:
                        assert caption.strip(), seed
                        caption.encode()
        path.unlink()


def test_some_mutated_lists(tmp_path):
    try_lists(tmp_path, range(200))


@pytest.mark.robustness
def test_mutated_lists(tmp_path):
    try_lists(tmp_path, range(3000))
