"""Shapes of the models of this project, as arguments of `LocalDiTTransformer2DModel`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The released 0.52B model, without global context: the defaults of the class.
    "released": {},
    # The model in the box: 128 x 128 pixels on a laptop's processor.
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "num_layers": 6,
        "sample_size": 16,
        "caption_channels": 128,
    },
}
"""Shapes by name, as keyword arguments: `LocalDiTTransformer2DModel(**PRESETS["tiny"])`."""
