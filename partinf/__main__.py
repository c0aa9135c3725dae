"""`python -m partinf` is the `partinf` command."""

import sys

from partinf.cli import main

if __name__ == "__main__":
    sys.exit(main())
