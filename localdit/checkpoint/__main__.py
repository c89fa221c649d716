"""`localdit convert`, as `python -m localdit.checkpoint`."""

import sys

from localdit.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m localdit.checkpoint"))
