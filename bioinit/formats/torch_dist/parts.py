"""Writes torch's distributed checkpoint, with what Megatron-Core keeps beside it.

One process writes all of it, or each of many its own chunks, and one of them the index. Torch's
own writer stores the bytes and the index; it is asked for a part of about a gigabyte at a time, so
that an interrupted one loses no more. The planner that it asks for data makes a chunk when it is
wanted, in memory that is used again: a chunk per thread is all that is ever held.

A chunk is a box of rows. Where a tensor is a stack, of layers or of the experts in them, no chunk
crosses from one into the next, so who loads one layer reads no other.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from bioinit.formats import _megatron
from bioinit.formats._filling import Desk, Task, Unit, write_units, writing
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.layout import Dims, numel, row_major
from bioinit.storage import Journal, disk_error, worker_count

CHUNK_BYTES = 32 * 2**20
MOST_WORKERS = 4
"""With a chunk for each they hold half of what a conversion may need."""

LARGEST_PART, SMALLEST_PART, PARTS = 2**30, 2**26, 16
"""Bytes of a part, and how many there should be before they get larger."""

_NOTHING: Mapping[str, bytes] = {}
_LAYERS = re.compile(r"(.*\.)?layers\.(?!\d+(\.|$)).+")
_EXPERTS = re.compile(r"(.*\.)?experts\.experts\.(?!\d+(\.|$)).+")
_BACKEND = {
    "sharded_backend": _megatron.BACKEND,
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write(
    folder: Path, tensors: Sequence[Outgoing], options: WriteOptions, journal: Journal
) -> None:
    """Write ``tensors`` and ``options.objects``, and ``options.common`` beside them.

    Raises:
        StorageError: the file system refused.
    """
    for left in folder.glob(".part-*"):
        shutil.rmtree(left, ignore_errors=True)
    chunks = [chunk for tensor in tensors for chunk in chunks_of(tensor)]
    write_chunks(folder, chunks, journal, objects=options.objects)
    finish(folder, tensors, chunks, [journal.notes], options)


def write_chunks(
    folder: Path,
    chunks: Sequence[Chunk],
    journal: Journal,
    *,
    rank: int = 0,
    objects: Mapping[str, bytes] = _NOTHING,
) -> None:
    """Write ``chunks`` and ``objects`` as the files of ``rank``; the journal says what is in them.

    Raises:
        StorageError: the file system refused.
    """
    parts = [
        _Part(folder, rank, number, held, objects if not number else {})
        for number, held in enumerate(_divided(chunks))
        if held or not rank
    ]
    with _without_checksums():
        write_units(parts, journal, workers=min(worker_count(), MOST_WORKERS))


def finish(
    folder: Path,
    tensors: Sequence[Outgoing],
    chunks: Iterable[Chunk],
    notes: Sequence[Mapping[str, Any]],
    options: WriteOptions,
) -> None:
    """Write what makes files of chunks a checkpoint: the index, and what Megatron keeps beside it.

    Args:
        folder: where the files are.
        tensors: what was written.
        chunks: all of their chunks.
        notes: what each journal says.
        options: what else is stored.

    Raises:
        StorageError: the file system refused.
    """
    with _without_checksums(), writing(folder / _megatron.COMMON):
        torch.save(dict(options.common), folder / _megatron.COMMON)
    results = [_results(name, note) for said in notes for name, note in said.items()]
    with writing(folder):
        _Writer(folder).finish(_index(tensors, chunks, options.objects), results)
        (folder / _megatron.CONFIG).write_text(json.dumps(_BACKEND))


class Chunk(NamedTuple):
    """A box of a tensor: consecutive elements of it, row-major, from ``first`` on."""

    tensor: Outgoing
    offsets: Dims
    sizes: Dims
    first: int

    @property
    def bytes(self) -> int:
        return numel(self.sizes) * self.tensor.dtype.itemsize

    @property
    def key(self) -> MetadataIndex:
        return MetadataIndex(self.tensor.key, self.offsets)

    @property
    def box(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offsets), torch.Size(self.sizes))


def chunks_of(tensor: Outgoing) -> Iterator[Chunk]:
    """The boxes that ``tensor`` is stored in, none larger than a row or ``CHUNK_BYTES``."""
    shape, dims = tensor.shape, len(tensor.shape)
    if not numel(shape) or not dims:
        yield Chunk(tensor, (0,) * dims, shape, 0)
        return
    strides, width = row_major(shape), tensor.dtype.itemsize
    cut = next(dim for dim in range(dims) if dim == dims - 1 or strides[dim] * width <= CHUNK_BYTES)
    stacked = bool(_LAYERS.fullmatch(tensor.key)) + bool(_EXPERTS.fullmatch(tensor.key))
    cut = min(max(cut, stacked), dims - 1)
    rows = 1 if cut < stacked else max(1, CHUNK_BYTES // (strides[cut] * width))
    count = -(-shape[cut] // rows)
    rows = -(-shape[cut] // count)
    inner = shape[cut + 1 :]
    for outer in product(*map(range, shape[:cut])):
        for low in range(0, shape[cut], rows):
            offsets = (*outer, low, *(0 for _ in inner))
            sizes = (*(1 for _ in outer), min(rows, shape[cut] - low), *inner)
            first = sum(at * step for at, step in zip(offsets, strides, strict=True))
            yield Chunk(tensor, offsets, sizes, first)


def _divided(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """The chunks of every part; the same for the same tensors, whoever writes them."""
    total = sum(chunk.bytes for chunk in chunks)
    most = min(max(total // PARTS, SMALLEST_PART), LARGEST_PART)
    parts: list[list[Chunk]] = [[]]
    held = 0
    for chunk in chunks:
        if parts[-1] and held + chunk.bytes > most:
            parts.append([])
            held = 0
        parts[-1].append(chunk)
        held += chunk.bytes
    return parts


class _Writer(FileSystemWriter):
    """Torch's, without the path that it would leave in the index, which is a hidden one."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Planner(DefaultSavePlanner):
    """Makes what is written when it is asked for it."""

    def __init__(self, desk: Desk, chunks: Sequence[Chunk], objects: Mapping[str, bytes]) -> None:
        super().__init__()
        self._desk = desk
        self._chunks = {chunk.key: chunk for chunk in chunks}
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        chunk = self._chunks[write_item.index]
        dtype = chunk.tensor.dtype
        if not chunk.bytes:
            return torch.empty(chunk.sizes, dtype=dtype)
        # Torch would copy a tensor that is smaller than its storage.
        slab = self._desk.memory(chunk.bytes).numpy().data
        memory = torch.frombuffer(slab, dtype=torch.uint8).view(dtype)
        chunk.tensor.fill(chunk.first, memory)
        return memory.view(chunk.sizes)


