"""Sizes of pictures: those that a model draws, and those with the proportions of a picture."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import INDEX, is_finite_number, part_source
from .errors import Field, FieldValueError
from .files import read_json, user_path

if TYPE_CHECKING:
    from .config import Config

MAX_SIDE = 2**20  # pixels, more than any machine draws
PIXELS_PER_LATENT = 8  # along a side, if the autoencoder is not on this machine


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that pictures of a model follow from."""

    sample_size: int  # latents along a side of the model's native, square size
    patch_size: int  # latents along a side of a token
    pixels_per_latent: int  # pixels along a side of a latent

    @property
    def pixels_per_token(self) -> int:
        """Pixels along a side of a token; heights and widths are multiples of it."""
        return self.patch_size * self.pixels_per_latent

    @property
    def side(self) -> int:
        """Side of the native size in pixels."""
        return self.sample_size * self.pixels_per_latent


def read_sizes(checkpoint: Path, config: Config) -> ModelSizes:
    """Return the sizes of a model; only JSON files are read, no weights.

    Args:
        checkpoint: a checkpoint file, or the Diffusers folder of a pipeline or a transformer.
        config: describes a checkpoint file, and may name the autoencoder.
    """
    whole = (checkpoint / INDEX).is_file()
    found = _read_json((checkpoint / "transformer" if whole else checkpoint) / "config.json")
    autoencoder = user_path(part_source(config, "vae", checkpoint))
    return ModelSizes(
        found.get("sample_size", config.sample_size),
        found.get("patch_size", config.patch_size),
        pixels_per_latent(autoencoder),
    )


def pipeline_around(part: Path) -> Path:
    """Return the folder that a part of a pipeline, or a checkpoint file, really lies in."""
    return part.resolve().parent


def folder_with_part(folder: Path, part: str) -> Path:
    """Return the folder that has a part of a pipeline: its own, or else its parent.

    The parent has it only if the folder's index says so, with `"_shares_parts": true`. A student
    that lies within the folder of its teacher takes text encoder and autoencoder from there.
    """
    shares = not (folder / part).is_dir() and _read_json(folder / INDEX)
    return pipeline_around(folder) if shares and shares.get("_shares_parts") is True else folder


def pixels_per_latent(folder: Path) -> int:
    """Return the pixels along a side of a latent.

    Args:
        folder: has the autoencoder's `config.json`, in it or in its `vae/`. 8 is returned if it has
            neither, for instance because the autoencoder is on the hub.
    """
    for place in (folder_with_part(folder, "vae") / "vae", folder):
        config = _read_json(place / "config.json")
        if config.keys() & {"block_out_channels", "encoder_block_out_channels"}:
            return pixels_per_latent_of(config)
    return PIXELS_PER_LATENT


def pixels_per_latent_of(config: Mapping[str, Any]) -> int:
    """Return the pixels along a side of a latent, from an autoencoder's configuration.

    Each level of the encoder but the last halves the sides.
    """
    levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(levels) - 1)


def proportional_size(
    size: tuple[int, int],
    pixels: int,
    multiple: int,
    height: int | None = None,
    width: int | None = None,
) -> tuple[int, int]:
    """Return height and width with the proportions of a picture, multiples of `multiple`.

    Args:
        size: (width, height) of the picture.
        pixels: about how many pixels there are in all, if neither height nor width is given.
        multiple: pixels per token.
        height, width: a side that is fixed; it is returned unchanged.

    Raises:
        ValueError: if the shorter side would be less than a token; a `FieldError`.
    """
    ratio = size[0] / size[1]
    if not (height or width) and math.sqrt(pixels * min(ratio, 1 / ratio)) < multiple:
        raise FieldValueError(
            "a picture of {size} pixels can't be drawn in its proportions with {pixels} pixels in "
            "all, since a side would have less than {multiple}: crop it, or give {height} and "
            "{width}",
            size=f"{size[0]} x {size[1]}",
            pixels=f"{pixels:,}",
            multiple=multiple,
            height=Field("height"),
            width=Field("width"),
        )

    def near(side: float) -> int:
        return max(multiple, multiple * round(side / multiple))

    if height and not width:
        width = near(height * ratio)
    elif width and not height:
        height = near(width / ratio)
    return height or near(math.sqrt(pixels / ratio)), width or near(math.sqrt(pixels * ratio))


def check_size(field: Field, value: Any, multiple: int) -> None:
    """Refuse a height or width that is not a positive multiple of a token's side up to `MAX_SIDE`.

    Args:
        field: the height or the width, as messages name it.
        value: the size in pixels.
        multiple: pixels per token.

    Raises:
        ValueError: the message has the nearest sizes that work; a `FieldError`.
    """
    integer = isinstance(value, Integral) and not isinstance(value, bool)
    finite = is_finite_number(value)
    if finite and integer and 0 < value <= MAX_SIDE and value % multiple == 0:
        return
    nearest = ""
    if finite:
        below = int(min(max(value, 0), MAX_SIDE) // multiple) * multiple
        sizes = [size for size in (below, below + multiple) if 0 < size <= MAX_SIDE]
        nearest = f"; the nearest that work: {' or '.join(map(str, sizes))}"
    raise FieldValueError(
        "{field} must be a positive multiple of {multiple} pixels, got {value}{nearest}.",
        field=field,
        multiple=multiple,
        value=reprlib.repr(value),
        nearest=nearest,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}
