import pytest
import torch

from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def pipe():
    """A text-to-image pipeline, shared: no test may change its components for good."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def img2img(pipe):
    pipeline = LocalDiTImg2ImgPipeline(**pipe.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def inpaint(pipe):
    pipeline = LocalDiTInpaintPipeline(**pipe.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def seeded():
    """Make a generator from a seed."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture
def calls(pipe, monkeypatch):
    """The keyword arguments, with the latents, of each call of the shared transformer."""
    recorded = []
    forward = pipe.transformer.forward

    def spy(hidden_states, **kwargs):
        recorded.append({"hidden_states": hidden_states, **kwargs})
        return forward(hidden_states, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    return recorded
