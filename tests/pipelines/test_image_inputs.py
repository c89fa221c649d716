import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.images import load_mask
from localdit.pipelines.image_inputs import REPAINTED, read_images, read_masks, scale_images

ARRAY = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
PICTURE = Image.fromarray(ARRAY)
TENSOR = torch.from_numpy(ARRAY).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    "image",
    [PICTURE, ARRAY, ARRAY / 255, ARRAY[None], TENSOR, TENSOR[None], (TENSOR * 255).byte()],
    ids=["pil", "uint8", "float", "batch", "tensor", "tensor batch", "uint8 tensor"],
)
def test_every_kind_of_image_reads_the_same(image):
    read = read_images(image, 4)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, TENSOR[None], atol=1 / 255, rtol=0)
    assert read_images([image, image], 4).shape == (2 * len(read), 3, 12, 20)


def test_modes_are_converted_with_transparency_over_white():
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert torch.equal(read_images(clear, 4), torch.ones(1, 3, 16, 16))
    assert read_images(PICTURE.convert("CMYK"), 4).shape == (1, 3, 12, 20)
    assert read_images(PICTURE.convert("P"), 4).shape == (1, 3, 12, 20)
    deep = Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16))
    torch.testing.assert_close(read_images(deep, 4), torch.full((1, 3, 16, 16), 128 / 255))


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
        lambda a: np.asfortranarray(a),
        lambda a: np.ascontiguousarray(a.transpose(1, 0, 2)).transpose(1, 0, 2),
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a.astype(a.dtype.newbyteorder("S")),
        lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),  # can't be written to
    ],
    ids=["BGR", "upside down", "Fortran", "transposed", "strided", "swapped bytes", "read-only"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, np.longdouble])
def test_arrays_of_every_memory_layout_read_the_same(laid_out, dtype):
    array = ARRAY if dtype == np.uint8 else (ARRAY / 255).astype(dtype)
    before = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = read_images(laid_out(array), 4)
    assert torch.equal(read, read_images(array, 4))
    assert torch.equal(read_masks(laid_out(array)), read_masks(array))
    assert np.array_equal(array, before)


def test_a_coloured_mask_means_the_same_everywhere():
    """Green is repainted, magenta is kept, in Python and on the command line."""
    expected = np.asarray(load_mask(PICTURE), np.float32) / 255
    for mask in (PICTURE, PICTURE.convert("RGBA")):
        assert np.array_equal(read_masks(mask)[0, 0], expected)
    for mask in (ARRAY, ARRAY / 255, TENSOR, TENSOR[None]):  # not rounded to 255ths
        np.testing.assert_allclose(read_masks(mask)[0, 0], expected, atol=0.51 / 255)
    for colour, repainted in (("lime", True), ("magenta", False), ("white", True)):
        picture = Image.new("RGB", (16, 16), "white")
        picture.paste(colour, (0, 0, 8, 16))
        for mask in (picture, np.array(picture), np.array(picture) / 255):
            read = read_masks(mask)
            assert bool(read[0, 0, 0, 0] >= REPAINTED) == repainted
            assert read[0, 0, 0, 15] == 1


@pytest.mark.parametrize("alpha", [255, 0, 128])
def test_a_tensor_with_alpha_is_not_taken_for_latents(alpha):
    layer = torch.full((1, 12, 20), alpha, dtype=torch.uint8)
    rgba = torch.cat([(TENSOR * 255).byte(), layer])
    for given in (rgba, rgba[None], rgba.float() / 255, rgba.half() / 255, rgba.long(), [rgba]):
        with pytest.raises(ValueError, match="4 channels, as latents have, but no negative value"):
            read_images(given, 4)
    with pytest.raises(ValueError, match="must have 3 or 16 channels"):
        read_images(rgba, 16)


def turned(image, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "P"])
def test_pictures_and_masks_are_turned_upright_in_every_mode(mode):
    mask = Image.new("L", (20, 12))
    mask.paste(255, (0, 0, 10, 12))
    given = mask.convert("RGB" if mode == "P" else "L").convert(mode)
    upright = torch.zeros(1, 1, 20, 12)
    upright[:, :, :10] = 1
    assert torch.equal(read_masks(turned(given)), upright)
    assert torch.equal(read_images(turned(given), 4), upright.expand(1, 3, 20, 12))


