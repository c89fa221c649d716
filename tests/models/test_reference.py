"""Comparison with tensors of a working reference (float32, CPU)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localdit.models import LocalDiTTransformer2DModel

DATA = Path(__file__).parents[1] / "data" / "reference"


@pytest.mark.parametrize("kind", ["local", "global"])
@pytest.mark.parametrize("grid", ["16x16", "16x24", "32x16"])
def test_agrees_with_the_reference(kind, grid):
    config = json.loads((DATA / f"reference_{kind}.json").read_text())
    model = LocalDiTTransformer2DModel.from_single_file(
        DATA / f"reference_{kind}.checkpoint.safetensors",
        do_rope=config["do_rope"],
        qk_norm_eps=config["qk_norm_eps"],
        sample_size=config["sample_size"],
    )
    tensors = load_file(DATA / f"reference_{kind}.io.safetensors")
    inputs = {name.split(".")[1]: x for name, x in tensors.items() if name.startswith(grid + ".")}
    with torch.no_grad():
        sample = model(
            inputs["latents"],
            inputs["encoder_hidden_states"],
            inputs["timestep"],
            {"resolution": inputs["resolution"], "aspect_ratio": inputs["aspect_ratio"]},
            encoder_attention_mask=inputs["encoder_attention_mask"],
        ).sample
    error = (sample - inputs["output"]).abs().max().item()
    assert error < 1e-5, f"{kind} {grid}: {error:.2e}"
