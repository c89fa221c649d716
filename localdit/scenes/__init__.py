"""Captioned scenes of plain shapes, drawn by rule: data to train on without any download."""

from localdit.scenes.captions import Caption, describe, describe_often
from localdit.scenes.draw import draw_scene
from localdit.scenes.sample import is_held_out, sample_scene, sample_scenes
from localdit.scenes.scene import Scene, SceneObject

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
