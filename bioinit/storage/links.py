"""Links that lead out of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def outside(path: Path, homes: Iterable[Path]) -> Path | None:
    """Where ``path`` really lies, if that is below none of ``homes``.

    A hub cache keeps its files in ``blobs`` beside its snapshots: what lies there is a snapshot's.
    """
    real = Path(os.path.realpath(path))
    for home in homes:
        here = Path(os.path.realpath(home))
        caches = (folder.parent / "blobs" for folder in here.parents if folder.name == "snapshots")
        if any(map(real.is_relative_to, (here, *caches))):
            return None
    return real
