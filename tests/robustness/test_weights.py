"""Mutated weights: each file is loaded with finite values, or refused with a `ValueError`."""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from localdit.models import LocalDiTTransformer2DModel
from tests.checkpoint.flat import TINY, flat_state, tiny_model
from tests.robustness.mutations import bounded, mutated

HOSTILE = (
    0, -1, 1, 10**9, 10**30, 1.5, float("nan"), True, None, "", "8", "x" * 100_000, [], [1] * 1000,
    {}, [[[[]]]],
)  # fmt: skip


def originals(folder):
    """Return the bytes of a sound file of each kind."""
    state = flat_state(tiny_model())
    save_file(state, folder / "a.safetensors", {"localdit_config": json.dumps(TINY)})
    torch.save(state, folder / "a.pt")
    torch.save({"state_dict": state, "step": 3}, folder / "b.pt")
    return [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir())]


def load(path, what):
    """Return whether the file was loaded; anything but a `ValueError` fails."""
    with bounded(what):
        try:
            model = LocalDiTTransformer2DModel.from_single_file(str(path))
        except ValueError as error:
            assert str(path) in str(error), f"{what}: {error}"
            return False
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), f"{what}: {name}"
    return True


def damaged(data, suffix, rng):
    """Return a file with damage to its header, where it has one, or anywhere."""
    if suffix == ".safetensors" and rng.random() < 0.5:
        (size,) = struct.unpack("<Q", data[:8])
        header = mutated(data[8 : 8 + size], rng)
        if rng.random() < 0.7:
            return struct.pack("<Q", len(header)) + header + data[8 + size :]
    return mutated(data, rng)


def try_weights(folder, seeds):
    sound = originals(folder)
    count = 0
    for seed in seeds:
        rng = random.Random(seed)
        suffix, data = rng.choice(sound)
        path = folder / f"mutated{suffix}"
        path.write_bytes(damaged(data, suffix, rng))
        count += load(path, f"weights {seed}")
    return count


def test_sound_weights_are_loaded(tmp_path):
    originals(tmp_path)
    for path in tmp_path.iterdir():
        assert load(path, path.name)


def test_some_mutated_weights(tmp_path):
    assert try_weights(tmp_path, range(60)) < 60


@pytest.mark.robustness
def test_mutated_weights(tmp_path):
    assert try_weights(tmp_path, range(2000)) < 2000


@pytest.mark.robustness
def test_hostile_configurations_in_a_file(tmp_path):
    """Every field of the configuration takes every hostile value."""
    state, path = flat_state(tiny_model()), tmp_path / "a.safetensors"
    fields = [*LocalDiTTransformer2DModel(**TINY).config, "no_such_field"]
    for field in fields:
        for value in HOSTILE:
            save_file(state, path, {"localdit_config": json.dumps({**TINY, field: value})})
            load(path, f"{field}={value!r:.60}")


@pytest.mark.robustness
def test_hostile_configurations_in_a_folder(tmp_path):
    """As above, for the `config.json` of a model in a folder."""
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for field in config:
        for value in HOSTILE:
            file.write_text(json.dumps({**config, field: value}))
            what = f"{field}={value!r:.60}"
            with bounded(what):
                try:
                    model = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
                except (ValueError, OSError):
                    continue
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), what
