"""``python -m bioinit`` is the command ``bioinit``."""

import os
import sys

if __name__ == "__main__" and sys.path and sys.path[0] in ("", os.getcwd()):
    # `python -m` looks for modules where it stands, and that may be inside of a checkpoint.
    del sys.path[0]

from bioinit.cli import main

if __name__ == "__main__":
    sys.exit(main())
