"""The seam every format stands behind: what a reader is given, and what it gives back.

A reader looks at a :class:`~bioinit.storage.Folder` (a directory, or a single file presented as a
folder of one), never at a path of its own, and answers with *where bytes lie*: stored tensors as
lists of pieces. It returns no tensor and reads no weight byte. Everything after it (planning,
loading, casting) is the same for every format.

A new format is one new file in this folder that defines ``FORMAT``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bioinit.layout import Box, Dims
from bioinit.storage import File, Folder, Journal


class Piece(NamedTuple):
    """Where one box of a stored tensor lies: ``files[file]``, ``offset`` bytes in, as ``box`` says.

    ``offset`` is the byte of the file at which ``box.start == 0`` would lie; it need not be
    aligned.
    """

    file: int
    offset: int
    box: Box


class StoredTensor(NamedTuple):
    """A tensor in a checkpoint: global ``shape``, ``dtype`` and the pieces that make it up.

    ``kind`` is ``"weight"``, or ``"optimizer"`` for state that ``init`` never reads.
    """

    shape: Dims
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    kind: str = "weight"


@dataclass(frozen=True)
class Contents:
    """What a format found: its files, its tensors by name, and what it knows about the writer."""

    files: tuple[File, ...]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for ``inspect``, under the names below where there is something to say:

    ``writer``: who wrote it; ``parallel``: its parallel layout, ``{"tensor": 2, "pipeline": 1}``;
    ``ranks_with_files``: which sizes of that were counted in files, and so may be held against the
    saved config; ``layout``: how the files belong together; ``iteration``: the step at which it was
    saved; ``objects``: what else the pickles hold; ``byte_objects``: stored objects that are listed
    and never read; ``missing_chunks``: tensors of which a part is not stored but has the fill
    value; ``ignored``: files that are not read, and why; ``state_dict``: where in a pickle the
    weights are; ``inside``: the format of what lies inside; ``doubt``: what nobody can be sure of.
    """

    homes: tuple[Folder, ...] = ()
    """Where a saved config may lie: nearest to the weights first."""


Open = Callable[[Folder], "Contents"]
"""Opens an inner folder or file with whichever format recognizes it (formats nest)."""


class Outgoing(NamedTuple):
    """A tensor that is to be written, row-major, and never held whole by who asks for it in parts.

    ``fill(first, memory)`` puts its elements ``first`` to ``first + memory.numel()``, counted
    row-major, into ``memory``: one dim, contiguous, of ``dtype``, on the CPU. It may be called from
    several threads.
    """

    key: str
    shape: Dims
    dtype: torch.dtype
    fill: Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What a writer is told beside the tensors."""

    max_shard_bytes: int = 5 * 10**9
    """The most bytes of one file, where the format has shards; a larger tensor has one alone."""
    partitions: int = 1
    """Over how many files a tensor is divided, where the format does that."""
    objects: Mapping[str, bytes] = field(default_factory=dict)
    """Stored beside the tensors as bytes, by name, where the format knows such."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Plain data that the format keeps beside the tensors, where it has a place for it."""


Write = Callable[[Path, Sequence[Outgoing], WriteOptions, Journal], None]
"""Writes tensors into an existing folder. What the journal says was finished by an earlier process
that was killed is not written again; the folder is renamed into place by who calls."""


@dataclass(frozen=True)
class Format:
    """One way bytes lie on disk. The name of its file is its name.

    ``recognizes`` must be cheap (names and the first bytes of at most one file) and never raise on
    foreign input. ``open`` reads headers only and raises ``CheckpointError`` with the cure.
    ``unpack``, for an archive, gives its members as a folder. ``marks`` tells people in a few words
    what it is recognized by. ``write``, for a format in which models are written, is its inverse;
    ``honours`` names the fields of :class:`WriteOptions` that it looks at.
    """

    recognizes: Callable[[Folder], bool]
    open: Callable[[Folder, Open], Contents]
    unpack: Callable[[Folder], Folder] | None = None
    marks: str = ""
    write: Write | None = None
    honours: Collection[str] = ()
