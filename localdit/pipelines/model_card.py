"""The model card of a saved pipeline: its README.md."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..core.samplers import SamplingSettings
from ..models.configuration import count_layer_types

URL = "https://github.com/yourusername/localdit"
PREDICTIONS = {"epsilon": "noise", "v_prediction": "velocity", "flow_prediction": "flow"}

CARD_TEXT = """
# {title}

Generates pictures from text with [LocalDiT]({url}), a diffusion transformer whose self-attention
looks only at small shifted windows.

*This card was written automatically when the pipeline was saved. Please add what the model was
trained on, what it can do, and where it fails.*

## Use

[Install LocalDiT]({url}), then:

```python
{use}
image = pipe(
    "a photo of a mountain lake at sunset", {settings}
).images[0]
```

## What is inside

| | |
|---|---|
{facts}
"""
USE = """\
import localdit  # makes its classes known to Diffusers
from diffusers import DiffusionPipeline  # or AutoPipelineForImage2Image, AutoPipelineForInpainting

pipe = DiffusionPipeline.from_pretrained("{name}")"""
USE_REMOTE_CODE = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)"""


def make_model_card(pipeline: Any, name: str, license: str, remote_code: bool) -> ModelCard:
    """Make the model card of a pipeline: its README.md.

    Args:
        name: folder or repository that the pipeline is loaded from.
        license: the hub's identifier of the weights' licence.
        remote_code: whether the folder has to be loaded with `trust_remote_code=True`.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=license,
        tags=["localdit", "text-to-image", "image-to-image", "inpainting"],
    )
    facts = "\n".join(f"| {what} | {fact} |" for what, fact in _facts(pipeline).items())
    title = name.rstrip("/").rsplit("/", 1)[-1]
    use = (USE_REMOTE_CODE if remote_code else USE).format(name=name)
    own = asdict(SamplingSettings.of(pipeline.config))
    settings = ", ".join(f"{name}={value}" for name, value in own.items())
    text = CARD_TEXT.format(title=title, use=use, url=URL, settings=settings, facts=facts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _facts(pipeline: Any) -> dict[str, str]:
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    config = transformer.config
    side = config.sample_size * pipeline.vae_scale_factor
    window = f"{config.window_size} x {config.window_size} tokens"
    kind = scheduler.config.get("prediction_type", "epsilon")
    facts = {
        "parameters of the transformer": f"{sum(p.numel() for p in transformer.parameters()):,}",
        "blocks": str(config.num_layers),
        "attention windows": window + (", with global context" if config.use_global else ""),
        "default picture size": f"{side} x {side} pixels",
        "prediction of the transformer": PREDICTIONS.get(kind, kind),
        "scheduler": type(scheduler).__name__,
    }
    if pipeline.vae is not None:
        facts["autoencoder"] = type(pipeline.vae).__name__
    if config.layer_types:
        facts["attention of the blocks"] = count_layer_types(config.layer_types)
    if pipeline.text_encoder is not None:
        encoder = pipeline.text_encoder
        count = sum(p.numel() for p in encoder.parameters())
        facts["text encoder"] = f"{type(encoder).__name__}, {count:,} parameters"
    return facts
