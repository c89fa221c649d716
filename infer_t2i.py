"""Make pictures from prompts: `python infer_t2i.py --help`."""

import sys

from config import Config
from localdit.commands.scripts import main

if __name__ == "__main__":
    sys.exit(main("t2i", Config()))
