"""Change a picture to follow prompts: `python infer_i2i.py --help`."""

import sys

from config import Config
from localdit.commands.scripts import main

if __name__ == "__main__":
    sys.exit(main("i2i", Config()))
