"""The header of one zarr array, version 2: what ``.zarray`` says, and what follows from it.

An array is cut into chunks of one shape, counted from 0 in every dim; those at the far edge are
stored whole, with elements that belong to nobody. A chunk whose numbers are all the fill value need
not be stored.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats.zarr import codecs
from bioinit.layout import Box, Dims, numel, row_major
from bioinit.storage import File, Folder

HEADER = ".zarray"
MOST_HEADER_BYTES = 1 << 20
MOST_BYTES = 1 << 63
MOST_DIMS = 32  # what zarr 2 can write

_PLAIN = {
    "b1": torch.bool,
    "i1": torch.int8,
    "u1": torch.uint8,
    "i2": torch.int16,
    "u2": torch.uint16,
    "i4": torch.int32,
    "u4": torch.uint32,
    "i8": torch.int64,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
DTYPES = {
    **{f"<{code}": dtype for code, dtype in _PLAIN.items()},
    **{f"|{code}": dtype for code, dtype in _PLAIN.items() if code.endswith("1")},
    **{
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            *_PLAIN.values(),
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e4m3fnuz,
            torch.float8_e5m2,
            torch.float8_e5m2fnuz,
        )
    },
    # What numpy calls bfloat16: two bytes that it knows nothing about.
    "<V2": torch.bfloat16,
    "|V2": torch.bfloat16,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["float8_e8m0fnu"] = torch.float8_e8m0fnu
_BIG = re.compile(r">[biufcV][0-9]{1,2}")
_OTHER = re.compile(r"[<>|=]?[OSUVMmifuc][0-9]*(\[.*\])?|float[0-9]\w*|u?int[0-9]\w*")


class Header(NamedTuple):
    """One array: ``strides`` are those of a chunk, ``fill`` is as it stands in the header."""

    file: File
    name: str
    shape: Dims
    chunk: Dims
    dtype: torch.dtype
    strides: Dims
    separator: str | None
    fill: Any
    codecs: codecs.Chain | None

    @property
    def counts(self) -> Dims:
        """How many chunks there are in each dim."""
        return tuple(-(-n // c) if n else 0 for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """How many bytes a chunk has when it is decoded."""
        return numel(self.chunk) * self.dtype.itemsize

    def box(self, index: Dims) -> Box:
        """What of the array the chunk at ``index`` holds."""
        offsets = tuple(i * c for i, c in zip(index, self.chunk, strict=True))
        sizes = tuple(
            min(c, n - at) for c, n, at in zip(self.chunk, self.shape, offsets, strict=True)
        )
        return Box(offsets, sizes, 0, self.strides)

    def gap(self, first: Dims, cells: Dims) -> Box:
        """What of the array ``cells`` chunks from ``first`` on hold, all of it one element."""
        offsets = tuple(i * c for i, c in zip(first, self.chunk, strict=True))
        sizes = tuple(
            min(n * c, whole - at)
            for n, c, whole, at in zip(cells, self.chunk, self.shape, offsets, strict=True)
        )
        return Box(offsets, sizes, 0, (0,) * len(offsets))

    def fill_bytes(self) -> bytes:
        """The fill value as one element.

        Raises:
            CorruptCheckpoint: it is not a value of this array.
        """
        try:
            return _element(self.fill, self.dtype)
        except (ArithmeticError, RuntimeError, TypeError, ValueError, binascii.Error) as error:
            corrupt(
                self.file,
                f"its fill_value {self.fill!r:.80} is none of {self.dtype}, and a chunk that is "
                "not stored needs it",
                error,
            )


def read_header(root: Folder, name: str) -> Header:
    """The header of the array ``name`` in ``root``.

    Raises:
        CorruptCheckpoint: it contradicts itself.
        RefusedCheckpoint: it asks for what is not read, with the cure.
        ConfigError: it needs a package that is not installed.
    """
    file = root.file(f"{name}/{HEADER}")
    if file.size > MOST_HEADER_BYTES:
        corrupt(file, f"it has {file.size} bytes, and a header has some hundred")
    found = root.read_json(f"{name}/{HEADER}")
    if not isinstance(found, dict):
        corrupt(file, f"it is a JSON {type(found).__name__}, not an object")
    lacking = [key for key in ("zarr_format", "shape", "chunks", "dtype") if key not in found]
    if lacking:
        corrupt(file, f"it lacks {', '.join(map(repr, lacking))}")
    version = found["zarr_format"]
    if version != 2 or type(version) is not int:
        raise RefusedCheckpoint(
            f"{file} is a zarr array of format {version!r:.80}, and only 2 is read. Write it again "
            "with zarr_format=2, or as safetensors."
        )
    dtype = _dtype(file, found["dtype"])
    shape, chunk = _dims(file, "shape", found["shape"]), _dims(file, "chunks", found["chunks"])
    if len(shape) != len(chunk):
        corrupt(file, f"its shape {list(shape)} and its chunks {list(chunk)} differ in dims")
    if any(c == 0 and n for n, c in zip(shape, chunk, strict=True)):
        corrupt(file, f"its chunks {list(chunk)} hold nothing of its shape {list(shape)}")
    for dims, what in ((shape, "shape"), (chunk, "chunks")):
        if numel(tuple(size for size in dims if size)) * dtype.itemsize >= MOST_BYTES:
            corrupt(file, f"its {what} {list(dims)} are more bytes than there can be")
    order = found.get("order", "C")
    if order not in ("C", "F"):
        corrupt(file, f"its order is {order!r:.80}, neither 'C' nor 'F'")
    strides = row_major(chunk) if order == "C" else row_major(chunk[::-1])[::-1]
    separator = found.get("dimension_separator")
    if separator not in (None, ".", "/"):
        corrupt(file, f"its dimension_separator is {separator!r:.80}, neither '.' nor '/'")
    codecs = _chain(file, numel(chunk) * dtype.itemsize, found)
    fill = found.get("fill_value")
    return Header(file, name, shape, chunk, dtype, strides, separator, fill, codecs)


def _chain(file: File, size: int, found: dict[str, Any]) -> codecs.Chain | None:
    try:
        return codecs.chain(size, found.get("filters"), found.get("compressor"))
    except codecs.NotDecoded as error:
        raise RefusedCheckpoint(
            f"{file} asks for {error}. Decoded are {', '.join(codecs.known())}. {codecs.CURE}"
        ) from error
    except ValueError as error:
        corrupt(file, str(error), error)


def _dtype(file: File, spelled: Any) -> torch.dtype:
    if isinstance(spelled, str) and spelled in DTYPES:
        return DTYPES[spelled]
    if isinstance(spelled, str) and _BIG.fullmatch(spelled):
        raise RefusedCheckpoint(
            f"{file} stores {spelled!r}, with the highest byte first, and only the lowest first is "
            f"read. Write it again as {'<' + spelled[1:]!r}."
        )
    if isinstance(spelled, list) or (isinstance(spelled, str) and _OTHER.fullmatch(spelled)):
        raise RefusedCheckpoint(
            f"{file} stores {spelled!r:.80}, which is no kind of number that a weight can be or "
            "does not say which. Write it again as one of "
            f"{', '.join(code for code in DTYPES if code[0] in '<|f')}."
        )
    corrupt(file, f"its dtype {spelled!r:.80} is none that zarr writes")


def _dims(file: File, key: str, found: Any) -> Dims:
    good = isinstance(found, list) and all(type(n) is int and 0 <= n < MOST_BYTES for n in found)
    if not good or len(found) > MOST_DIMS:
        corrupt(file, f"its {key} {found!r:.80} are not up to {MOST_DIMS} sizes")
    return tuple(found)


def _element(fill: Any, dtype: torch.dtype) -> bytes:
    """One element that is ``fill``, as JSON spells it."""
    if fill is None:
        return bytes(dtype.itemsize)
    if dtype.is_complex:
        real, imaginary = fill if isinstance(fill, list) else (fill, 0)
        number: Any = complex(_float(real), _float(imaginary))
    elif dtype.is_floating_point:
        if isinstance(fill, str) and dtype.itemsize < 4:
            try:
                number = _float(fill)
            except ValueError:  # what zarr writes of a dtype that numpy does not know
                return _exactly(base64.b64decode(fill, validate=True), dtype)
        else:
            number = _float(fill)
        if not math.isfinite(number) and dtype in _FINITE:
            raise ValueError("it is not finite")
    else:
        if type(fill) not in (bool, int) or (dtype == torch.bool and fill not in (0, 1)):
            raise ValueError("it is no whole number")
        is_signed = dtype.is_signed and dtype != torch.bool
        return int(fill).to_bytes(dtype.itemsize, "little", signed=is_signed)
    widest = torch.complex128 if dtype.is_complex else torch.float64
    return bytes(torch.tensor([number], dtype=widest).to(dtype).view(torch.uint8).tolist())


_FINITE = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def _float(found: Any) -> float:
    if isinstance(found, str):
        named = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
        if found not in named:
            raise ValueError("it is no number")
        return named[found]
    if type(found) not in (int, float):
        raise ValueError("it is no number")
    return float(found)


def _exactly(data: bytes, dtype: torch.dtype) -> bytes:
    if len(data) != dtype.itemsize:
        raise ValueError(f"it has {len(data)} bytes")
    return data


def gaps(present: Sequence[Dims], counts: Dims) -> Iterator[tuple[Dims, Dims]]:
    """Where in a grid nothing of the sorted ``present`` is: boxes, as first cell and cells.

    There are at most as many as ``present`` has numbers, plus one, however large the grid is.
    """
    cells = [numel(counts[dim:]) for dim in range(len(counts) + 1)]

    def search(low: int, high: int, fixed: Dims) -> Iterator[tuple[Dims, Dims]]:
        dim = len(fixed)
        if high - low == cells[dim]:
            return
        if dim == len(counts):  # the one chunk of a scalar
            yield (), ()
            return
        at, inner = 0, counts[dim + 1 :]
        while low < high:
            value = present[low][dim]
            if value > at:
                yield box(fixed, at, value - at, inner)
            end = bisect_right(present, value, low, high, key=lambda index: index[dim])
            yield from search(low, end, (*fixed, value))
            low, at = end, value + 1
        if at < counts[dim]:
            yield box(fixed, at, counts[dim] - at, inner)

    def box(fixed: Dims, at: int, length: int, inner: Dims) -> tuple[Dims, Dims]:
        return (*fixed, at, *(0 for _ in inner)), (*(1 for _ in fixed), length, *inner)

    return search(0, len(present), ())


def corrupt(file: object, what: str, error: Exception | None = None) -> NoReturn:
    raise CorruptCheckpoint(
        f"{file} is damaged: {what}. Fetch or write the checkpoint again."
    ) from error
