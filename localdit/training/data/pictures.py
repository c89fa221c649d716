"""Pictures of training data: their headers and their pixels.

Scanning a million files must not decode them. `inspect_picture` reads the header and checks the end
of the file for signs that it was cut off. `read_picture` raises what only decoding shows.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import ImageOps

from localdit.images import (
    ImageTooLarge,
    NotAnImage,
    fit_image,
    load_image,
    open_image,
    upright_size,
)
from localdit.training.data.buckets import Size
from localdit.training.data.samples import Blob, BrokenSample, Readable

# Bytes at the end of a file that are searched for the end marker: at first, then if it is missing.
TAIL, LONG_TAIL = 256, 256 * 1024
JPEG_END = b"\xff\xd9"
FOREIGN_TO_JPEG = re.compile(rb"\xff[^\x00\xff\xc4\xd0-\xd7\xda\xdb\xdd\xfe]")  # among pixels
XMP = b"XML:com.adobe.xmp"  # a text in a PNG, also with the orientation
DRAFT = 2  # a JPEG is decoded at a smaller scale if that leaves this many times the size
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    **{b"P%d" % number: "PPM" for number in range(1, 7)},
}


def inspect_picture(image: Readable) -> tuple[int, int]:
    """Return the size of a picture, from its header.

    Args:
        image: the stored picture. Only a few kilobytes of files and tars are read.

    Returns:
        Height and width in pixels, upright.

    Raises:
        BrokenSample: if header or end show that it can't be used. Only JPEG, PNG, WebP and BMP
            files have their ends checked. Other kinds that are cut off fail when decoded.
    """
    with _opened(image) as file:
        kind = _recognize(file)
        if _is_cut_off(kind, file):
            raise BrokenSample("truncated", f"the end of the {kind} is missing")
        behind = kind == "PNG" and _has_orientation_behind(file)
        file.seek(0)
        with _broken_if_undecodable(kind, file), open_image(file, "the picture") as picture:
            if behind:  # rare, and only decoding comes to it
                picture.load()
            # Phones store depth or brightness maps as further pictures (MPO) of a photograph.
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise BrokenSample("animated")
            width, height = upright_size(picture)
            if not width * height:
                raise BrokenSample("damaged", f"{height} x {width} pixels")
            return height, width


def read_picture(image: Readable, size: Size, flip: bool = False) -> torch.Tensor:
    """Decode a picture, scale it to cover `size`, and crop two opposite edges.

    Args:
        size: height and width in pixels.
        flip: mirror it, left to right.

    Returns:
        (3, height, width) uint8.

    Raises:
        BrokenSample: if it is not a picture, or can't be decoded.
    """
    with _opened(image) as file:
        kind = _recognize(file)
        data = io.BytesIO(file.read())
    with _broken_if_undecodable(kind, data), open_image(data, "the picture") as picture:
        side = DRAFT * max(size)
        picture.draft(None, (side, side))
        fitted = fit_image(load_image(picture, "the picture"), size.height, size.width)
    pixels = np.array(ImageOps.mirror(fitted) if flip else fitted)  # (H, W, 3) uint8
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class _Window(io.RawIOBase):
    """A part of a file, as a file object."""

    def __init__(self, blob: Blob) -> None:
        self._file = io.FileIO(blob.path)
        self._start = blob.offset
        end = os.fstat(self._file.fileno()).st_size
        self._size = end - blob.offset if blob.size is None else blob.size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._size - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _opened(image: Readable) -> Iterator[BinaryIO]:
    """Open a picture's bytes as a file; an error of reading becomes a BrokenSample."""
    try:
        if isinstance(image, Blob):
            whole = image.offset == 0 and image.size is None
            raw = io.FileIO(image.path) if whole else _Window(image)
            file = cast(BinaryIO, io.BufferedReader(raw))
        else:
            file = io.BytesIO(image.read())
        with file:
            yield file
    except FileNotFoundError as error:
        raise BrokenSample("missing", str(error)) from error
    except OSError as error:
        raise BrokenSample("unreadable", str(error)) from error


@contextmanager
def _broken_if_undecodable(kind: str, file: BinaryIO) -> Iterator[None]:
    try:
        yield
    except BrokenSample:
        raise
    except ImageTooLarge as error:
        raise BrokenSample("too large", str(error)) from error
    except Exception as error:  # Pillow raises anything on damaged data
        detail = (
            f"the header of the {kind} can't be read" if isinstance(error, NotAnImage) else error
        )
        cut = _is_cut_off(kind, file) or "truncated" in str(error)
        raise BrokenSample("truncated" if cut else "damaged", str(detail)) from error


def _recognize(file: BinaryIO) -> str:
    """Return the kind of picture by its first bytes; the file is left at its start."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise BrokenSample("empty")
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    raise BrokenSample("wrong type", f"it starts with {head[:8]!r}")


def _is_cut_off(kind: str, file: BinaryIO) -> bool:
    """Return whether the end of a file is missing, for the kinds that allow a cheap check."""
    checks = {
        "BMP": _bmp_cut_off,
        "JPEG": _jpeg_cut_off,
        "PNG": _png_cut_off,
        "WEBP": _webp_cut_off,
    }
    return kind in checks and checks[kind](file)


def _jpeg_cut_off(file: BinaryIO) -> bool:
    if JPEG_END in _tail(file, TAIL):
        return False
    # Phones append films to photographs. Pixel data has no end marker and no marker foreign to
    # JPEG; a film has the latter. A small picture in the header may have an end marker, too: the
    # header is skipped.
    data = _tail(file, LONG_TAIL)
    at = 2 if data.startswith(b"\xff\xd8") else 0
    while at and data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.find(JPEG_END, at) < 0 and FOREIGN_TO_JPEG.search(data, at) is None


def _png_cut_off(file: BinaryIO) -> bool:
    return b"IEND" not in _tail(file, TAIL) and b"IEND" not in _tail(file, LONG_TAIL)


def _has_orientation_behind(file: BinaryIO) -> bool:
    """Return whether a PNG has chunks behind its pixels that may say how to turn it."""
    raw = getattr(file, "raw", file)  # a buffer would read all the pixels
    start, behind = raw.tell(), False
    raw.seek(8)
    while len(head := raw.read(8 + len(XMP))) >= 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if behind and (kind == b"eXIf" or head[8:].startswith((XMP, b"Raw profile"))):
            break
        behind = behind or kind == b"IDAT"
        raw.seek(8 + length + 4 - len(head), os.SEEK_CUR)
    raw.seek(start)
    return len(head) >= 8


def _webp_cut_off(file: BinaryIO) -> bool:
    file.seek(4)
    return 8 + int.from_bytes(file.read(4), "little") > file.seek(0, os.SEEK_END)


def _bmp_cut_off(file: BinaryIO) -> bool:
    file.seek(2)
    return int.from_bytes(file.read(4), "little") > file.seek(0, os.SEEK_END)


def _tail(file: BinaryIO, most: int) -> bytes:
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - most))
    return file.read()
