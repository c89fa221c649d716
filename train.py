"""Train a LocalDiT on captioned pictures; `python train.py --help` lists the options."""

from localdit.training.leaving import run_and_leave
from localdit.training.loop import main

if __name__ == "__main__":
    run_and_leave(main)
