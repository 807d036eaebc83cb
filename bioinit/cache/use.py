"""Who uses a kept folder: each process holds a shared lock from when it asked until it ends.

What was asked for is a path, and nobody can know when its reader is done: a model that was started
from it may still be saved with files that lie there. The system gives the lock back, crash or not.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bioinit.storage.lock import lock_beside, try_lock

_WORD = "use"
_held: dict[Path, int] = {}
_guard = threading.Lock()
_log = logging.getLogger("bioinit.cache")


def lock_of(final: Path) -> Path:
    """The file that is locked by who uses ``final``."""
    return lock_beside(final, _WORD)


def begin(final: Path, waiting: Callable[[], None]) -> bool:
    """Use ``final`` from now on; whether this process did not do so before."""
    with _guard:
        if _holds(final):
            return False
    while (descriptor := try_lock(lock_of(final), shared=True)) is None:
        waiting()  # for who is just removing it, or looks whether it is used
        time.sleep(0.01)
    with _guard:
        if _holds(final):
            os.close(descriptor)
            return False
        if final in _held:
            os.close(_held[final])
        _held[final] = descriptor
    return True


def _holds(final: Path) -> bool:
    """Whether this process has the lock that others look at: somebody may have removed it."""
    if final not in _held:
        return False
    mine = os.fstat(_held[final])
    if not stat.S_ISREG(mine.st_mode):  # where nothing can be written, nothing can be removed
        return True
    try:
        return os.path.samestat(mine, os.lstat(lock_of(final)))
    except OSError:
        return False


def end(final: Path) -> None:
    """Do not use it any more; where there is nothing to use, its lock goes too."""
    with _guard:
        descriptor = _held.pop(final, None)
    if descriptor is None:
        return
    os.close(descriptor)
    if not os.path.lexists(final):
        alone = try_lock(lock_of(final), shared=False)
        if alone is not None:
            forget(final, alone)


def forget(final: Path, alone: int) -> None:
    """Remove the lock of ``final``, which ``alone`` holds, and which nobody else can have."""
    try:
        os.unlink(lock_of(final))
    except OSError:
        pass
    finally:
        os.close(alone)


def told(final: Path, waiting: Callable[[], None]) -> Callable[[], None]:
    """``waiting``, which says once that there is a wait, and for what."""
    has_said = False

    def wait() -> None:
        nonlocal has_said
        if not has_said:
            has_said = True
            _log.warning(
                "bioinit: another process is making %s, which this one needs too: waiting until "
                "it is done",
                final,
            )
        waiting()

    return wait
