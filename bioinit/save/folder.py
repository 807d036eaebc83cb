"""One folder that all ranks fill: the first one makes it, and gives it its name in the end."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bioinit.errors import BioinitError, StorageError
from bioinit.ranks import World
from bioinit.storage import atomic_folder

_SAYING_WHY = 15.0
"""Seconds from a folder that is gone to the word of who removed it."""


@contextmanager
def common_folder(
    path: str | Path, world: World, *, overwrite: bool, keep: Iterable[Path]
) -> Iterator[Path]:
    """The hidden folder to fill, the same on all ranks, that appears at ``path`` when all is well.

    All ranks call it; it has its name when the first one comes out. The block must end with all
    ranks having heard of one another, so that no one is still writing when it is renamed. If a rank
    fails, each that hears of it removes the folder when it has stopped writing.

    Raises:
        StorageError: as :func:`~bioinit.storage.atomic_folder` does; or a rank does not see what
            the first one made.
    """
    if not world.rank:
        with atomic_folder(path, overwrite=overwrite, keep=keep) as folder:
            world.gathered(str(folder))
            world.gathered(None)  # all have seen it
            yield folder
        return
    folder = Path(world.gathered("")[0])
    if not folder.is_dir():
        raise StorageError(
            f"cannot write {path}: rank 0 made {folder} there, and {socket.gethostname()} sees no "
            "such folder. Choose a place on a file system that all machines share."
        )
    world.gathered(None)
    try:
        yield folder
    except BaseException:
        _hear(world, folder)
        raise


def _hear(world: World, folder: Path) -> None:
    """Raise what another rank failed with, if it did, and leave nothing of what was written since.

    Where this rank is the first to fail, the others do not know of it yet: they must not find the
    folder gone. Where it is gone already, the first rank has failed, and is about to say why.
    """
    end = time.monotonic() + (0.0 if folder.is_dir() else _SAYING_WHY)
    try:
        world.check()
        while time.monotonic() < end:
            time.sleep(0.05)
            world.check()
    except BioinitError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
