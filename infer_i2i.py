"""Change a picture to follow prompts: `python infer_i2i.py --help`."""

import sys

from config import Config
from localdit.cli.drawing import run_script

if __name__ == "__main__":
    sys.exit(run_script("i2i", Config()))
