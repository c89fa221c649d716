"""Generate pictures from prompts: `python infer_t2i.py --help`."""

import sys

from config import Config
from localdit.cli.drawing import run_script

if __name__ == "__main__":
    sys.exit(run_script("t2i", Config()))
