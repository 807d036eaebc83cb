"""Open files of the disk: one handle per file, and no more descriptors at once than there may be.

A checkpoint of thousands of files is read through a few hundred descriptors. A handle opens its
file when somebody reads, and may be closed behind their back as soon as nobody does. What it opens
must still be the file that was looked at: headers were read from that one, and their offsets mean
nothing in another.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from bioinit.errors import CorruptCheckpoint
from bioinit.storage.shown import shown

MOST_DESCRIPTORS = 512
FEWEST_DESCRIPTORS = 4
SECONDS_BETWEEN_LOOKS = 0.001
"""Looking at an open file takes most of the time of a small read, so not each read does it."""
_TOO_MANY = (errno.EMFILE, errno.ENFILE)

Identity = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""


def identity_of(found: os.stat_result) -> Identity:
    """What stays the same as long as a file is the same and nobody writes it."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Handle:
    """One file of the disk, shared by all its windows: its descriptor, and what was read.

    ``identity`` is what it was when somebody looked at it; any other file is refused.
    """

    __slots__ = ("_identity", "_slot", "bytes_read", "opened", "path")

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self._identity = identity
        self.opened = 0
        self.bytes_read = 0
        self._slot = _Slot()

    def acquire(self) -> int:
        """The descriptor, which stays open until it is released.

        Raises:
            OSError: the file cannot be opened.
            CorruptCheckpoint: another file, or other bytes, stand there now.
        """
        slot = self._slot
        with slot.lock:
            if slot.descriptor < 0:
                slot.descriptor = POOL.open(slot, self.path)
                self.opened += 1
                try:
                    self._look(slot)
                except BaseException:
                    POOL.close(slot)
                    raise
            else:
                slot.is_recent = True
            slot.readers += 1
            return slot.descriptor

    def release(self, size: int) -> None:
        """What was acquired is no longer in use; ``size`` bytes were read.

        Raises:
            CorruptCheckpoint: somebody writes the file.
        """
        slot = self._slot
        with slot.lock:
            try:
                if monotonic() >= slot.look_at:
                    self._look(slot)
            finally:
                slot.readers -= 1
                self.bytes_read += size
                if slot.is_closing and not slot.readers:
                    POOL.close(slot)

    def _look(self, slot: _Slot) -> None:
        """Refuse what is open, if it is no longer what it was."""
        slot.look_at = monotonic() + SECONDS_BETWEEN_LOOKS
        found = os.fstat(slot.descriptor)
        if identity_of(found) != self._identity:
            size, now = self._identity[2], found.st_size
            raise CorruptCheckpoint(
                f"{shown(self.path)} changed since it was opened: it had {size} bytes, and "
                f"{f'has {now}' if now != size else 'other ones may stand there'} now. Wait until "
                "nobody writes it, then start again."
            )

    def keep(self) -> int:
        """The descriptor, which stays open until the handle is closed."""
        descriptor = self.acquire()
        slot = self._slot
        with slot.lock:
            slot.is_kept = True
            slot.readers -= 1
        return descriptor

    def close(self) -> None:
        """Give the descriptor back, once nobody reads; the next reader opens the file again."""
        slot = self._slot
        with slot.lock:
            slot.is_kept = False
            if slot.readers:
                slot.is_closing = True
            else:
                POOL.close(slot)

    def __del__(self) -> None:
        # No lock: nobody else has this handle, and a collection may start while one is held.
        POOL.close(self._slot)


class _Slot:
    """A descriptor, or -1, and who uses it. ``lock`` guards the rest."""

    __slots__ = ("descriptor", "is_closing", "is_kept", "is_recent", "lock", "look_at", "readers")

    def __init__(self) -> None:
        self.descriptor = -1
        self.readers = 0
        self.is_closing = False
        self.is_kept = False
        self.is_recent = False
        self.look_at = 0.0
        self.lock = threading.Lock()


class Pool:
    """The open descriptors of this process, at most ``limit()`` of them unless all are in use."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._slots: OrderedDict[_Slot, None] = OrderedDict()
        self._lock = threading.RLock()  # a collection inside may close forgotten handles

    def __len__(self) -> int:
        return len(self._slots)

    def open(self, slot: _Slot, path: Path) -> int:
        """A new descriptor for ``slot``, whose lock the caller holds."""
        self._slots[slot] = None  # counted before it is open: several threads may be here
        try:
            self._close_idle(len(self._slots) - self._limit())
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                # What else the process has open counts too: go on with fewer.
                if error.errno not in _TOO_MANY or not self._close_idle(len(self._slots) // 2 + 1):
                    raise
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self._slots.pop(slot, None)
            raise

    def close(self, slot: _Slot) -> None:
        """Close what ``slot`` has open, if anything; nobody reads through it."""
        self._slots.pop(slot, None)
        slot.is_closing = False
        descriptor, slot.descriptor = slot.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _close_idle(self, count: int) -> int:
        """Close ``count`` slots that nobody reads, if there are; how many were closed.

        Slots stand in the order they were opened; one that was read since gets a second turn, so
        what is used again and again stays open and a read only has to leave a mark.
        """
        if count <= 0:
            return 0
        closed = 0
        with self._lock:
            for _ in range(2 * len(self._slots)):
                if closed == count or not self._slots:
                    break
                slot, _ = self._slots.popitem(last=False)
                is_busy = not slot.lock.acquire(blocking=False)  # being opened, read or closed
                try:
                    if is_busy or slot.readers or slot.is_kept or slot.is_recent:
                        slot.is_recent = False
                        self._slots[slot] = None
                    elif slot.descriptor >= 0:
                        self.close(slot)
                        closed += 1
                finally:
                    if not is_busy:
                        slot.lock.release()
        return closed


def most_descriptors() -> int:
    """Half of what the process may open, and not more than is of use."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST_DESCRIPTORS
    return max(FEWEST_DESCRIPTORS, min(MOST_DESCRIPTORS, soft // 2))


POOL = Pool(most_descriptors)
