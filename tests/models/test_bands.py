import pytest
import torch

from localdit.models import bands
from localdit.models.bands import in_bands
from localdit.models.windows import WindowGrid
from tests.models.test_transformer import inputs, make, run


@pytest.mark.parametrize("use_global", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (26, 14)])  # the latter is padded: 13 x 7 tokens
def test_a_model_in_bands_is_the_model(monkeypatch, size, use_global):
    model = make(use_global=use_global, num_layers=4)
    whole = run(model, **inputs(*size))
    monkeypatch.setattr(bands, "TOKENS_ON_CPU", 60)
    in_parts = run(model, **inputs(*size))
    torch.testing.assert_close(in_parts, whole, atol=2e-6, rtol=0)


def heights_taken(grid, like):
    taken = []

    def function(tokens, band):
        taken.append(band.height)
        return like[:, tokens] + 1

    assert torch.equal(in_bands(function, grid, like), like + 1)
    return taken


def test_a_batch_shares_the_tokens_at_once(monkeypatch):
    monkeypatch.setattr(bands, "TOKENS_ON_CPU", 64)
    grid = WindowGrid(16, 8, 4)
    with torch.no_grad():
        assert heights_taken(grid, torch.randn(1, 128, 3)) == [8, 8]
        assert heights_taken(grid, torch.randn(2, 128, 3)) == [4, 4, 4, 4]
        assert heights_taken(grid, torch.randn(99, 128, 3)) == [4, 4, 4, 4]


def test_training_takes_the_whole_map_at_once(monkeypatch):
    monkeypatch.setattr(bands, "TOKENS_ON_CPU", 64)
    assert heights_taken(WindowGrid(16, 8, 4), torch.randn(1, 128, 3)) == [16]
