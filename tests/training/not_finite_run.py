"""Runs train.py with a loss of NaN for the first sample of the last process's third batch."""

import os

from localdit.training.methods import fine_tuning
from localdit.training.shutdown import run_and_exit
from tests.training.workplace import load_main

sound, calls = fine_tuning.denoising_errors, 0


def denoising_errors(prediction, target):
    global calls
    calls += 1
    errors = sound(prediction, target)
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    if calls == 3 and int(os.environ.get("RANK", "0")) == last:
        errors = errors.clone()
        errors[0] = errors[0] * float("nan")
    return errors


if __name__ == "__main__":
    fine_tuning.denoising_errors = denoising_errors
    run_and_exit(load_main())
