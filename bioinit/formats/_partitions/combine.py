"""One tensor out of several copies or summands of it, made while it is read.

Copies that are equal, byte for byte, are a copy. Copies that differ by less than the tolerance give
their mean, with a remark; others are an error. Summands are added from the first to the last, each
sum rounded to the stored dtype, as torch adds; where all are equal, a remark says that copies would
look like that.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from bioinit.errors import CorruptCheckpoint
from bioinit.formats.protocol import Piece, StoredTensor
from bioinit.layout import Box, intersect, numel, row_major
from bioinit.storage import File, Made

TOLERANCE = 1e-4
"""Copies may differ by this, as the sum over their elements of the squared difference."""

BLOCK_ELEMENTS = 2**20


class Part(NamedTuple):
    """What one partition holds of a tensor: the file people know it by, and where it lies."""

    file: str
    tensor: StoredTensor


def same(files: Sequence[File], name: str, parts: Sequence[Part]) -> Made:
    """The bytes, in row-major order, of the tensor that all ``parts`` hold a copy of.

    ``files`` are what the pieces count from; the sequence may grow later.
    """
    copies = _Copies(files, name, parts)
    how = f"copies in {len(parts)} partitions, held against each other"
    copies.made = _made(files, name, parts, copies, how)
    return copies.made


def total(files: Sequence[File], name: str, parts: Sequence[Part], remark: str = "") -> Made:
    """The bytes, in row-major order, of the sum of all ``parts``."""
    summands = _Summands(files, name, parts)
    summands.made = _made(files, name, parts, summands, f"sum of {len(parts)} partitions")
    if remark:
        summands.made.remarks.append(remark)
    return summands.made


def _made(
    files: Sequence[File], name: str, parts: Sequence[Part], source: _Combined, how: str
) -> Made:
    first = parts[0].tensor
    used = dict.fromkeys(piece.file for part in parts for piece in part.tensor.pieces)
    sources = [files[index] for index in used]
    size = numel(first.shape) * first.dtype.itemsize
    if size > sum(file.size for file in sources):  # one element, shown as a tensor of any size
        raise CorruptCheckpoint(
            f"tensor {name!r} in {parts[0].file} should have {size} bytes, and the file has "
            f"{sources[0].size}. Fetch or write it again."
        )
    return Made(sources[0], name, size, source.make, sources=sources, how=how)


class _Combined(ABC):
    """Makes any stretch of the elements of one tensor out of the same stretch of its parts."""

    def __init__(self, files: Sequence[File], name: str, parts: Sequence[Part]) -> None:
        self.files = files
        self.name = name
        self.parts = parts
        self.dtype = parts[0].tensor.dtype
        self.numel = numel(parts[0].tensor.shape)

    def make(self, offset: int, size: int) -> Any:
        """The ``size`` bytes from ``offset`` on, which may begin and end inside an element."""
        width = self.dtype.itemsize
        first, end = offset // width, -(-(offset + size) // width)
        values = self.values(first, end - first).contiguous().view(torch.uint8)
        return values[offset - first * width :][:size].numpy()

    @abstractmethod
    def values(self, first: int, count: int) -> torch.Tensor:
        """``count`` elements from ``first`` on, in row-major order."""

    def part(self, index: int, first: int, count: int) -> torch.Tensor:
        return elements(self.files, self.parts[index].tensor, first, count)


class _Summands(_Combined):
    made: Made

    def __init__(self, files: Sequence[File], name: str, parts: Sequence[Part]) -> None:
        super().__init__(files, name, parts)
        self.lock = threading.Lock()
        self.is_judged = False

    def values(self, first: int, count: int) -> torch.Tensor:
        with self.lock:
            if not self.is_judged:
                self.is_judged = True
                self.judge()
        found = self.part(0, first, count)
        for index in range(1, len(self.parts)):
            found = _added(found, self.part(index, first, count))
        return found

    def judge(self) -> None:
        """Remark on summands that are all equal, as copies are; the first difference ends it."""
        count = len(self.parts)
        is_zero = True
        step = max(BLOCK_ELEMENTS // count, 1)
        for first in range(0, self.numel, step):
            length = min(step, self.numel - first)
            head = self.part(0, first, length).view(torch.uint8)
            for index in range(1, count):
                if not torch.equal(head, self.part(index, first, length).view(torch.uint8)):
                    return
            is_zero = is_zero and not bool(head.any())
        if not is_zero:
            self.made.remarks.append(
                f"{self.name}: its {count} summands are equal, as copies would be; if they are "
                f"copies, the sum is {count} times too large"
            )


class _Copies(_Combined):
    made: Made

    def __init__(self, files: Sequence[File], name: str, parts: Sequence[Part]) -> None:
        super().__init__(files, name, parts)
        self.lock = threading.Lock()
        self.are_equal: bool | None = None

    def values(self, first: int, count: int) -> torch.Tensor:
        with self.lock:
            if self.are_equal is None:
                self.are_equal = self.judge()
        if self.are_equal:
            return self.part(0, first, count)
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        found = self.part(0, first, count).to(exact)
        for index in range(1, len(self.parts)):
            found = found + self.part(index, first, count).to(exact)
        return (found / len(self.parts)).to(self.dtype)

    def judge(self) -> bool:
        """Whether all copies are equal; if not, they are near enough for their mean.

        Raises:
            CorruptCheckpoint: they differ by more.
        """
        count = len(self.parts)
        squares = torch.zeros(count, count, dtype=torch.float64)
        largest = 0.0
        are_equal = True
        step = max(BLOCK_ELEMENTS // count, 1)
        for first in range(0, self.numel, step):
            length = min(step, self.numel - first)
            copies = [self.part(index, first, length) for index in range(count)]
            head = copies[0].view(torch.uint8)
            if all(torch.equal(head, copy.view(torch.uint8)) for copy in copies[1:]):
                continue
            are_equal = False
            exact = torch.stack([copy.to(torch.float64) for copy in copies])
            largest = max(largest, float((exact.amax(0) - exact.amin(0)).max()))
            for index in range(count - 1):
                squares[index, index + 1 :] += (exact[index + 1 :] - exact[index]).square().sum(1)
        if are_equal:
            return True
        if not self.dtype.is_floating_point or not bool((squares < TOLERANCE).all()):
            self.raise_unequal(squares, largest)
        self.made.remarks.append(
            f"{self.name}: its {count} partitions differ by at most {largest:.3g}; their mean was "
            "taken"
        )
        return False

    def raise_unequal(self, squares: torch.Tensor, largest: float) -> NoReturn:
        at = int(squares.nan_to_num(nan=torch.inf).argmax())
        one, other = divmod(at, len(self.parts))
        raise CorruptCheckpoint(
            f"tensor {self.name!r} should be the same in every partition, but "
            f"{self.parts[one].file} and {self.parts[other].file} differ: the largest difference "
            f"is {largest:.3g}, the sum of the squared ones {float(squares[one, other]):.3g}, and "
            f"less than {TOLERANCE:g} is taken for rounding. Check that these files were written "
            "together, or merge them with the program that wrote them."
        )


def _added(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    if one.dtype.is_floating_point and one.dtype.itemsize == 1:  # torch adds no 8-bit floats
        return (one.float() + other.float()).to(one.dtype)
    return one + other


def elements(files: Sequence[File], tensor: StoredTensor, first: int, count: int) -> torch.Tensor:
    """``count`` elements of ``tensor`` from ``first`` on in row-major order, as a flat tensor."""
    dtype, width = tensor.dtype, tensor.dtype.itemsize
    if len(tensor.pieces) == 1 and tensor.pieces[0].box.strides == row_major(tensor.shape):
        file, offset, box = tensor.pieces[0]
        buffer = bytearray(count * width)
        if count:
            files[file].read_into(offset + (box.start + first) * width, (buffer,))
        return _view(buffer, dtype)
    row = numel(tensor.shape[1:])  # any other view: the rows that the stretch touches
    low, high = first // row, -(-(first + count) // row)
    sizes = (high - low, *tensor.shape[1:])
    found = torch.empty(sizes, dtype=dtype)
    region = Box((low, *(0,) * (len(sizes) - 1)), sizes, 0, row_major(sizes))
    for piece in tensor.pieces:
        _fill(found, files, piece, region)
    return found.view(-1)[first - low * row :][:count]


def _fill(found: torch.Tensor, files: Sequence[File], piece: Piece, region: Box) -> None:
    overlap = intersect(piece.box, region)
    if overlap is None or not numel(overlap.sizes):
        return
    strides, width = overlap.source_strides, found.dtype.itemsize
    span = 1 + sum((size - 1) * step for size, step in zip(overlap.sizes, strides, strict=True))
    buffer = bytearray(span * width)
    files[piece.file].read_into(piece.offset + overlap.source_start * width, (buffer,))
    source = _view(buffer, found.dtype).as_strided(overlap.sizes, strides)
    found.as_strided(overlap.sizes, overlap.target_strides, overlap.target_start)[...] = source


def _view(buffer: bytearray, dtype: torch.dtype) -> torch.Tensor:
    if not buffer:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)
