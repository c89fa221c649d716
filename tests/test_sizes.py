"""Sizes: pixels per token, the nearest sizes that work, and proportions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdit.config import Config
from localdit.errors import Field
from localdit.sizes import (
    ModelSizes,
    check_size,
    folder_with_part,
    pixels_per_latent,
    proportional_size,
    read_sizes,
)
from localdit.utils import model_in_the_box


def write(path, **config):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def test_the_sizes_of_a_pipeline_folder_come_from_its_json_files(tmp_path):
    write(tmp_path / "model_index.json")
    write(tmp_path / "transformer/config.json", sample_size=32, patch_size=1)
    write(tmp_path / "vae/config.json", encoder_block_out_channels=[128] * 6)
    sizes = read_sizes(tmp_path, Config())
    assert sizes == ModelSizes(sample_size=32, patch_size=1, pixels_per_latent=32)
    assert (sizes.pixels_per_token, sizes.side) == (32, 1024)


def test_the_sizes_of_other_checkpoints_come_from_the_config_and_its_autoencoder(tmp_path):
    write(tmp_path / "vae/config.json", block_out_channels=[4, 4, 8])
    config = Config(vae=tmp_path, patch_size=4, sample_size=16)
    assert read_sizes(tmp_path / "weights.pt", config) == ModelSizes(16, 4, 4)
    write(tmp_path / "transformer/config.json", patch_size=2)
    assert read_sizes(tmp_path / "transformer", config) == ModelSizes(16, 2, 4)


def test_an_autoencoder_of_the_hub_has_8_pixels_per_latent(tmp_path):
    assert read_sizes(tmp_path / "weights.pt", Config()) == ModelSizes(128, 2, 8)


def test_the_sizes_of_the_box():
    assert read_sizes(model_in_the_box(), Config()) == ModelSizes(16, 2, 16)


def test_a_student_finds_the_folder_that_it_really_lies_in(tmp_path, monkeypatch):
    write(tmp_path / "teacher/vae/config.json", block_out_channels=[4] * 6)
    write(tmp_path / "teacher/student/model_index.json", _shares_parts=True)
    write(tmp_path / "teacher/student/transformer/config.json")
    (tmp_path / "link").symlink_to(tmp_path / "teacher/student")
    for working, name in (("teacher/student/transformer", ".."), ("teacher/student", "."),
                          (".", "link"), (".", "teacher/student")):  # fmt: skip
        monkeypatch.chdir(tmp_path / working)
        assert folder_with_part(Path(name), "vae") == tmp_path / "teacher"
        assert pixels_per_latent(Path(name)) == 32


def test_a_size_beyond_all_floats_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 16 pixels, got 16000.*0000\.$"):
        check_size(Field("width"), 16 * 10**400, 16)


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        (770, "768 or 784"),
        (1020, "1008 or 1024"),
        (0, "16"),
        (-16, "16"),
        (7.5, "16"),
        (2**20 + 16, "1048576"),
        (32_000_000_000, "1048576"),
    ],
)
def test_a_size_that_does_not_work_is_refused_with_the_nearest_that_do(value, nearest):
    with pytest.raises(ValueError) as raised:
        check_size(Field("height"), value, 16)
    assert str(raised.value) == (
        f"height must be a positive multiple of 16 pixels, got {value!r}; the nearest that work: "
        f"{nearest}."
    )


@given(st.integers(-100, 5000), st.sampled_from([8, 16, 32]))
def test_sizes_are_accepted_or_the_nearest_that_work_are_named(value, multiple):
    if value > 0 and value % multiple == 0:
        check_size(Field("height"), value, multiple)
        return
    with pytest.raises(ValueError, match=f"height .* {multiple} pixels, got {value};") as error:
        check_size(Field("height"), value, multiple)
    named = [int(size) for size in re.findall(r"\d+", str(error.value).split(";")[1])]
    working = range(multiple, 6000, multiple)
    assert min(working, key=lambda size: abs(size - value)) in named
    assert set(named) <= set(working)


@pytest.mark.parametrize("value", [64.0, "64", True, None, float("nan")])
def test_a_size_is_an_integer(value):
    with pytest.raises(ValueError, match="width must be"):
        check_size(Field("width"), value, 16)


def test_a_numpy_integer_is_a_size():
    check_size(Field("width"), np.int64(64), 16)


def test_sizes_that_work_are_accepted():
    check_size(Field("width"), 768, 16)
    check_size(Field("width"), 96, 32)


@pytest.mark.parametrize(
    ("size", "pixels", "given", "expected"),
    [
        ((400, 300), 128 * 128, (None, None), (112, 144)),
        ((96, 48), 64 * 64, (None, None), (48, 96)),
        ((300, 400), 1024 * 768, (None, None), (1024, 768)),
        ((400, 300), 1, (96, None), (96, 128)),
        ((400, 300), 1, (None, 64), (48, 64)),
        ((400, 300), 1, (32, 64), (32, 64)),
        ((640, 10), 128 * 128, (None, None), (16, 1024)),
        ((5000, 10), 1, (16, None), (16, 8000)),
    ],
)
def test_sizes_with_proportions(size, pixels, given, expected):
    assert proportional_size(size, pixels, 16, *given) == expected


@pytest.mark.parametrize("size", [(5000, 10), (1, 3000)])
def test_a_picture_too_narrow_for_its_proportions_is_refused(size):
    """One token is its shortest side, which would give it several times as many pixels."""
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels can't .* crop it, or give"):
        proportional_size(size, 128 * 128, 16)


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**7))
def test_the_number_of_pixels_is_about_that_which_was_promised(width, height, pixels):
    try:
        drawn = proportional_size((width, height), pixels, 16)
    except ValueError:
        return
    assert drawn[0] * drawn[1] <= 2.25 * pixels
