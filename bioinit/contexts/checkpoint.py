"""An open checkpoint: where its tensors lie, and what it says of itself."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError, CorruptCheckpoint
from bioinit.formats.protocol import Contents, Piece, StoredTensor
from bioinit.keys import suggestion
from bioinit.layout import Box, Dims, blocks, intersect, numel, row_major
from bioinit.storage import File, Folder

Whose = Callable[[Context | None, Collection[str]], str | None]
"""Given the saved config and the stored names, the dialect that spells them."""

READ_BYTES = 16 * 2**20
"""What is read at once, in a buffer beside the result."""

Region = tuple[Dims, Dims]
"""Offsets and sizes, one of each per dim."""


class Checkpoint:
    """A checkpoint whose headers are read and whose weights are not. A context manager.

    ``whose`` says whose spelling its names are, when somebody asks; who opens it has to know that,
    since the families stand above this room.
    """

    def __init__(
        self,
        folder: Folder,
        format_name: str,
        contents: Contents,
        context: Context | None,
        whose: Whose | None = None,
    ) -> None:
        self.folder = folder
        self.path: Path = folder.path
        self.format = format_name
        self.context = context
        self._contents = contents
        self._whose = whose
        self._digest: str | None = None

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, format={self.format!r}, {len(self.tensors)} tensors)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def dialect(self) -> str | None:
        """Whose spelling the names are, ``hf`` for example; None if nobody knows."""
        return None if self._whose is None else self._whose(self.context, self.tensors)

    @property
    def files(self) -> tuple[File, ...]:
        return self._contents.files

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._contents.tensors

    @property
    def homes(self) -> tuple[Folder, ...]:
        """The folders that belong to it, that of its weights first."""
        return self._contents.homes

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._contents.metadata

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors; what several share is counted once."""
        return sum(
            {
                (file, offset, box.start, box.sizes): prod(box.sizes) * tensor.dtype.itemsize
                for tensor in self.tensors.values()
                for file, offset, box in tensor.pieces
            }.values()
        )

    @property
    def digest(self) -> str:
        """A SHA-256 over names, sizes and times of the files and everything the headers say."""
        if self._digest is None:
            lines = [f"{f.name} {f.offset} {f.size} {f.mtime_ns}" for f in self.files]
            # One text and one hash: a call per tensor takes longer than planning them all.
            kinds: dict[tuple[Any, ...], str] = {}
            boxes: dict[Box, str] = {}  # few differ, and spelling one takes most of the time
            for name, (shape, dtype, pieces, kind) in self.tensors.items():
                text = kinds.get((dtype, kind, shape))
                if text is None:
                    text = kinds[dtype, kind, shape] = f"{dtype} {kind} {shape}"
                lines.append(f"{name} {text}")
                for file, offset, box in pieces:
                    text = boxes.get(box)
                    if text is None:
                        offsets, sizes, start, strides = box
                        text = boxes[box] = f"{offsets} {sizes} {start} {strides}"
                    lines.append(f"{file} {offset} {text}")
            data = "\0".join(lines).encode("utf-8", "surrogatepass")  # names need not be text
            self._digest = hashlib.sha256(data).hexdigest()
        return self._digest

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """A stored tensor, or a region of it, as a new tensor of its stored dtype.

        The bytes of a region of whole rows are read and no others; of a region of columns, narrow
        gaps between them are read along, since that costs less than many small reads.

        Args:
            name: the stored name.
            region: offsets and sizes, one of each per dim; the whole tensor if None.

        Raises:
            ConfigError: there is no such tensor, or the region lies outside of it.
            CorruptCheckpoint: the file ends early, or no piece holds a part of the region.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ConfigError(
                f"{self.path} holds no tensor {name!r}. {suggestion(name, self.tensors)}".rstrip()
            )
        offsets, sizes = _region(name, tensor.shape, region)
        try:
            result = torch.empty(sizes, dtype=tensor.dtype)
        except (RuntimeError, MemoryError) as error:
            raise CorruptCheckpoint(
                f"{self.path}: {numel(tuple(sizes)) * tensor.dtype.itemsize} bytes of {name!r}, "
                f"which is said to be {tensor.dtype} {list(tensor.shape)}, do not fit into memory. "
                "Read a region of it, or fetch the checkpoint again if it cannot be that large."
            ) from error
        target = Box(tuple(offsets), tuple(sizes), 0, row_major(tuple(sizes)))
        filled = sum(self._fill(result, piece, target) for piece in tensor.pieces)
        if filled < numel(target.sizes):
            raise CorruptCheckpoint(
                f"{self.path}: the pieces of {name!r} hold {filled} of the {numel(target.sizes)} "
                "elements that were asked for. Fetch or write the checkpoint again."
            )
        return result

    def _fill(self, result: torch.Tensor, piece: Piece, target: Box) -> int:
        overlap = intersect(piece.box, target)
        if overlap is None or not numel(overlap.sizes):
            return 0
        itemsize = result.dtype.itemsize
        for part, span in blocks(overlap, READ_BYTES // itemsize):
            buffer = bytearray(span * itemsize)
            self.files[piece.file].read_into(piece.offset + part.source_start * itemsize, (buffer,))
            stored = torch.frombuffer(buffer, dtype=result.dtype)
            place = result.as_strided(part.sizes, part.target_strides, part.target_start)
            place[...] = stored.as_strided(part.sizes, part.source_strides)
        return numel(overlap.sizes)

    def close(self) -> None:
        """Give the file descriptors back."""
        for file in self.files:
            file.close()
        self.folder.close()


def _region(name: str, shape: Dims, region: Region | None) -> Region:
    """Offsets and sizes of ``region`` of a tensor, all of it if None.

    Raises:
        ConfigError: it is no region, or lies outside.
    """
    if region is None:
        return (0,) * len(shape), shape
    try:
        offsets, sizes = (tuple(map(operator.index, part)) for part in region)
    except (TypeError, ValueError):
        raise ConfigError(
            f"the region {region!r:.200} of {name!r} is not a pair of offsets and sizes, such as "
            f"({(0,) * len(shape)}, {shape})."
        ) from None
    fits = len(offsets) == len(sizes) == len(shape) and all(
        0 <= low and 0 <= size and low + size <= whole
        for low, size, whole in zip(offsets, sizes, shape, strict=True)
    )
    if not fits:
        raise ConfigError(
            f"the region with offsets {offsets} and sizes {sizes} does not lie in {name!r}, which "
            f"has the shape {shape}."
        )
    return offsets, sizes
