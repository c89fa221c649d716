"""Reading odd pictures pixel by pixel, refusing hostile ones, and PNGs with their settings."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from localdit import images
from localdit.images import (
    fit_image,
    fit_mask,
    image_grid,
    load_image,
    prepare_output_folder,
    read_metadata,
    save_image,
)
from tests.training.data.drawn import encode, png_claiming, png_of_chunks


def pixels(image):
    assert image.mode == "RGB"
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "see_through.png", transparency=1)
    assert pixels(load_image(tmp_path / "plain.png")) == [(255, 0, 0), (0, 0, 255)]
    assert pixels(load_image(tmp_path / "see_through.png")) == [(255, 0, 0), (255, 255, 255)]


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)])
    assert pixels(load_image(image)) == [(10, 20, 30), (255, 255, 255), (204, 204, 204)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(7, 255), (7, 0)])
    assert pixels(load_image(grey)) == [(7, 7, 7), (255, 255, 255)]


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cyan.tif")
    assert set(pixels(load_image(tmp_path / "cyan.tif"))) == {(0, 255, 255)}
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "black.jpg")
    assert max(max(p) for p in pixels(load_image(tmp_path / "black.jpg"))) <= 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 65535, 128, 129]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    loaded = load_image(tmp_path / f"deep.{suffix}")
    assert [p[0] for p in pixels(loaded)] == [0, 1, 128, 255, 0, 1]


def test_16_bit_colour_png(tmp_path):
    row = b"\x00" + struct.pack(">6H", 65535, 0, 0x8000, 0x1234, 0x00FF, 0xFF00)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = png_of_chunks((b"IHDR", header), (b"IDAT", zlib.compress(row)))
    (tmp_path / "deep.png").write_bytes(data)
    assert pixels(load_image(tmp_path / "deep.png")) == [(255, 0, 0x80), (0x12, 0, 0xFF)]


def test_integer_and_float_grey_outside_their_range_are_refused():
    assert pixels(load_image(Image.new("I", (1, 1), 65535))) == [(255, 255, 255)]
    assert pixels(load_image(Image.new("F", (1, 1), 0.5))) == [(128, 128, 128)]
    with pytest.raises(ValueError, match="mode I and values from 70000 to 70000"):
        load_image(Image.new("I", (1, 1), 70000))
    with pytest.raises(ValueError, match=r"mode F .* 200; expected 0 to 1\.0"):
        load_image(Image.new("F", (1, 1), 200.0))
    with pytest.raises(ValueError, match="nan"):
        load_image(Image.new("F", (1, 1), float("nan")))


def test_greyscale_and_one_bit():
    assert pixels(load_image(Image.new("L", (1, 1), 77))) == [(77, 77, 77)]
    assert pixels(load_image(Image.new("1", (1, 1), 1))) == [(255, 255, 255)]


def test_exif_orientation_is_applied_once(tmp_path):
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 0), (0, 0, 255)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (1, 2)
    assert pixels(upright) == [(255, 0, 0), (0, 0, 255)]
    assert pixels(load_image(upright)) == pixels(upright)


GREY_HEADER = struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)
GREY = (b"IHDR", GREY_HEADER), (b"IDAT", zlib.compress(b"\0\xc8\x10"))


@pytest.mark.parametrize(
    "depth, row, transparent",
    [(1, b"\x80", 1), (2, b"\xc0", 3), (4, b"\xf0", 15), (8, b"\xff\0", 255),
     (16, b"\x12\x34\0\0", 0x1234)],
)  # fmt: skip
def test_a_transparent_grey_of_any_depth_is_laid_over_white(depth, row, transparent):
    header = struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)
    data = png_of_chunks(
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(b"\0" + row)),
    )
    assert pixels(load_image(io.BytesIO(data))) == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize("exif", [b"", b"junk", b"II*\0\xff\xff\xff\x7f", b"MM\0*" + bytes(99)])
def test_unreadable_orientation_leaves_the_picture_as_it_is(exif):
    data = png_of_chunks(GREY[0], (b"eXIf", exif), GREY[1])
    assert pixels(load_image(io.BytesIO(data))) == [(200, 200, 200), (16, 16, 16)]


@pytest.mark.parametrize("behind", [False, True])
def test_huge_compressed_texts_are_named(behind):
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        start = b"a\0\1\0\0\0" if kind == b"iTXt" else b"a\0\0"
        text = (kind, start + zlib.compress(bytes(2_000_000)))
        if not (behind and kind == b"iCCP"):
            data = png_of_chunks(*([*GREY, text] if behind else [GREY[0], text, GREY[1]]))
            with pytest.raises(ValueError, match="the image has compressed texts or a colour prof"):
                load_image(io.BytesIO(data))
    long = (b"tEXt", b"workflow\0" + b"a" * 2_000_000)
    assert load_image(io.BytesIO(png_of_chunks(GREY[0], long, GREY[1]))).size == (2, 1)


# Colour profiles

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile_with(**renamed):
    """The profile of sRGB with tags renamed."""
    profile = bytearray(SRGB)
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        at = 132 + 12 * i
        name = bytes(profile[at : at + 4]).decode()
        profile[at : at + 4] = renamed.get(name, name).encode()
    return bytes(profile)


SWAPPED = profile_with(rXYZ="gXYZ", gXYZ="rXYZ")  # red and green change places


def grey_profile(gamma=1.0):
    """A profile of grey with a gamma."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    white = b"XYZ \0\0\0\0" + number(0.9642) + number(1.0) + number(0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, len(white), b"kTRC", 176, len(curve))
    size = 128 + len(tags) + len(white) + len(curve)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + number(0.9642) + number(1.0) + number(0.8249)
    return header.ljust(128, b"\0") + tags + white + curve


