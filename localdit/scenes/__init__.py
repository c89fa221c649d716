"""Captioned scenes of simple things, drawn by rules: training data without a download."""

from localdit.scenes.captions import Caption, describe, describe_often
from localdit.scenes.scene import (
    Background,
    Scene,
    SceneObject,
    draw_scene,
    is_held_out,
    sample_scene,
    sample_scenes,
)

__all__ = [
    "Background",
    "Caption",
    "Scene",
    "SceneObject",
    "describe",
    "describe_often",
    "draw_scene",
    "is_held_out",
    "sample_scene",
    "sample_scenes",
]
