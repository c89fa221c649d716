from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.training.data.batches import Draws, VisitDataset, load_batches
from localdit.training.data.buckets import Size
from localdit.training.data.order import NOTHING, Order, Position, Visit
from localdit.training.data.samples import Blob, Sample
from localdit.training.data.stage_data import stage_batches

SIZES = [Size(32, 32), Size(32, 64)]


@pytest.fixture
def samples(tmp_path):
    """Ten pictures with three captions each; number 3 and number 7 can't be decoded."""
    made = []
    for number in range(10):
        height, width = SIZES[number % 2]
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        if number in (3, 7):
            path.write_bytes(path.read_bytes()[:200])
        captions = tuple(f"caption {number}.{caption}" for caption in range(3))
        made.append(Sample(f"{number}", Blob(str(path)), captions, height, width))
    return made


def dataset(samples, **draws):
    return VisitDataset(
        samples, SIZES, Draws((0, 0), **draws), latent_channels=4, pixels_per_latent=8
    )


def visit(sample, epoch=0):
    return Visit(sample, epoch, sample % 2)


def test_a_visit_depends_only_on_its_sample_and_epoch(samples):
    data = dataset(samples, token_dropout=0.3, flip=0.5)
    item, again = data[visit(4)], dataset(samples, token_dropout=0.3, flip=0.5)[visit(4)]
    assert torch.equal(item.noise, again.noise)
    assert torch.equal(item.pixels, again.pixels)
    assert (item.position, item.caption) == (again.position, again.caption)
    assert item.place == again.place
    others = [data[visit(4, epoch=1)], data[visit(2)]]
    assert len({item.place, *(other.place for other in others)}) == 3
    assert all(not torch.equal(item.noise, other.noise) for other in others)
    assert len({item.position, *(other.position for other in others)}) == 3
    other_stage = VisitDataset(samples, SIZES, Draws((0, 1)), 4, 8)
    assert not torch.equal(item.noise, other_stage[visit(4)].noise)


def test_captions_dropout_and_flips_have_the_right_frequency(samples):
    draws = Draws((0,), token_dropout=0.2, flip=0.25)
    drawn = [draws.choices(Visit(1, epoch, 0), 3) for epoch in range(4000)]
    captions = Counter(caption for caption, _ in drawn)
    assert captions[None] / 4000 == pytest.approx(0.2, abs=0.03)
    assert all(captions[n] / 4000 == pytest.approx(0.8 / 3, abs=0.03) for n in range(3))
    assert sum(flip for _, flip in drawn) / 4000 == pytest.approx(0.25, abs=0.03)


def test_noise_is_normal_and_positions_fill_the_range():
    draws = Draws((0,))
    noise, positions = zip(
        *(draws.noise(Visit(0, epoch, 0), (4, 8, 8)) for epoch in range(400)), strict=True
    )
    values = torch.stack(noise)
    assert values.mean().item() == pytest.approx(0, abs=0.02)
    assert values.std().item() == pytest.approx(1, abs=0.02)
    assert np.histogram(positions, bins=4, range=(0, 1))[0].min() > 70


def test_flips_mirror_the_picture(samples):
    plain, flipped = dataset(samples)[visit(4)], dataset(samples, flip=1.0)[visit(4)]
    assert torch.equal(plain.pixels, flipped.pixels.flip(2))


def test_broken_and_missing_samples_are_placeholders_without_weight(samples):
    data = dataset(samples)
    batch = data.batch([data[v] for v in (visit(1), visit(3), Visit(NOTHING, 0, 1), visit(5))])
    assert batch.size == SIZES[1]
    assert batch.weights.tolist() == [1, 0, 0, 1]
    assert batch.ids == ["1", "", "", "5"]
    assert batch.pixels.shape == (4, 3, 32, 64)
    assert batch.noise.shape == (4, 4, 4, 8)
    assert batch.captions[1:3] == ["", ""]
    (fault,) = batch.faults
    assert (fault.kind, fault.id) == ("truncated", "3")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 3])
def test_an_epoch_has_each_sound_sample_once(samples, num_workers, processes):
    order = Order(np.arange(10) % 2, 2 * processes, [0])
    seen, faults = Counter(), []
    for rank in range(processes):
        steps = stage_batches(
            dataset(samples), order, Position(), rank, processes, 2, num_workers, False
        )
        for step, batches in steps:
            if step.epoch > 0:
                break
            for batch in batches:
                seen.update(name for name in batch.ids if name)
                faults += [fault.id for fault in batch.faults]
    assert seen == Counter(str(number) for number in range(10) if number not in (3, 7))
    assert sorted(faults) == ["3", "7"]


def test_workers_do_not_change_the_global_generators(samples):
    before = torch.get_rng_state()
    list(load_batches(dataset(samples), [[visit(0)], [visit(2)]], num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)
