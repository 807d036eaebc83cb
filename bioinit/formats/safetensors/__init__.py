"""One safetensors file: eight bytes of length, a JSON header, then the tensors side by side.

The header is parsed here rather than by the library, because the plan needs byte ranges and not
tensors. The tensors must cover the data part exactly, each byte once: a gap, an overlap or a
left-over byte means that header and data do not belong together.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any, NoReturn

import torch

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.formats.safetensors.dtypes import DTYPES, PACKED
from bioinit.formats.safetensors.shards import write
from bioinit.layout import Box, Dims, numel
from bioinit.storage import File, Folder

SUFFIX = ".safetensors"
LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""What the format allows; a larger number is a file that is no safetensors."""

LARGE_HEADER_BYTES = 1_000_000
MOST_BYTES = 1 << 63
MOST_DIMS = 64
_NESTED = re.compile(rb"\[\s*[\[{]|\]\s*,\s*[\[{]")
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)

Span = tuple[int, int, str]
"""First byte, byte after the last, name."""


def _recognizes(folder: Folder) -> bool:
    if not folder.is_file:
        return False
    file = folder.file(folder.names()[0])
    if file.name.endswith(SUFFIX):
        return True
    if file.name.endswith(".distcp"):  # such an image too, but with an index: part of another
        return False
    if file.size <= LENGTH_BYTES:
        return False
    length = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    fits = length <= min(MOST_HEADER_BYTES, file.size - LENGTH_BYTES)
    return fits and length > 1 and file.read(LENGTH_BYTES, 2) in (b'{"', b"{}")


def _open(folder: Folder, open_inner: Open) -> Contents:
    file = folder.file(folder.names()[0])
    entries, data_starts = _read_header(file)
    return _describe(file, entries, data_starts)


def _read_header(file: File) -> tuple[tuple[tuple[str, Any], ...], int]:
    """The header, its objects as tuples of pairs, and the byte at which the data starts."""
    if file.size < LENGTH_BYTES:
        _corrupt(file, f"it has {file.size} bytes, and the length of its header alone takes 8")
    length = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    if length > MOST_HEADER_BYTES:
        _corrupt(
            file,
            f"its first 8 bytes announce a header of {length} bytes, more than the "
            f"{MOST_HEADER_BYTES} a safetensors file may have",
        )
    data_starts = LENGTH_BYTES + length
    if data_starts > file.size:
        _corrupt(
            file,
            f"it has {file.size} bytes, but its header alone should end at byte {data_starts}: "
            "it is truncated",
        )
    data = file.read(LENGTH_BYTES, length)
    if not data.startswith(b"{"):
        _corrupt(file, f"its header begins with {data[:8]!r}, and should with '{{'")
    # Lists of lists, which no header needs, take fifty times their bytes once they are parsed.
    nested = length > LARGE_HEADER_BYTES and _NESTED.search(data) is not None
    if nested and _NESTED.search(_TEXTS.sub(b"", data)):  # brackets may stand in texts
        _corrupt(file, "its header nests one list in another")
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        _corrupt(file, f"its header is not JSON: {error}")
    if type(header) is not tuple:
        _corrupt(file, f"its header is a JSON {type(header).__name__}, not an object")
    return header, data_starts


def _describe(file: File, entries: tuple[tuple[str, Any], ...], data_starts: int) -> Contents:
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, Any] = {}
    # Many tensors have the same dtype and shape: their box, and what it takes, is worked out once.
    known: dict[tuple[str | int, ...], tuple[Dims, torch.dtype, Box, int]] = {}
    spans: list[Span] = []
    in_order, last_end = True, 0
    for name, entry in entries:
        if name == "__metadata__":
            metadata = _plain_metadata(file, entry)
            continue
        try:
            (key_0, dtype), (key_1, dims), (key_2, offsets) = entry
            if key_0 != "dtype" or key_1 != "shape" or key_2 != "data_offsets":
                dtype, dims, offsets = _reordered(entry)
            begin, end = offsets
            found = known.get((dtype, *dims))
            if found is None:
                found = known[(dtype, *dims)] = _measure(file, name, dtype, dims)
        except (TypeError, ValueError, KeyError):
            _corrupt(
                file,
                f"the entry of tensor {name!r} is not the dtype, the shape and the two data "
                f"offsets it should be: {_shortened(entry)}",
            )
        shape, torch_dtype, box, num_bytes = found
        if type(begin) is not int or type(end) is not int or end - begin != num_bytes:
            _corrupt(
                file,
                f"tensor {name!r} has the data offsets {begin!r:.80} and {end!r:.80}, but {dtype} "
                f"{list(shape)} takes {num_bytes} bytes",
            )
        if begin != last_end:
            in_order = False
        last_end = end
        spans.append((begin, end, name))
        piece = Piece(0, data_starts + begin, box)
        tensors[name] = StoredTensor(shape, torch_dtype, (piece,))
    if len(tensors) != len(spans):
        names = sorted(span[2] for span in spans)
        twice = next(a for a, b in pairwise(names) if a == b)
        _corrupt(file, f"its header names tensor {twice!r} twice")
    if not in_order:
        spans.sort()
        _require_adjacent(file, spans)
        last_end = spans[-1][1]
    _require_end(file, data_starts, last_end)
    return Contents(files=(file,), tensors=tensors, metadata=metadata)


