import pytest
from huggingface_hub import ModelCard

from localdit.pipelines.model_card import make_model_card
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_the_header_is_what_the_hub_reads(pipe, tmp_path):
    make_model_card(pipe, "someone/boats", "mit", False).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert data.license == "mit"
    assert {"localdit", "inpainting"} <= set(data.tags)


def test_the_text_says_what_the_pipeline_is(pipe):
    text = make_model_card(pipe, "someone/boats", "mit", False).text
    assert text.lstrip().startswith("# boats\n")
    assert 'DiffusionPipeline.from_pretrained("someone/boats")' in text
    count = sum(p.numel() for p in pipe.transformer.parameters())
    for fact in (
        f"parameters of the transformer | {count:,} |",
        "blocks | 2 |",
        "windows of attention | 2 x 2 tokens |",
        "64 x 64 pixels",
        "the transformer predicts | noise |",
        "DPMSolverMultistepScheduler",
        "T5EncoderModel",
    ):
        assert fact in text


def test_a_pipeline_may_lack_its_text_encoder():
    pipe = tiny_pipeline(use_global=True)
    pipe.text_encoder = None
    text = make_model_card(pipe, "boats", "mit", True).text
    assert "text encoder" not in text
    assert "2 x 2 tokens, with global context |" in text
    assert "trust_remote_code=True" in text
    assert "import localdit" not in text
