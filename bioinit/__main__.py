"""``python -m bioinit`` is the command ``bioinit``."""

import os
import signal
import sys

if __name__ == "__main__" and sys.path and sys.path[0] in ("", os.getcwd()):
    # `python -m` looks for modules where it stands, and that may be inside of a checkpoint.
    del sys.path[0]

from bioinit.cli import main

if __name__ == "__main__":
    code = main()
    if code and "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun stops the others as soon as one has failed: they are on their way by themselves.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)
