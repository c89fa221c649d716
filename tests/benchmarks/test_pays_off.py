"""Window attention stays faster than full attention: processor times in one run, wide margins."""

import time

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from localdit.models import LocalDiTTransformer2DModel

SHAPE = {
    "num_attention_heads": 4,
    "attention_head_dim": 72,
    "cross_attention_dim": 288,
    "caption_channels": 288,
    "out_channels": 4,
    "num_layers": 1,
    "use_additional_conditions": False,
}


@pytest.fixture(autouse=True)
def one_thread():  # waiting threads would count as processor time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forward(model_class, pixels, **changes):
    """Return a function that runs a forward pass of a one-layer model."""
    torch.manual_seed(0)
    model = model_class(**SHAPE, sample_size=pixels // 8, **changes).eval()
    latents, text = torch.randn(1, 4, pixels // 8, pixels // 8), torch.randn(1, 120, 288)
    conditions = {"resolution": None, "aspect_ratio": None}

    @torch.inference_mode()
    def run():
        model(latents, text, timestep=torch.tensor([500]), added_cond_kwargs=conditions)

    return run


def shortest(*runs, repeats=9):
    """Return the shortest processor time of each run, in turns, after one uncounted turn."""
    times = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            if repeat:
                taken.append(time.process_time() - start)
    return [min(taken) for taken in times]


def test_windows_beat_full_attention_at_1024_pixels():
    """2.8 and 1.9 when this was written; less with wider layers, where products take more time."""
    local, with_context, pixart = shortest(
        forward(LocalDiTTransformer2DModel, 1024),
        forward(LocalDiTTransformer2DModel, 1024, use_global=True),
        forward(PixArtTransformer2DModel, 1024),
    )
    assert pixart / local > 2
    assert pixart / with_context > 1.4


def test_the_cost_per_token_is_constant():
    """4.1 when this was written: four times the tokens."""
    small, large = shortest(
        forward(LocalDiTTransformer2DModel, 512), forward(LocalDiTTransformer2DModel, 1024)
    )
    assert large / small < 4.8


def test_window_attention_is_a_small_part_of_a_block():
    """0.08 when this was written, and a quarter of that in layers four times as wide."""
    block = LocalDiTTransformer2DModel(**SHAPE, sample_size=128).eval().transformer_blocks[0]
    grid = block.attn1.grid(64, 64)
    qkv, tokens, text = (torch.randn(1, n, c) for n, c in ((4096, 864), (4096, 288), (120, 288)))
    with torch.inference_mode():
        windows, whole = shortest(
            lambda: block.attn1.processor(block.attn1, qkv, grid),
            lambda: block(tokens, text, None, torch.randn(1, 6 * 288), 64, 64),
        )
    assert windows / whole < 0.15
