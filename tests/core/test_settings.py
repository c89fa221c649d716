"""The steps and the guidance that suit a model."""

import json

import pytest

from localdit.config import Config
from localdit.core.encoders import text_encoder_whole_words
from localdit.core.settings import SamplingSettings, read_settings
from tests.tiny import tiny_pipeline


def test_the_defaults_are_those_of_the_config():
    assert SamplingSettings() == SamplingSettings(Config().denoising_steps, Config().guidance_scale)


def test_a_folder_names_both_one_or_none(tmp_path):
    assert read_settings(tmp_path / "gone.pt") == SamplingSettings(20, 7.0)
    for entries in ({"num_inference_steps": 4, "guidance_scale": 1}, {"guidance_scale": 2.0}, {}):
        (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["a", "b"], **entries}))
        assert read_settings(tmp_path) == SamplingSettings(**entries)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps is 0; expected at least 1"),
        ({"num_inference_steps": 10**9}, ValueError, "at most 1000"),
        ({"num_inference_steps": 4.0}, TypeError, "num_inference_steps is 4.0 of type float"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale is -1.0; expected at least 0"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale is inf"),
        ({"guidance_scale": None}, TypeError, "guidance_scale is None"),
    ],
)
def test_unusable_values_are_refused(tmp_path, entry, error, message):
    with pytest.raises(error, match=f"^{message}|{message}$"):
        SamplingSettings(**entry)
    (tmp_path / "model_index.json").write_text(json.dumps(entry))
    with pytest.raises(error, match=rf"model_index\.json: .*{message}"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("steps", "scale", "few"), [(4, 1.0, True), (8, 0.0, True), (4, 2.0, False), (20, 1.0, False)]
)
def test_few_steps_are_at_most_eight_without_guidance(steps, scale, few):
    assert SamplingSettings(steps, scale).few_steps == few


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