def meant(image, profile, mode="RGB"):
    """The pixels of an image as its profile defines them, by the library."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    image = image.convert(mode)
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_profile_is_converted_to_srgb_from_every_kind_of_file(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100}
    data = encode(Image.new("RGB", (16, 16), "red"), kind, icc_profile=SWAPPED, **options)
    read = load_image(io.BytesIO(data))
    assert np.abs(np.asarray(read, int) - (0, 255, 0)).max() <= 2
    assert pixels(load_image(read)) == pixels(read)  # once


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "PA", "RGBX", "YCbCr", "HSV"])
def test_a_profile_holds_in_every_mode_of_its_colour_space(mode):
    image = Image.new("RGB", (2, 2), "red")
    image = (image.convert("P") if mode == "PA" else image).convert(mode)
    image.info["icc_profile"] = SWAPPED
    assert np.abs(np.asarray(load_image(image), int) - (0, 255, 0)).max() <= 2
    assert image.info["icc_profile"] == SWAPPED


def test_transparency_is_laid_over_white_after_the_conversion():
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 51))
    image.info["icc_profile"] = SWAPPED
    assert pixels(load_image(image)) == [(204, 255, 204)]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "F", "1"])
def test_grey_profiles(mode):
    profile = grey_profile()
    level = {"1": 255, "F": 0.25, "I;16": 64 * 257}.get(mode, 64)
    image = Image.new(mode, (1, 1), (level, 255) if mode == "LA" else level)
    image.info["icc_profile"] = profile
    expected = meant(Image.new("L", (1, 1), 255 if mode == "1" else 64), profile, "L")
    assert pixels(load_image(image)) == pixels(expected)
    assert mode == "1" or expected.getpixel((0, 0))[0] > 120  # gamma 1 is darker in numbers


def test_lab_is_converted_with_and_without_a_profile():
    lab_profile = ImageCms.createProfile("LAB")
    red = Image.new("RGB", (2, 2), "red")
    srgb = ImageCms.createProfile("sRGB")
    lab = ImageCms.profileToProfile(red, srgb, lab_profile, outputMode="LAB")
    for profile in (None, ImageCms.ImageCmsProfile(lab_profile).tobytes()):
        lab.info["icc_profile"] = profile
        read = np.asarray(load_image(io.BytesIO(encode(lab, "TIFF"))), int)
        assert np.abs(read - (255, 0, 0)).max() < 8


def test_the_profile_of_srgb_changes_no_bit():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.info["icc_profile"] = SRGB
    assert np.array_equal(load_image(image), noise)


@pytest.mark.parametrize(
    "mode, profile",
    [
        ("RGB", b"junk"),
        ("RGB", SRGB[:300]),
        ("RGB", profile_with(rXYZ="none")),
        ("RGB", SRGB[:16] + b"CMYK" + SRGB[20:]),
        ("RGB", SRGB[:16] + b"XYZ " + SRGB[20:]),
        ("RGB", grey_profile()),
        ("CMYK", SRGB),
        ("L", grey_profile()[:150]),
    ],
)
def test_profiles_that_cannot_be_used_are_left_out_with_a_warning(mode, profile):
    image = Image.new("RGB", (2, 2), (30, 60, 90)).convert(mode)
    plain = pixels(load_image(image))
    image.info["icc_profile"] = profile
    with pytest.warns(UserWarning, match="the colour profile of a.png can't be used"):
        assert pixels(load_image(image, "a.png")) == plain


def test_damaged_profiles_never_crash():
    random = np.random.default_rng(0)
    image = Image.new("RGB", (2, 2), "red")
    for _ in range(300):
        profile = bytearray(SRGB)
        for at in random.integers(0, len(profile), 8):
            profile[at] = random.integers(256)
        image.info["icc_profile"] = bytes(profile[: random.integers(len(profile) + 1)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load_image(image).size == (2, 2)


def test_open_files_are_read_and_stay_open():
    file = io.BytesIO(encode(Image.new("RGB", (2, 1), "red"), "PNG"))
    assert pixels(load_image(file, "upload.png")) == [(255, 0, 0)] * 2
    with pytest.raises(ValueError, match=r"upload\.png is not an image"):
        load_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "upload.png")


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert set(pixels(load_image(tmp_path / "two.gif"))) == {(255, 0, 0)}


def test_the_given_image_is_not_changed():
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    load_image(image)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (1, 2, 3, 4)


@pytest.mark.parametrize("size", [(10_000, 10_000), (8_001, 8_000), (30_000, 30_000)])
def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch, size):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_claiming(*size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"bomb\.png.*too large; at most 64 million pixels"):
        load_image(bomb)


def test_files_that_are_not_images(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png is not an image"):
        load_image(text)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path)
    postscript = tmp_path / "page.eps"
    postscript.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ValueError, match="not an image of the kinds BMP, GIF"):
        load_image(postscript)
    with pytest.raises(ValueError, match="the image is empty: 0 x 3"):
        load_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tif"])
def test_truncated_files(tmp_path, suffix):
    whole = tmp_path / f"whole.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for length in (len(data) // 3, 20):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\."):
            load_image(cut)


def test_fit_keeps_proportions_and_cuts_the_edges():
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (2, 0, 6, 4))
    assert fit_image(image, 4, 8) is image
    assert set(pixels(fit_image(image, 4, 4))) == {(0, 0, 255)}
    assert fit_image(image, 32, 16).size == (16, 32)


def test_thin_lines_of_a_mask_stay_marked():
    mask = Image.new("L", (512, 512))
    mask.paste(255, (300, 0, 301, 512))
    fitted = fit_mask(mask, 32, 32)
    assert [x for x in range(32) if fitted.getpixel((x, 5)) >= 128] == [18]
    assert fit_mask(mask, 512, 512).tobytes() == mask.tobytes()
    soft = Image.linear_gradient("L")
    assert fit_mask(soft, 256, 256).tobytes() == soft.tobytes()
    with pytest.raises(ValueError, match="cropped away when its picture of 512 x 512 pixels"):
        fit_mask(mask, 512, 64)


def test_grid():
    images_ = [Image.new("RGB", (2, 1), colour) for colour in ("red", "lime", "blue")]
    sheet = image_grid(images_)
    assert sheet.size == (4, 2)
    corners = [sheet.getpixel(at) for at in ((0, 0), (2, 0), (0, 1), (2, 1))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert image_grid(images_, columns=5).size == (6, 1)
    for bad, columns in (([], None), ([*images_, Image.new("RGB", (3, 1))], None), (images_, 0)):
        with pytest.raises(ValueError, match="grid"):
            image_grid(bad, columns)


def test_a_picture_carries_its_settings(tmp_path):
    settings = {"prompt": "ein Bär\n— 熊 🐻", "seed": 2**63 - 1, "strength": 0.3, "image": None}
    path = save_image(Image.new("RGB", (2, 2), "red"), tmp_path / "a.png", settings)
    assert read_metadata(path) == settings
    with Image.open(path) as image:
        assert image.text["parameters"].startswith("prompt: ein Bär\n— 熊 🐻\nseed: 9223372036")
    assert os.listdir(tmp_path) == ["a.png"]
    assert read_metadata(save_image(Image.new("L", (1, 1)), tmp_path / "b.png")) == {}


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    assert prepare_output_folder("~/out") == tmp_path / "me/out"
    picture = Image.new("RGB", (2, 2), "white")
    assert save_image(picture, "~/out/a.png", {"seed": 1}) == tmp_path / "me/out/a.png"
    assert load_image("~/out/a.png").size == images.load_mask("~/out/a.png").size == (2, 2)
    assert read_metadata("~/out/a.png") == {"seed": 1}
    assert os.listdir(tmp_path) == ["me"]


def test_unreadable_settings(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        read_metadata(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "b.png")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_image(Image.new("RGB", (1, 1), "red"), tmp_path / "a.png")
    before = path.read_bytes()

    def full_disk(self, file, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_image(Image.new("RGB", (1, 1), "blue"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("links", [True, False])
def test_an_existing_file_is_kept_without_overwrite(tmp_path, monkeypatch, links):
    if not links:  # as on some file systems

        def refuse(*args):
            raise OSError("Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.png"
    images.save_image(Image.new("RGB", (4, 4), "red"), path, overwrite=False)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"a\.png already exists"):
        images.save_image(Image.new("RGB", (4, 4), "blue"), path, overwrite=False)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_masks_of_all_kinds(tmp_path):
    half = Image.new("L", (4, 2))
    half.paste(255, (0, 0, 2, 2))
    opaque = Image.merge("RGBA", [half] * 3 + [Image.new("L", (4, 2), 255)])
    for mask in (half, half.convert("1"), half.convert("RGB"), half.convert("P"), opaque):
        read = images.load_mask(mask, (4, 2))
        assert read.mode == "L" and read.tobytes() == half.tobytes()
    half.save(tmp_path / "mask.png")
    assert images.load_mask(tmp_path / "mask.png").tobytes() == half.tobytes()


def test_unusable_masks_are_refused(tmp_path):
    clear = Image.new("LA", (4, 2), (255, 0))
    clear.save(tmp_path / "clear.png")
    for mask in (clear, tmp_path / "clear.png"):
        with pytest.raises(ValueError, match="transparency; expected white to repaint"):
            images.load_mask(mask)
    with pytest.raises(ValueError, match="the mask has 4 x 2 pixels; expected the picture's 2 x 4"):
        images.load_mask(Image.new("L", (4, 2), 255), (2, 4))
    with pytest.raises(ValueError, match="nothing in the mask is white"):
        images.load_mask(Image.new("L", (4, 2), 127))


def test_only_png_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_image(Image.new("RGB", (1, 1)), tmp_path / "a.jpg")


def test_the_output_folder_is_created_and_checked(tmp_path, monkeypatch):
    folder = prepare_output_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output folder .*file/deeper: Not a directory"):
        prepare_output_folder(tmp_path / "file" / "deeper")

    def read_only(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images.tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"can.t write to the output folder .*: Permission denied"):
        prepare_output_folder(folder)
