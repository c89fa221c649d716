"""`localdit convert`, as `python -m localdit.checkpoint`."""

import sys

from localdit.commands.convert import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m localdit.checkpoint"))
