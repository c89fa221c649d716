"""Read image files as RGB, and write PNGs with the settings that made them.

This module needs only Pillow (and NumPy for 16-bit greyscale), not PyTorch.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from localdit.files import whole_file

__all__ = ["fit_image", "image_grid", "load_image", "load_mask", "read_metadata", "save_image"]

MAX_PIXELS = 64_000_000
# Pillow's other readers stay out: one of them starts a PostScript interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
METADATA_KEY = "localdit"
WHITE = 128  # lowest value in a mask that counts as white


class NotAnImage(ValueError):
    """Raised for a file that is not a supported image."""


class ImageTooLarge(ValueError):
    """Raised for an image of more than `MAX_PIXELS` pixels, before it is decoded."""


def load_image(source: str | Path | Image.Image, name: object = None) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    Palettes, CMYK (without colour management) and greyscale are converted, transparency is laid
    over white, 16-bit values are scaled to 8 bits, floating-point values are expected in [0, 1],
    EXIF orientation is applied, and the first frame of an animation is taken.

    Args:
        source: path of a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file, or an image, which is not
            changed.
        name: the picture's name in errors, by default the path.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not such an image (`NotAnImage`), is damaged, or has more than
            `MAX_PIXELS` pixels (`ImageTooLarge`).
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, name or "the image")
    name = name or source
    if not Path(source).is_file():
        raise FileNotFoundError(f"{name}: there is no such image file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = open_image(source, name)
    with opened:
        return to_rgb(opened, name)


def load_mask(source: str | Path | Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a mask as 8-bit greyscale: white is repainted, black is kept.

    Args:
        source: as for `load_image`.
        size: (width, height) of its picture.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not an image, has transparency, has another size than the picture, or
            has no white.
    """
    name = "the mask" if isinstance(source, Image.Image) else source
    rgb = load_image(source)
    opened = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    if _is_transparent(opened):
        raise ValueError(f"{name} has transparency; expected white to repaint, black to keep")
    mask = rgb.convert("L")
    if size is not None and mask.size != size:
        raise ValueError(
            f"{name} has {mask.width} x {mask.height} pixels; expected the picture's "
            f"{size[0]} x {size[1]}"
        )
    if not any(mask.histogram()[WHITE:]):
        raise ValueError(f"nothing in {name} is white; expected white where to repaint")
    return mask


def open_image(source: str | Path | BinaryIO, name: object) -> Image.Image:
    """Read the header of an image file; `to_rgb` decodes the rest.

    Args:
        source: path or file.
        name: its name in error messages.

    Raises:
        ImageTooLarge: if it has more than `MAX_PIXELS` pixels.
        NotAnImage: if it is not an image, or its header is damaged.
    """
    try:
        image = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(_too_large(name)) from error
    except PermissionError:
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged headers
        raise NotAnImage(f"{name} is not an image of the kinds {', '.join(FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ImageTooLarge(_too_large(name, image.size))
    return image


def to_rgb(image: Image.Image, name: object) -> Image.Image:
    """Decode an image and convert it to 8-bit RGB, as described in `load_image`.

    Args:
        image: opened or decoded; it is not changed.
        name: its name in error messages.

    Raises:
        ValueError: if it is too large (`ImageTooLarge`), empty, or damaged.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ImageTooLarge(_too_large(name, image.size))
    if image.width * image.height == 0:
        raise ValueError(f"{name} is empty: {image.width} x {image.height} pixels")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        raise ValueError(f"{name} is damaged or cut off and can't be decoded: {error}") from error
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, name)
    if _may_be_transparent(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode}, which can't be turned into RGB") from error


def fit_image(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale to `height` x `width` pixels, keeping proportions and cropping two opposite edges."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def image_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Lay out pictures of one size row by row on white, as square as possible by default."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a grid must have one size, these have {sorted(sizes)}")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, not {columns}")
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_image(
    image: Image.Image,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = True,
) -> Path:
    """Write a PNG with the settings that made it, whole or not at all.

    The settings go into two text chunks: `parameters`, a line `name: value` for each, which people
    and image viewers read, and `localdit`, the same as JSON, for `read_metadata`.

    Raises:
        ValueError: if `path` doesn't end in `.png`.
        FileExistsError: if the file exists and `overwrite` is False.
        OSError: if it can't be written; nothing is left behind.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are saved as PNG, so the name must end in .png")
    info = PngInfo()
    if metadata:
        lines = "\n".join(f"{name}: {value}" for name, value in metadata.items())
        info.add_text("parameters", lines.encode("utf-8", "replace").decode())
        info.add_text(METADATA_KEY, json.dumps(dict(metadata)))
    with whole_file(path, overwrite) as file:
        image.save(file, format="PNG", pnginfo=info)
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the settings that `save_image` put into a PNG; empty if it has none.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a PNG, or its settings are not JSON.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such image file")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            metadata = json.loads(image.info.get(METADATA_KEY, "{}"))
    except Exception as error:
        raise ValueError(f"{path}: the settings can't be read, is it a PNG?") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: its settings are not a JSON object")
    return metadata


def prepare_output_folder(folder: str | Path) -> Path:
    """Create a folder if needed and check that it can be written to, before any work is done.

    Raises:
        OSError: if it can't be created or written to; the message names the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Deleted in any case, even when the disk is full.
        with tempfile.TemporaryFile(prefix=".localdit.", suffix=".tmp", dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"can't write to the output folder {folder}: {reason}") from error
    return folder


def _may_be_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode.upper().endswith("A")


def _is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel is transparent; the image has been read before."""
    if not _may_be_transparent(image):
        return False
    return any(image.convert("RGBA").getchannel("A").histogram()[:255])


def _too_large(name: object, size: tuple[int, int] | None = None) -> str:
    given = f" of {size[0]} x {size[1]} pixels" if size else ""
    return f"{name}{given} is too large; at most {MAX_PIXELS // 10**6} million pixels are read"


def _deep_grey_to_rgb(image: Image.Image, name: object) -> Image.Image:
    """Scale 16-bit ([0, 65535], also in 32-bit integers) or float ([0, 1]) grey to 8 bits."""
    import numpy as np

    brightest = 1.0 if image.mode == "F" else 65535
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= brightest):
        raise ValueError(
            f"{name} has mode {image.mode} and values from {low:g} to {high:g}; "
            f"expected 0 to {brightest}"
        )
    grey = np.floor(values * (255 / brightest) + 0.5).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
