import json
import random

import numpy as np
import torch

from localdit.training.data.order import Position, Step
from localdit.training.state import Progress, random_state, set_random_state


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)


def test_global_generators_go_on_where_they_were(tmp_path):
    for seed in range(3):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        np.random.randn(), random.gauss(0, 1)  # both leave a second number behind
        state = random_state()
        expected = draw(), np.random.randn()
        draw()
        set_random_state(state)
        assert (draw(), np.random.randn()) == expected


def test_a_process_without_a_state_keeps_its_own():
    before = torch.get_rng_state()
    set_random_state({})
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_counts_steps_and_the_broken_samples_of_an_epoch():
    progress = Progress()
    progress.begin("data")

    def step(epoch, *taken):
        return Step(np.array([0]), 0, 0, Position(epoch, taken))

    progress.advance(step(0, (4, 1)), broken=2, skipped=False)
    progress.advance(step(0, (4, 2)), broken=1, skipped=True)
    assert (progress.step, progress.broken, progress.skipped) == (2, 3, 1)
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress
    progress.advance(step(1), broken=5, skipped=False)
    assert (progress.step, progress.broken, progress.position) == (3, 0, Position(1))
