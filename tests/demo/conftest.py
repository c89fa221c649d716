import pytest

from localdit.config import Config
from localdit.demo.artist import Artist, Settings
from tests.tiny import tiny_pipeline

SIZE = 32


@pytest.fixture(scope="session")
def config():
    return Config(height=SIZE, width=SIZE, sample_size=8, denoising_steps=4, guidance_scale=2.0)


@pytest.fixture(scope="session")
def artist(config):
    return Artist(tiny_pipeline(), config)


@pytest.fixture
def asked():
    """Make settings that differ from plain ones."""

    def make(mode="generate", **changes):
        plain = {
            "prompt": "a red circle",
            "negative_prompt": "",
            "seed": 3,
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "height": SIZE,
            "width": SIZE,
            "strength": 1.0,
        }
        return Settings(mode=mode, **(plain | changes))

    return make
