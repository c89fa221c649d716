"""The page, as `python -m localdit.demo`."""

import sys

from localdit.demo import main

if __name__ == "__main__":
    sys.exit(main())
