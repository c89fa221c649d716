"""The command line, as `python -m localdit`."""

import sys

from localdit.commands import main

if __name__ == "__main__":
    sys.exit(main())
