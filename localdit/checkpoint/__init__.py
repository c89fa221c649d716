"""Checkpoints in one file: read them into the transformer, look into them, convert them.

The names below are imported when they are first used, so that the command's `--help` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registration import lazy_names

if TYPE_CHECKING:
    from .convert import convert_to_diffusers, convert_to_single_file
    from .loading import inspect_checkpoint, load_transformer
    from .report import CheckpointReport

_HOMES = {
    "CheckpointReport": "report",
    "convert_to_diffusers": "convert",
    "convert_to_single_file": "convert",
    "inspect_checkpoint": "loading",
    "load_transformer": "loading",
}

__all__ = [
    "CheckpointReport",
    "convert_to_diffusers",
    "convert_to_single_file",
    "inspect_checkpoint",
    "load_transformer",
]

__getattr__ = lazy_names(__name__, _HOMES)
