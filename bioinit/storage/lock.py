"""Locks that a crash gives back: one process writes a folder at a time, many may read it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bioinit.errors import StorageError
from bioinit.storage.file import disk_error

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.2


@contextmanager
def locked(final: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Keep other processes from writing ``final``: one at a time.

    Inside it is known whether nobody else can be at it: False where the file system has no locks.

    Args:
        final: what will be written.
        waiting: called again and again while another process has it, until that is done; what it
            raises ends the wait. If None, there is no wait, and who comes second is told.

    Raises:
        StorageError: another process is writing it, and nobody waits.
    """
    path = lock_beside(final, "lock" if waiting is None else "turn")
    descriptor = try_lock(path)
    pause = _FIRST_PAUSE
    while descriptor is None:
        if waiting is None:
            raise StorageError(
                f"cannot write {final}: another process is writing it now. Wait for it, or choose "
                "another path."
            )
        # Not the system's own wait, which would hear neither ranks that fail nor, in a thread,
        # Ctrl-C.
        waiting()
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, 1.5 * pause)
        descriptor = try_lock(path)
    try:
        yield _is_alone(descriptor)
    finally:
        # Removed while it is still held, so nobody can lock a file that is about to vanish.
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _is_alone(descriptor: int) -> bool:
    """Whether the system keeps others out of what was just locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def lock_beside(final: Path, word: str) -> Path:
    """The hidden file beside ``final`` whose lock means ``word``."""
    return final.parent / f".{final.name}.{word}"


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor of the file ``path``, which is locked until that is closed; None if it is taken.

    The file is made if it is not there. Where the file system knows no locks, nothing is locked; a
    shared one where nothing may be written may have no file, and then is the null device.

    Args:
        path: the file.
        shared: many may have it so at once, and nobody in another way.

    Raises:
        StorageError: the file cannot be made.
    """
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if not shared or error.errno not in _NO_WRITING:
                raise disk_error(error, f"write in {path.parent}") from error
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass  # the one who held it removed it just now: try again
        except OSError as error:
            if error.errno in _NO_LOCKS:
                # The rename at the end still lets only one win.
                return descriptor
            os.close(descriptor)
            raise disk_error(error, f"lock {path}") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
