"""The command line, as `python -m localdit`."""

import sys

from localdit.cli import main

if __name__ == "__main__":
    sys.exit(main())
