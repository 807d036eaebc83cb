"""Writes safetensors: each file's header first, then its tensors in slabs, in any order.

Where every byte lies is known before the first one is there, so shards are reserved whole and
filled by several threads. ``model.safetensors``, or numbered shards with an index, as transformers
names them. Tensors come in the order given; within a file those with wider elements come first, so
that each begins where its elements may.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bioinit.errors import ConfigError
from bioinit.formats._filling import (
    SLAB_BYTES,
    Desk,
    Following,
    Task,
    Unit,
    put,
    reserve,
    write_units,
    writing,
)
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.formats.safetensors.dtypes import DTYPES
from bioinit.layout import numel
from bioinit.storage import Journal

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RESERVED = "__metadata__"
_ALIGNED = 8
_CLOSED = -1


def write(
    folder: Path, tensors: Sequence[Outgoing], options: WriteOptions, journal: Journal
) -> None:
    """Write ``tensors`` into ``folder``, in files of at most ``options.max_shard_bytes``.

    Raises:
        ConfigError: a tensor has a dtype or a name that the format cannot express.
        StorageError: the file system refused; a disk that is too small is noticed first.
    """
    _require_expressible(tensors)
    groups = _divided(tensors, options.max_shard_bytes)
    count = len(groups)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    shards = [_Shard(folder / name, group) for name, group in zip(names, groups, strict=True)]
    write_units(shards, journal)
    if count > 1:
        _write_index(folder / INDEX, shards)


class _Shard(Unit):
    """One file."""

    def __init__(self, path: Path, tensors: Sequence[Outgoing]) -> None:
        super().__init__(path.name)
        self.path = path
        self.tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
        self._begins: list[int] = []
        end = 0
        for tensor in self.tensors:
            self._begins.append(end)
            end += _bytes(tensor)
        self.data_bytes = end
        self._head = self._header()
        self.size = len(self._head) + end
        self._descriptor = _CLOSED
        self._digest = Following(path)

    def is_whole(self, note: Any) -> bool:
        is_ours = isinstance(note, dict) and note.get("bytes") == self.size
        return is_ours and self.path.is_file() and self.path.stat().st_size == self.size

    def reserve(self, desk: Desk) -> None:
        reserve(self.path, self.size)

    def begin(self) -> Sequence[Task]:
        with writing(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            put(self._descriptor, torch.frombuffer(bytearray(self._head), dtype=torch.uint8), 0)
        self._digest = Following(self.path)
        self._digest.written(0, len(self._head))
        return [self._task(begin) for begin in range(0, self.data_bytes, SLAB_BYTES)]

    def finish(self) -> Any:
        digest = self._digest.result()
        with writing(self.path):
            os.fsync(self._descriptor)
        self.close()
        return {"bytes": self.size, "sha256": digest}

    def close(self) -> None:
        if self._descriptor != _CLOSED:
            os.close(self._descriptor)
            self._descriptor = _CLOSED

    def _task(self, begin: int) -> Task:
        """Fills the data bytes from ``begin`` on, one slab of them.

        Elements never lie across two slabs: none is wider than those before it.
        """
        end = min(begin + SLAB_BYTES, self.data_bytes)

        def task(desk: Desk) -> None:
            slab = desk.memory(end - begin)
            number = bisect_right(self._begins, begin) - 1
            while number < len(self.tensors) and self._begins[number] < end:
                tensor, at = self.tensors[number], self._begins[number]
                low, high = max(at, begin), min(at + _bytes(tensor), end)
                if low < high:
                    memory = slab[low - begin : high - begin].view(tensor.dtype)
                    tensor.fill((low - at) // tensor.dtype.itemsize, memory)
                number += 1
            with writing(self.path):
                put(self._descriptor, slab, len(self._head) + begin)
            self._digest.written(len(self._head) + begin, len(self._head) + end)

        return task

    def _header(self) -> bytes:
        entries: dict[str, Any] = {_RESERVED: {"format": "pt"}}
        for tensor, begin in zip(self.tensors, self._begins, strict=True):
            entries[tensor.key] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, begin + _bytes(tensor)],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNED)
        return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Outgoing) -> int:
    return numel(tensor.shape) * tensor.dtype.itemsize


def _divided(tensors: Sequence[Outgoing], most: int) -> list[list[Outgoing]]:
    """Tensors by file, in order; one that is larger than a file may be has one alone."""
    groups: list[list[Outgoing]] = [[]]
    held = 0
    for tensor in tensors:
        size = _bytes(tensor)
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
    return groups


def _require_expressible(tensors: Sequence[Outgoing]) -> None:
    for tensor in tensors:
        if tensor.dtype not in _NAMES:
            raise ConfigError(
                f"safetensors cannot hold the tensor {tensor.key!r}: it has the dtype "
                f"{tensor.dtype}, and safetensors knows {', '.join(DTYPES)}. Convert to another "
                "dtype, or choose another format."
            )
        if tensor.key == _RESERVED:
            raise ConfigError(
                f"safetensors cannot hold a tensor called {_RESERVED!r}, which is what it calls "
                "its notes. Give the tensor another name, or choose another format."
            )


def _write_index(path: Path, shards: Sequence[_Shard]) -> None:
    placed = {tensor.key: shard.path.name for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    with writing(path):
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
