"""Mutated pictures: each is read as a picture, or refused with a documented error."""

import contextlib
import random

import pytest
from PIL import Image

from localdit.images import MAX_PIXELS, load_image, load_mask
from localdit.training.data.buckets import Size
from localdit.training.data.pictures import inspect_picture, read_picture
from localdit.training.data.samples import Blob, BrokenSample
from tests.robustness.mutations import bounded, mutated
from tests.training.data.drawn import animation, encode, picture_bytes

KINDS = {
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P"),
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "WEBP": ("RGB", "RGBA"),
}


def originals():
    """Return sound pictures of every kind and mode, with orientation, profile and animation."""
    noise = Image.effect_noise((24, 16), 80)
    pictures = [
        encode(noise.convert("I").convert(mode) if mode == "I;16" else noise.convert(mode), kind)
        for kind, modes in KINDS.items()
        for mode in modes
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = [picture_bytes(kind, 16, 24, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    return [*pictures, *turned, animation("GIF"), animation("WEBP")]


def try_pictures(folder, seeds):
    sound, path = originals(), folder / "picture"
    read = 0
    for seed in seeds:
        rng = random.Random(seed)
        path.write_bytes(mutated(rng.choice(sound), rng))
        with bounded(f"picture {seed}"):
            size = loaded(path)
            trained(path)
            masked(path)
        read += size is not None
    return read


def loaded(path):
    try:
        picture = load_image(path)
    except ValueError:
        return None
    assert picture.mode == "RGB" and 0 < picture.width * picture.height <= MAX_PIXELS
    return picture.size


def trained(path):
    try:
        height, width = inspect_picture(Blob(str(path)))
        pixels = read_picture(Blob(str(path)), Size(16, 16))
    except BrokenSample:
        return
    assert height > 0 and width > 0
    assert pixels.shape == (3, 16, 16)


def masked(path):
    with contextlib.suppress(ValueError):
        assert load_mask(path).mode == "L"


def test_sound_pictures_are_read(tmp_path):
    for number, data in enumerate(originals()):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert loaded(path) in {(24, 16), (16, 24), (16, 16)}


@pytest.mark.filterwarnings("ignore")
def test_some_mutated_pictures(tmp_path):
    assert 0 < try_pictures(tmp_path, range(100)) < 100


@pytest.mark.robustness
@pytest.mark.filterwarnings("ignore")
def test_mutated_pictures(tmp_path):
    assert 0 < try_pictures(tmp_path, range(3000)) < 3000
