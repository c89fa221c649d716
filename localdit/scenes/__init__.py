"""Captioned scenes of plain shapes, drawn by rules: training data without a download."""

from localdit.scenes.phrasing import Caption, describe, describe_often
from localdit.scenes.scene import (
    Scene,
    SceneObject,
    draw_scene,
    is_held_out,
    sample_scene,
    sample_scenes,
)

__all__ = [
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