def test_latents_may_have_any_range():
    latents = 5 * torch.randn(2, 4, 8, 8)
    assert torch.equal(read_images(latents, 4), latents)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([], ValueError, "empty list"),
        (None, TypeError, "got NoneType"),
        ("picture.png", TypeError, "got str"),
        ([PICTURE, 3], TypeError, "got int"),
        (np.zeros((12, 20)), ValueError, r"must have 3 channels, as \(H, W, C\)"),
        (np.zeros((12, 20, 4)), ValueError, "must have 3 channels"),
        (torch.zeros(2, 12, 20), ValueError, "must have 3 or 4 channels"),
        (torch.zeros(12, 20), ValueError, "must have 3 or 4 channels"),
        (torch.zeros(3, 0, 20), ValueError, "channels"),
        (2 * TENSOR - 1, ValueError, r"must lie in \[0, 1\]"),
        (ARRAY.astype(np.float32), ValueError, r"must lie in \[0, 1\]"),
        (TENSOR * float("nan"), ValueError, "NaN"),
        (ARRAY.astype(np.complex64), TypeError, "floats in .* got complex64"),
        (ARRAY.astype(object), TypeError, "floats in .* got object"),
        (ARRAY.astype(np.uint16), ValueError, r"must lie in \[0, 1\]"),
        (TENSOR * 1j, TypeError, "real numbers, got torch.complex64"),
        (TENSOR.to_sparse(), TypeError, "dense tensor"),
        ([PICTURE, PICTURE.resize((16, 16))], ValueError, r"differ .* \(16, 16, 3\), \(20, 12, 3"),
    ],
)
def test_anything_but_images_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        read_images(image, 4)


MASK = ARRAY[..., 0] > 127
GREY = np.where(MASK, np.uint8(255), np.uint8(0))


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert("1"),
        Image.fromarray(GREY).convert("P"),
        Image.fromarray(GREY).convert("RGB"),
        Image.merge("LA", [Image.new("L", (20, 12), 255), Image.fromarray(GREY)]),
        MASK,
        GREY,
        MASK.astype(np.float64),
        GREY[..., None],
        np.stack([GREY] * 3, axis=-1)[None],
        torch.from_numpy(MASK),
        torch.from_numpy(GREY)[None],
        torch.from_numpy(MASK)[None, None].float(),
        torch.from_numpy(GREY).expand(1, 3, 12, 20),
    ],
    ids=lambda mask: f"{type(mask).__name__} {getattr(mask, 'mode', getattr(mask, 'shape', None))}",
)
def test_every_kind_of_mask_reads_the_same(mask):
    read = read_masks(mask)
    assert read.dtype == torch.float32
    assert torch.equal(read, torch.from_numpy(MASK)[None, None].float())
    assert torch.equal(read_masks([mask, mask]), torch.cat([read, read]))


def test_masks_may_be_soft():
    assert torch.equal(read_masks(np.full((12, 20), 0.75)), torch.full((1, 1, 12, 20), 0.75))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (None, TypeError, "mask_image must be a PIL image, .* got NoneType"),
        ([], ValueError, "mask_image is an empty list"),
        (np.zeros((12, 20, 4)), ValueError, "mask_image must have 1 or 3 channels"),
        (torch.zeros(2, 12, 20), ValueError, "mask_image must have 1 or 3 channels"),
        (np.full((12, 20), 255.0), ValueError, r"values of mask_image must lie in \[0, 1\]"),
        (np.full((12, 20), np.nan), ValueError, "mask_image contains NaN"),
        (np.zeros((12, 20)), ValueError, "no value of 0.5 or more"),
        ([MASK, np.zeros((12, 20))], ValueError, "no value of 0.5 or more"),
        (Image.new("RGBA", (20, 12), (255, 255, 255, 0)), ValueError, "no value of 0.5 or more"),
        ([MASK, MASK[:6]], ValueError, "given as mask_image differ"),
    ],
)
def test_anything_but_masks_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        read_masks(mask)


def test_scaling_stays_in_range_and_keeps_what_fits():
    images = (torch.rand(1, 3, 12, 20) > 0.5).float()
    scaled = scale_images(images, 32, 16)
    assert scaled.shape == (1, 3, 32, 16)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert torch.equal(scale_images(images, 12, 20), images)
    flat = torch.full((1, 3, 12, 20), 0.25)
    torch.testing.assert_close(scale_images(flat, 6, 40), torch.full((1, 3, 6, 40), 0.25))
