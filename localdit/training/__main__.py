"""Trains a LocalDiT; what `localdit train` starts in each process."""

from __future__ import annotations

from localdit.training.leaving import run_and_leave
from localdit.training.loop import main

if __name__ == "__main__":
    run_and_leave(lambda: main(prog="localdit train"))