class _Part(Unit):
    """One ``.distcp`` file; it has its name when all of it is on the disk."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        number: int,
        chunks: Sequence[Chunk],
        objects: Mapping[str, bytes],
    ) -> None:
        super().__init__(f"__{rank}_{number}.distcp")
        self.path = folder / self.key
        self.chunks = chunks
        self.objects = objects
        self._made_in = folder / f".part-{rank}-{number}"
        self._note: Any = None

    def is_whole(self, note: Any) -> bool:
        items = note.get("items") if isinstance(note, dict) else None
        is_ours = isinstance(items, list) and all(
            isinstance(item, list) and len(item) == _NOTED for item in items
        )
        return is_ours and self.path.is_file() and self.path.stat().st_size == note.get("size")

    def begin(self) -> Sequence[Task]:
        return (self._write,)

    def finish(self) -> Any:
        return self._note

    def close(self) -> None:
        shutil.rmtree(self._made_in, ignore_errors=True)

    def _write(self, desk: Desk) -> None:
        objects = {name: _stored(content) for name, content in self.objects.items()}
        planner = _Planner(desk, self.chunks, objects)
        items = [_object_item(name, data) for name, data in objects.items()]
        items += map(_tensor_item, self.chunks)
        writer = _Writer(self._made_in)
        with _failing(self.path):
            self._made_in.mkdir()
            (plan,) = writer.prepare_global_plan([SavePlan(items)])
            results = writer.write_data(plan, planner).wait()
            (made,) = self._made_in.iterdir()
            made.rename(self.path)
            self._note = {"size": self.path.stat().st_size, "items": list(map(_noted, results))}


_NOTED = 4  # what is noted of an item


def _noted(result: WriteResult) -> list[Any]:
    index, place = result.index, result.storage_data
    offsets = None if index.offset is None else list(index.offset)
    return [index.fqn, offsets, place.offset, place.length]


def _results(file: str, note: Any) -> list[WriteResult]:
    """What torch said of a file, as it was noted."""
    return [
        WriteResult(MetadataIndex(name, offsets), length, _StorageInfo(file, at, length))
        for name, offsets, at, length in note["items"]
    ]


def _stored(content: bytes) -> bytes:
    """An object as Megatron stores it: a list of one, and None where there is nothing to keep."""
    data = io.BytesIO()
    torch.save([io.BytesIO(content) if content else None], data)
    return data.getvalue()


def _object_item(name: str, data: bytes) -> WriteItem:
    return WriteItem(
        MetadataIndex(name), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(data))
    )


def _tensor_item(chunk: Chunk) -> WriteItem:
    data = TensorWriteData(chunk.box, _properties(chunk.tensor), torch.Size(chunk.tensor.shape))
    return WriteItem(chunk.key, WriteItemType.SHARD, tensor_data=data)


def _properties(tensor: Outgoing) -> TensorProperties:
    return TensorProperties(dtype=tensor.dtype)


def _index(
    tensors: Sequence[Outgoing], chunks: Iterable[Chunk], objects: Mapping[str, bytes]
) -> Metadata:
    entries: dict[str, Any] = {name: BytesStorageMetadata() for name in objects}
    for tensor in tensors:
        entries[tensor.key] = TensorStorageMetadata(
            _properties(tensor), torch.Size(tensor.shape), []
        )
    for chunk in chunks:
        entries[chunk.tensor.key].chunks.append(chunk.box)
    return Metadata(entries)


@contextmanager
def _failing(path: Path) -> Iterator[None]:
    """What the system said, where torch reports something that follows from it, as StorageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise disk_error(cause, f"write {path}") from error


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Have `torch.save` leave out the checksums, which take longer than writing.

    Nothing that reads such files looks at them: `torch.load` was built without.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
