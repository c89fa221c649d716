"""`localdit demo`, as `python -m localdit.demo`."""

import sys

from localdit.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
