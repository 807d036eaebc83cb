"""How many bytes a plan reads: those it copies, and gaps between columns that are read along."""

from __future__ import annotations

from collections.abc import Iterable

from bioinit.layout import blocks
from bioinit.plan.facts import STAGING_BYTES, Copy


def bytes_by_file(copies: Iterable[Copy]) -> tuple[dict[int, int], int]:
    """Bytes read of each file by ``copies``, and how many of them nobody copies.

    What several copies read together counts once.
    """
    wanted = 0
    counts: dict[int, int] = {}
    strided: dict[int, list[tuple[int, int]]] = {}
    for copy in copies:
        strides = copy.overlap.source_strides
        if strides in ((1,), ()):
            counts[copy.file] = counts.get(copy.file, 0) + copy.bytes
            continue
        if not copy.bytes:
            continue
        wanted += copy.bytes
        width = copy.dtype.itemsize
        spans = strided.setdefault(copy.file, [])
        for part, span in blocks(copy.overlap, STAGING_BYTES // width):
            start = copy.offset + part.source_start * width
            spans.append((start, start + span * width))
    read = 0
    for file, spans in strided.items():
        spans.sort()
        end = 0
        for start, stop in spans:
            new = max(0, stop - max(start, end))
            counts[file] = counts.get(file, 0) + new
            read += new
            end = max(end, stop)
    return counts, max(0, read - wanted)
