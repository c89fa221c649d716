from ..models.conversion import (
    convert_to_diffusers,
    convert_to_single_file,
    inspect_checkpoint,
    load_transformer,
)
from .loading import CheckpointReport

__all__ = [
    "CheckpointReport",
    "convert_to_diffusers",
    "convert_to_single_file",
    "inspect_checkpoint",
    "load_transformer",
]
