"""Tests of the sizes in headers, of pixels, and of all kinds of broken pictures."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from localdit.images import load_image
from localdit.pipelines.image_inputs import read_images
from localdit.training.data.buckets import Size
from localdit.training.data.pictures import LONG_TAIL, inspect_picture, read_picture
from localdit.training.data.samples import Blob, BrokenSample
from tests.test_images import SWAPPED
from tests.training.data.drawn import (
    animation,
    damaged_png,
    encode,
    picture_bytes,
    png_claiming,
    png_of_chunks,
)

KINDS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]


class Bytes:
    """A picture that is neither a file nor a member of a tar."""

    def __init__(self, data):
        self.data = data

    def read(self):
        return self.data


def stored(tmp_path, data):
    """Return the same bytes as a file, as a part of a file, and in memory."""
    alone, within = tmp_path / "alone", tmp_path / "within"
    alone.write_bytes(data)
    within.write_bytes(b"before" + data + b"after" * 1000)
    return [Blob(str(alone)), Blob(str(within), 6, len(data)), Bytes(data)]


def kind_of(function, *arguments):
    with pytest.raises(BrokenSample) as raised:
        function(*arguments)
    return raised.value.kind


@pytest.mark.parametrize("kind", KINDS)
def test_healthy_pictures(tmp_path, kind):
    data = picture_bytes(kind, height=40, width=64)
    (tmp_path / "picture").write_bytes(data)
    expected = np.asarray(load_image(tmp_path / "picture"))
    for image in stored(tmp_path, data):
        assert inspect_picture(image) == (40, 64)
        pixels = read_picture(image, Size(40, 64))
        assert pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        mirrored = read_picture(image, Size(40, 64), flip=True)
        assert torch.equal(mirrored, pixels.flip(2))


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_a_missing_end_is_found_without_decoding(tmp_path, kind, share, monkeypatch):
    data = picture_bytes(kind, 256, 256)
    cut = data[: int(share * len(data))]
    for image in stored(tmp_path, cut):
        assert kind_of(read_picture, image, Size(64, 64)) == "truncated"
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for image in stored(tmp_path, cut):
        assert kind_of(inspect_picture, image) == "truncated"


@pytest.mark.parametrize("kind", ["GIF", "PPM", "TIFF"])
def test_a_missing_end_of_other_kinds_is_found_when_decoding(tmp_path, kind):
    data = picture_bytes(kind, 256, 256)
    for image in stored(tmp_path, data[: len(data) // 2]):
        assert kind_of(read_picture, image, Size(64, 64)) == "truncated"


def test_photographs_with_appended_data_or_a_preview(tmp_path):
    photograph = picture_bytes("JPEG", 256, 256)
    film = np.random.default_rng(0).bytes(5000).replace(b"\xff\xd9", b"")
    for image in stored(tmp_path, photograph + film):
        assert inspect_picture(image) == (256, 256)
        assert read_picture(image, Size(64, 64)).shape == (3, 64, 64)
    film = np.random.default_rng(0).bytes(500_000).replace(b"\xff\xd9", b"")
    assert inspect_picture(Bytes(photograph + film)) == (256, 256)
    preview = b"Exif\0\0" + picture_bytes("JPEG", 16, 16)
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    with_preview = photograph[:2] + segment + photograph[2:]
    assert inspect_picture(Bytes(with_preview)) == (256, 256)
    assert kind_of(inspect_picture, Bytes(with_preview[:-1000])) == "truncated"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF", "WEBP"])
def test_sizes_and_pixels_belong_to_the_upright_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (64, 32), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 31, 15), fill="black")
    image = Bytes(encode(picture, kind, exif=exif))
    upright = load_image(Image.open(io.BytesIO(image.read())))
    assert inspect_picture(image) == (upright.height, upright.width)
    pixels = read_picture(image, Size(upright.height, upright.width))
    assert torch.equal(pixels, torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def turned_png(*behind):
    """A PNG of 2 x 1 pixels with chunks behind its pixels."""
    header = struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\xc8\x10")
    halves = (b"IDAT", pixels[:5]), (b"IDAT", pixels[5:])
    return png_of_chunks((b"IHDR", header), *halves, *behind)


def test_the_orientation_of_a_png_may_stand_behind_its_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x xmlns:tiff="a" tiff:Orientation="6"/>'
    long = (b"tEXt", b"note\0" + b"a" * 2 * LONG_TAIL)
    for chunk in ((b"eXIf", exif.tobytes()[6:]), (b"iTXt", xmp)):
        for image in stored(tmp_path, turned_png((b"tEXt", b"date\0"), chunk, long)):
            assert inspect_picture(image) == (2, 1)
            assert read_picture(image, Size(2, 1)).flatten().tolist() == [200, 16] * 3
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for image in stored(tmp_path, turned_png((b"tEXt", b"date\0"))):
        assert inspect_picture(image) == (1, 2)


def test_training_reads_the_pixels_that_pipelines_read():
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    for picture in (rgba, rgba.convert("LA"), rgba.convert("P"), rgba.convert("1")):
        for options in ({}, {"icc_profile": SWAPPED}):
            data = encode(picture, "PNG", **options)
            expected = read_images(Image.open(io.BytesIO(data)), 4)
            pixels = read_picture(Bytes(data), Size(12, 20))
            assert torch.equal(pixels[None] / 255, expected)


def test_pictures_are_scaled_to_cover_and_cropped_in_the_middle():
    picture = Image.new("RGB", (96, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))
    pixels = read_picture(Bytes(encode(picture, "PNG")), Size(16, 16))
    assert pixels.shape == (3, 16, 16)
    assert pixels[2].float().mean() > 250
    assert pixels[0].float().mean() < 5


def test_a_large_photograph_decoded_at_a_smaller_scale_looks_the_same(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    jpeg, png = encode(smooth, "JPEG", quality=95), encode(smooth, "PNG")
    small = read_picture(Bytes(jpeg), Size(128, 128)).float()
    assert (small - read_picture(Bytes(png), Size(128, 128)).float()).abs().mean() < 1.5


def test_unusable_pictures_are_broken(tmp_path):
    for data, kind in [
        (b"", "empty"),
        (b"<svg/>", "wrong type"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "wrong type"),
        (png_claiming(20_000, 20_000), "too large"),
        (png_claiming(8_001, 8_000), "too large"),
        (animation("GIF"), "animated"),
        (animation("PNG"), "animated"),
        (animation("WEBP"), "animated"),
        (animation("TIFF"), "animated"),
        (b"BM" + bytes(100), "damaged"),
    ]:
        for image in stored(tmp_path, data):
            assert kind_of(inspect_picture, image) == kind
    assert kind_of(inspect_picture, Blob(str(tmp_path / "gone.png"))) == "missing"
    assert kind_of(read_picture, Blob(str(tmp_path / "gone.png")), Size(8, 8)) == "missing"
    assert kind_of(inspect_picture, Blob(str(tmp_path))) == "unreadable"


def test_damage_that_only_decoding_finds(tmp_path):
    for image in stored(tmp_path, damaged_png()):
        assert inspect_picture(image) == (32, 48)
        assert kind_of(read_picture, image, Size(32, 32)) == "damaged"


def test_several_pictures_in_a_file_of_a_phone_are_not_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    image = Bytes(encode(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert inspect_picture(image) == (16, 16)
    assert read_picture(image, Size(16, 16))[0].min() > 250


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_truncated_photograph_costs_little(progressive):
    data = picture_bytes("JPEG", 1500, 1500, progressive=progressive, quality=95)
    assert len(data) > 8 * LONG_TAIL
    costs = []
    for share in (0.9, 0.6, 0.3):
        start = time.perf_counter()
        assert kind_of(inspect_picture, Bytes(data[: int(share * len(data))])) == "truncated"
        costs.append(time.perf_counter() - start)
    assert min(costs) < 0.005


def test_only_a_little_of_a_large_file_is_read(tmp_path):
    big = tmp_path / "big.bmp"
    Image.new("RGB", (6000, 4000)).save(big)  # 72 MB
    start = time.perf_counter()
    assert inspect_picture(Blob(str(big))) == (4000, 6000)
    inspected = time.perf_counter()
    big.read_bytes()
    assert inspected - start < (time.perf_counter() - inspected) / 3
