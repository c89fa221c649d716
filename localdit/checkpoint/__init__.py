"""Checkpoint files: load them into the transformer, inspect them, convert them.

The modules of this package read files and know no model class. The public functions below know it:
they live in `localdit.models.conversion` and are imported when they are first used. `__init__.pyi`
declares them for type checkers.
"""

from __future__ import annotations

from ..registration import lazy_names

_HOMES = {
    "CheckpointReport": "loading",
    "convert_to_diffusers": ".models.conversion",
    "convert_to_single_file": ".models.conversion",
    "inspect_checkpoint": ".models.conversion",
    "load_transformer": ".models.conversion",
}

__all__ = [
    "CheckpointReport",
    "convert_to_diffusers",
    "convert_to_single_file",
    "inspect_checkpoint",
    "load_transformer",
]

__getattr__ = lazy_names(__name__, _HOMES)
