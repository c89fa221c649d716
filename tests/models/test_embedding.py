import pytest
import torch
from diffusers.models.embeddings import PatchEmbed

from localdit.models import bands
from localdit.models.embedding import PatchEmbedding


@pytest.mark.parametrize("size", [(16, 16), (24, 8), (10, 30)])
@pytest.mark.parametrize(("base_size", "scale"), [(8, 1), (5, 2), (64, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_diffusers(monkeypatch, size, base_size, scale, dtype):
    theirs = PatchEmbed(
        2 * base_size, 2 * base_size, 2, in_channels=4, embed_dim=24, interpolation_scale=scale
    )
    ours = PatchEmbedding(2, 4, 24, base_size, scale)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "proj" in k})
    latents = torch.randn(2, 4, *size).to(dtype)
    theirs.to(dtype).pos_embed.data = theirs.pos_embed.float()
    expected = theirs(latents)
    for at_once in (10_000, 7):
        monkeypatch.setattr(bands, "TOKENS_ON_CPU", at_once)
        with torch.no_grad():
            tokens = ours.to(dtype)(latents)
        assert tokens.is_contiguous()
        torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)
