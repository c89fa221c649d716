"""Pictures and tars for the tests of training data."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture_bytes(kind="JPEG", height=32, width=48, seed=0, **options):
    """Return the bytes of a file with a picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), kind, **options)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of_chunks(*chunks):
    """Return a PNG of chunks, given as pairs of name and data; IEND is added."""
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (*chunks, (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data


def png_claiming(width, height):
    """Return a PNG of a few bytes that claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_of_chunks((b"IHDR", header), (b"IDAT", zlib.compress(b"")))


def animation(kind="GIF"):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


def damaged_png():
    """Return a PNG with a valid header and end, but damaged pixels."""
    data = bytearray(picture_bytes("PNG"))
    middle = data.index(b"IDAT") + 100
    data[middle : middle + 50] = bytes(50)
    return bytes(data)


def write_files(folder, files):
    """Write files from their bytes or texts, by path."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def tar_bytes(members, format=tarfile.PAX_FORMAT):
    """Return a tar of (name, content) pairs. A member without content is a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
                tar.addfile(info)
                continue
            content = content.encode() if isinstance(content, str) else content
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()
