"""One process writes a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bioinit.errors import StorageError
from bioinit.storage.file import disk_error


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Keep other processes from writing ``final``: the first one wins, the others are told."""
    path = final.parent / f".{final.name}.lock"
    descriptor = _descriptor(path, final)
    try:
        yield
    finally:
        # Removed while it is still held, so nobody can lock a file that is about to vanish.
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _descriptor(path: Path, final: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise disk_error(error, f"write in {final.parent}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise StorageError(
                f"cannot write {final}: another process is writing it now. Wait for it, or choose "
                "another path."
            ) from error
        except FileNotFoundError:
            pass  # the one who held it removed it just now: try again
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                # No locks on this file system; the rename at the end still lets only one win.
                return descriptor
            os.close(descriptor)
            raise disk_error(error, f"lock {path}") from error
        os.close(descriptor)