def _reordered(entry: Any) -> tuple[Any, Any, Any]:
    """Dtype, shape and offsets of an entry that lists them in another order."""
    by_name = dict(entry)
    if len(by_name) != len(entry):
        raise ValueError("a key stands twice")
    return by_name["dtype"], by_name["shape"], by_name["data_offsets"]


def _measure(file: File, name: str, dtype: Any, dims: Any) -> tuple[Dims, torch.dtype, Box, int]:
    """Shape, torch's dtype, box and bytes of all tensors with this dtype and these dims."""
    if dtype in PACKED:
        raise RefusedCheckpoint(
            f"{file} stores tensor {name!r} as {dtype}, several numbers to a byte: that is a "
            "quantized checkpoint. Point at the unquantized weights it was made from."
        )
    if dtype not in DTYPES:
        _corrupt(file, f"tensor {name!r} has the dtype {dtype!r:.80}, not one of safetensors")
    if type(dims) is not list or not all(type(size) is int and size >= 0 for size in dims):
        raise ValueError("not a shape")
    shape = tuple(dims)
    item = DTYPES[dtype].itemsize
    # Where a dim is 0 the others still become strides, which are as limited as sizes are.
    if len(shape) > MOST_DIMS or numel(tuple(size for size in shape if size)) * item >= MOST_BYTES:
        raise ValueError("more dims or bytes than there can be")
    num_bytes = numel(shape) * item
    return shape, DTYPES[dtype], Box.contiguous(shape), num_bytes


def _require_adjacent(file: File, spans: list[Span]) -> None:
    """Raise unless each of the sorted ``spans`` begins where the one before it ends."""
    last_end, last_name = 0, ""
    for begin, end, name in spans:
        if begin < last_end:
            _corrupt(
                file,
                f"tensor {name!r} begins at data byte {begin}"
                + (
                    f", inside tensor {last_name!r}, which ends at {last_end}" if begin >= 0 else ""
                ),
            )
        if begin > last_end:
            _corrupt(
                file,
                f"no tensor owns its data bytes {last_end} to {begin}, before tensor {name!r}",
            )
        last_end, last_name = end, name


def _require_end(file: File, data_starts: int, last_end: int) -> None:
    held = file.size - data_starts
    if held < last_end:
        _corrupt(
            file,
            f"its tensors take {last_end} bytes, but {held} follow the header: it is truncated",
        )
    if held > last_end:
        _corrupt(file, f"its last {held - last_end} bytes belong to no tensor")


def _plain_metadata(file: File, entry: Any) -> dict[str, Any]:
    try:
        found = dict(entry)
    except (TypeError, ValueError):
        _corrupt(file, "its '__metadata__' is not an object")
    try:
        "".join(part for pair in found.items() for part in pair).encode("utf-8")
    except (TypeError, UnicodeEncodeError):
        _corrupt(file, "its '__metadata__' is not an object of texts")
    return found


def _shortened(entry: Any) -> str:
    text = repr(entry)
    return text if len(text) <= 200 else text[:200] + "..."


def _corrupt(file: File, what: str) -> NoReturn:
    raise CorruptCheckpoint(f"{file} is damaged: {what}. Fetch or write it again.")


FORMAT = Format(
    recognizes=_recognizes,
    open=_open,
    marks="*.safetensors",
    write=write,
    honours=("max_shard_bytes",),
)
