"""Train a LocalDiT on captioned pictures; `python train.py --help` lists the options."""

from localdit.training.__main__ import main
from localdit.training.shutdown import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
