"""Read image files as RGB, and write PNGs with the settings that made them.

This module needs only Pillow (and NumPy for 16-bit greyscale), not PyTorch.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain, product
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from localdit.files import user_path, whole_file

__all__ = ["fit_image", "image_grid", "load_image", "load_mask", "read_metadata", "save_image"]

MAX_PIXELS = 64_000_000
# Pillow's other readers stay out: one of them starts a PostScript interpreter.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
METADATA_KEY = "localdit"
WHITE = 128  # lowest value in a mask that counts as white
# The mode of Pillow's in which a profile of each colour space takes its colours.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
SAME = 2  # a profile that moves no value of 255 by more than this is sRGB


class NotAnImage(ValueError):
    """Raised for a file that is not a supported image."""


class ImageTooLarge(ValueError):
    """Raised for an image of more than `MAX_PIXELS` pixels, before it is decoded."""


def load_image(source: str | Path | BinaryIO | Image.Image, name: object = None) -> Image.Image:
    """Read a picture as 8-bit sRGB, upright. This is how every picture and mask is read.

    Palettes, CMYK, Lab and greyscale are converted, a colour profile by its definition (one that
    can't be used is left out, with a warning), transparency is laid over white, 16-bit values are
    scaled to 8 bits, floating-point values are expected in [0, 1], EXIF orientation is applied,
    and the first frame of an animation is taken.

    Args:
        source: path of a BMP, GIF, JPEG, PNG, PPM, TIFF or WebP file, such a file that is open, or
            an image, which is not changed.
        name: the picture's name in errors, by default the path.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not such an image (`NotAnImage`), is damaged, or has more than
            `MAX_PIXELS` pixels (`ImageTooLarge`).
    """
    return lay_over(load_layer(source, name), "white")


def load_mask(
    source: str | Path | Image.Image, size: tuple[int, int] | None = None, name: object = None
) -> Image.Image:
    """Read a mask as 8-bit greyscale: white is repainted, black is kept.

    Args:
        source: as for `load_image`.
        size: (width, height) of its picture.
        name: the mask's name in errors, by default the path.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not an image, has transparency, has another size than the picture, or
            has no white.
    """
    name = name or (source if isinstance(source, (str, Path)) else "the mask")
    layer = load_layer(source, name)
    if layer.mode == "RGBA" and any(layer.getchannel("A").histogram()[:255]):
        raise ValueError(f"{name} has transparency; expected white to repaint, black to keep")
    mask = layer.convert("L")
    if size is not None and mask.size != size:
        raise ValueError(
            f"{name} has {mask.width} x {mask.height} pixels; expected the picture's "
            f"{size[0]} x {size[1]}"
        )
    if not any(mask.histogram()[WHITE:]):
        raise ValueError(f"nothing in {name} is white; expected white where to repaint")
    return mask


def load_layer(source: str | Path | BinaryIO | Image.Image, name: object = None) -> Image.Image:
    """Read a picture as `load_image` does, but as RGBA if it has transparency."""
    if isinstance(source, Image.Image):
        return decode(source, name or "the image")
    if isinstance(source, (str, Path)):
        name = name or source
        source = user_path(source)
        if not source.is_file():
            raise FileNotFoundError(f"{name}: there is no such image file")
    elif not hasattr(source, "read"):
        raise TypeError(
            f"{name or 'the image'} is a {type(source).__name__}; expected a path, an open file or "
            "a PIL image, such as Image.fromarray(array)"
        )
    name = name or "the image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = open_image(source, name)
    with opened:
        return decode(opened, name)


def open_image(source: str | Path | BinaryIO, name: object) -> Image.Image:
    """Read the header of an image file; `decode` decodes the rest.

    Args:
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
        if "MAX_TEXT" in str(error):
            raise NotAnImage(_too_long_texts(name)) from error
        raise NotAnImage(f"{name} is not an image of the kinds {', '.join(FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ImageTooLarge(_too_large(name, image.size))
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that an opened image has once `decode` has turned it."""
    try:
        # `image.getexif` would decode a PNG, to look for EXIF data behind the pixels.
        exif = Image.Image.getexif(image)
    except Exception:  # unreadable EXIF data says nothing, in `decode` too
        return image.size
    # The size of a TIFF is the turned one, or not, by the version of Pillow.
    width, height = exif.get(ExifTags.Base.ImageWidth), exif.get(ExifTags.Base.ImageLength)
    if image.format != "TIFF" or not width or not height:
        width, height = image.size
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def decode(image: Image.Image, name: object) -> Image.Image:
    """Decode an image as described in `load_image`: to RGB, or to RGBA if it has transparency.

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
    except Exception as error:  # Pillow's decoders raise anything on damaged data
        if "MAX_TEXT" in str(error):
            raise ValueError(_too_long_texts(name)) from error
        raise ValueError(f"{name} is damaged or cut off and can't be decoded: {error}") from error
    try:
        image = ImageOps.exif_transpose(image) or image
    except Exception:  # unreadable EXIF data says nothing, in `upright_size` too
        image = image.copy()
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _deep_grey(image, name)
    alpha = None
    if image.mode == "La":  # with premultiplied alpha
        image = image.convert("LA")
    if "transparency" in image.info or image.mode.upper().endswith("A"):
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = image.convert("L") if image.mode in ("1", "L", "LA") else rgba.convert("RGB")
    image = _in_srgb(image, profile, name)
    if alpha is not None:
        image.putalpha(alpha)
    return image


def lay_over(layer: Image.Image, colour: str) -> Image.Image:
    """Lay what `decode` returned over a colour; the result is RGB."""
    if layer.mode == "RGB":
        return layer
    return Image.alpha_composite(Image.new("RGBA", layer.size, colour), layer).convert("RGB")


def fit_image(
    image: Image.Image,
    height: int,
    width: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """Scale to `height` x `width` pixels, keeping proportions and cropping two opposite edges."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), resampling)


def fit_mask(mask: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a mask as `fit_image` scales its picture, so that thin lines stay marked.

    A pixel that covers a white one is at least as white as it takes to be repainted.

    Raises:
        ValueError: if all white parts are cropped away.
    """
    import numpy as np

    white = Image.fromarray((np.asarray(mask) >= WHITE).astype(np.float32))
    marked = np.asarray(fit_image(white, height, width, Image.Resampling.BOX)) > 0
    if not marked.any():
        raise ValueError(
            f"all that is white in the mask is cropped away when its picture of {mask.width} x "
            f"{mask.height} pixels is fitted to {width} x {height}; choose a height and width with "
            "its proportions"
        )
    fitted = np.asarray(fit_image(mask, height, width))
    return Image.fromarray(np.maximum(fitted, np.where(marked, np.uint8(WHITE), np.uint8(0))))


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
    path = user_path(path)
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
    path = user_path(path)
    if not path.is_file():
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
    folder = user_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Deleted in any case, even when the disk is full.
        with tempfile.TemporaryFile(prefix=".localdit.", suffix=".tmp", dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"can't write to the output folder {folder}: {reason}") from error
    return folder


def _too_large(name: object, size: tuple[int, int] | None = None) -> str:
    given = f" of {size[0]} x {size[1]} pixels" if size else ""
    return f"{name}{given} is too large; at most {MAX_PIXELS // 10**6} million pixels are read"


def _too_long_texts(name: object) -> str:
    return (
        f"{name} has compressed texts or a colour profile of more than a megabyte, which are not "
        "read: save it without them"
    )


def _deep_grey(image: Image.Image, name: object) -> Image.Image:
    """Scale 16-bit ([0, 65535], also in 32-bit integers) or float ([0, 1]) grey to L, or to LA."""
    import numpy as np

    brightest = 1.0 if image.mode == "F" else 65535
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= brightest):
        raise ValueError(
            f"{name} has mode {image.mode} and values from {low:g} to {high:g}; "
            f"expected 0 to {brightest}"
        )
    shown = values != image.info["transparency"] if "transparency" in image.info else None
    values *= 255 / brightest  # in place, as large pictures take much memory
    values += 0.5
    grey = Image.fromarray(values.astype(np.uint8))
    if shown is not None:
        grey.putalpha(Image.fromarray(np.where(shown, np.uint8(255), np.uint8(0))))
    return grey


def _in_srgb(image: Image.Image, profile: bytes | None, name: object) -> Image.Image:
    """Convert an image without transparency to RGB, its colours as the profile defines them."""
    try:
        if image.mode == "LAB" and not profile:
            profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        if profile:
            mode, transform = _to_srgb(profile)
            if image.mode in ("CMYK", "LAB") or mode in ("CMYK", "LAB"):
                fits = image.mode == mode
            else:
                fits = mode == "RGB" or image.mode in ("1", "L")
            if not fits:
                raise ValueError(f"it is for mode {mode}, and the picture has mode {image.mode}")
            if transform is not None:
                image = transform.apply(image.convert(mode))
    except Exception as error:  # profiles may contain anything
        warnings.warn(
            f"the colour profile of {name} can't be used, so its colours are read without it: "
            f"{error}",
            stacklevel=2,
        )
    try:
        image = image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode}, which can't be turned into RGB") from error
    image.info.pop("icc_profile", None)
    return image


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode that a colour profile is for, and its transform to sRGB.

    The transform is None for profiles of sRGB itself: values then stay as they are.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = PROFILE_MODES[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode not in ("RGB", "L"):
        return mode, transform
    colours = list(product(range(0, 256, 15), repeat=len(mode)))
    probe = Image.frombytes(mode, (len(colours), 1), bytes(chain.from_iterable(colours)))
    moved = ImageChops.difference(probe.convert("RGB"), transform.apply(probe))
    return mode, None if max(moved.tobytes()) <= SAME else transform
