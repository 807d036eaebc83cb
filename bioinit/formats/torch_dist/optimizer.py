"""Tensors of an optimizer, which are listed at once and looked for only when somebody reads them.

There are three times as many of them as weights, and ``init`` reads none. All of them together are
presented as one file, chunk after chunk, whose bytes are found when they are asked for.
"""

from __future__ import annotations

from bisect import bisect_right

import torch

from bioinit.errors import CorruptCheckpoint
from bioinit.formats._items import Item, Items, require_alike
from bioinit.formats.protocol import Piece
from bioinit.formats.torch_dist.index import Index, Indexed, require_untransformed
from bioinit.layout import Box, Dims, numel, row_major
from bioinit.storage import File
from bioinit.storage.made import Made


class Lazily:
    """A made-up file of all chunks that it was asked to place."""

    def __init__(self, index: Index, items: Items, files: dict[str, File]) -> None:
        self.index = index
        self.items = items
        self.files = files
        self.size = 0
        self.starts: list[int] = []
        self.chunks: list[tuple[str, Dims, Dims]] = []
        self.strides: dict[Dims, Dims] = {}

    def pieces(self, name: str, indexed: Indexed, number: int) -> tuple[Piece, ...]:
        """The chunks of a tensor as pieces of the made-up file, which has this ``number``."""
        _, dtype, chunks = indexed
        made = []
        for at, sizes in chunks:
            if 0 in sizes:
                continue
            strides = self.strides.get(sizes)
            if strides is None:
                strides = self.strides[sizes] = row_major(sizes)
            made.append(Piece(number, self.size, Box(at, sizes, 0, strides)))
            self.starts.append(self.size)
            self.chunks.append((name, at, sizes))
            self.size += numel(sizes) * dtype.itemsize
        return tuple(made)

    def file(self) -> Made:
        """The file."""
        every = list(self.files.values())
        if not every:
            raise CorruptCheckpoint(
                f"{self.items.folder.path} is damaged: its index lists chunks of "
                f"{self.chunks[0][0]!r}, but no file. Fetch or write the checkpoint again."
            )
        return Made(
            every[0],
            "optimizer",
            self.size,
            self._make,
            sources=every,
            how="optimizer state, looked for when read",
        )

    def _make(self, offset: int, size: int) -> bytes:
        found = []
        number = bisect_right(self.starts, offset) - 1
        end = offset + size
        while offset < end:
            name, at, sizes = self.chunks[number]
            begin = self.starts[number]
            length = numel(sizes) * self.index.tensors[name].dtype.itemsize
            low, high = offset - begin, min(end - begin, length)
            found.append(self._part(name, at, sizes, low, high))
            offset, number = begin + high, number + 1
        return found[0] if len(found) == 1 else b"".join(found)

    def _part(self, name: str, at: Dims, sizes: Dims, low: int, high: int) -> bytes:
        """Bytes ``low`` to ``high`` of a chunk, as if it lay row-major."""
        place = self.index.place(name, at)
        if place is None:
            raise CorruptCheckpoint(
                f"{self.items.folder.path} is damaged: its index does not say where the chunk of "
                f"{name!r} at {at} lies. Fetch or write the checkpoint again."
            )
        file, indexed = self.files[place.path], self.index.tensors[name]
        require_untransformed(place, name, file)
        located = self.items.locate(Item(file, place.offset, place.length), name, at)
        strides = require_alike(file, name, located, indexed.dtype, sizes)
        usual = self.strides[sizes]
        if all(s == u or n == 1 for s, u, n in zip(strides, usual, sizes, strict=True)):
            return file.read(located.offset + low, high - low)
        item = indexed.dtype.itemsize
        reach = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        data = bytearray(file.read(located.offset, reach * item))
        flat = torch.frombuffer(data, dtype=indexed.dtype)
        whole = flat.as_strided(sizes, strides).contiguous().view(-1).view(torch.uint8)
        return bytes(whole[low:high].numpy())
