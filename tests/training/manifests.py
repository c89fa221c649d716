"""Manifests of encoded data for tests."""

from localdit.training.data.buckets import Size
from localdit.training.data.encoded import EncodedManifest


def some_manifest(**changes) -> EncodedManifest:
    """Return a manifest with some values changed."""
    values = {
        "image_size": 64,
        "window_size": 2,
        "crop": "buckets",
        "max_aspect_ratio": 2.0,
        "max_upscale": 1.5,
        "sizes": (Size(64, 32), Size(32, 64)),
        "max_caption_length": 120,
        "mixed_precision": "no",
        "latent_channels": 4,
        "vae_scale": 8,
        "scaling_factor": 0.13025,
        "text_width": 16,
        "fingerprints": {"tokenizer": "t", "text_encoder": "e", "vae": "v"},
        "samples": 4,
        "shards": 2,
        "samples_per_shard": 2,
        "samples_digest": "0",
        "sources": {"tokenizer": "a", "text_encoder": "b", "vae": "c"},
        "command": "python -m the command",
        "too_small": 0,
    }
    return EncodedManifest(**values | changes)
