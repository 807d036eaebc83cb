"""One folder that all ranks fill: the first one makes it, and gives it its name in the end."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bioinit.errors import StorageError
from bioinit.ranks import World
from bioinit.storage import atomic_folder


@contextmanager
def common_folder(
    path: str | Path, world: World, *, overwrite: bool, keep: Iterable[Path]
) -> Iterator[Path]:
    """The hidden folder to fill, the same on all ranks, that appears at ``path`` when all is well.

    All ranks call it; it has its name when the first one comes out. The block must end with all
    ranks having heard of one another, so that no one is still writing when it is renamed. If a rank
    fails, each removes the folder when it has stopped writing, so the last one leaves nothing.

    Raises:
        StorageError: as :func:`~bioinit.storage.atomic_folder` does; or a rank does not see what
            the first one made.
    """
    if not world.rank:
        with atomic_folder(path, overwrite=overwrite, keep=keep) as folder:
            world.gathered(str(folder))
            yield folder
        return
    folder = Path(world.gathered("")[0])
    if not folder.is_dir():
        raise StorageError(
            f"cannot write {path}: rank 0 made {folder} there, and {socket.gethostname()} sees no "
            "such folder. Choose a place on a file system that all machines share."
        )
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        world.check()  # a folder that another rank took away is not what went wrong
        raise
