"""``python -m bioinit`` is the command ``bioinit``."""

import sys

from bioinit.cli import main

if __name__ == "__main__":
    sys.exit(main())
