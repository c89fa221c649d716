"""Every flipped bit of a checkpoint is noticed, and nothing sound is moved for it.

The default run tries a few bits of each file; `pytest -m robustness` tries all bits of the
manifest, and 1,000 of each other file.
"""

import os
import random
import sys

import pytest
from accelerate.state import AcceleratorState

from localdit.training.checkpointing import MANIFEST, files_in, verify_checkpoint
from localdit.training.run_folder import RunFolder
from tests.training.workplace import load_main, make_workplace, options

STEP = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with `checkpoint-2`, `checkpoint-4` and `final`, as training leaves it."""
    folder = make_workplace(tmp_path_factory.mktemp("workplace"))
    with pytest.MonkeyPatch.context() as patch:
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = options(folder, folder / "run", "--save-interval", "2", "--max-train-steps", STEP)
        patch.setattr(sys, "argv", ["train.py", *argv])
        assert load_main()() == 0
    return folder / "run"


def flipped_bits(trained, most_of_manifest, most):
    """Flip bits of each file of the newest checkpoint in turn; yield `(file, bit)` meanwhile."""
    checkpoint = trained / f"checkpoint-{STEP}"
    for name in [MANIFEST, *files_in(checkpoint)]:
        content = (checkpoint / name).read_bytes()
        count = min(8 * len(content), most_of_manifest if name == MANIFEST else most)
        with open(checkpoint / name, "r+b") as file:
            for bit in random.Random(name).sample(range(8 * len(content)), count):
                place = bit // 8
                os.pwrite(file.fileno(), bytes([content[place] ^ 1 << bit % 8]), place)
                yield name, bit
                os.pwrite(file.fileno(), content[place : place + 1], place)
    verify_checkpoint(checkpoint)


def tried(trained, capsys, *counts):
    """Open the run with each bit flipped; return the number of bits."""
    run, before = RunFolder(trained), sorted(os.listdir(trained))
    number = 0
    for name, bit in flipped_bits(trained, *counts):
        number += 1
        assert run.open("auto") == trained / f"checkpoint-{STEP - 2}", (name, bit)
        assert f"checkpoint-{STEP} is skipped: " in capsys.readouterr().out, (name, bit)
        assert sorted(os.listdir(trained)) == before, (name, bit)
    assert run.open("auto") == trained / f"checkpoint-{STEP}"
    return number


def test_flipped_bits_are_noticed(trained, capsys):
    assert tried(trained, capsys, 300, 10) > 300


@pytest.mark.robustness
def test_every_flipped_bit_of_a_manifest_and_a_thousand_of_each_other_file_is_noticed(
    trained, capsys
):
    number = tried(trained, capsys, sys.maxsize, 1000)
    assert number > 10_000
    with capsys.disabled():
        print(f"{number:,} flipped bits, all noticed")


def test_the_final_pipeline_has_a_manifest(trained):
    assert verify_checkpoint(trained / "final").step == STEP
