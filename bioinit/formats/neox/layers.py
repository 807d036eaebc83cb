"""Writes a file for each layer and partition, as GPT-NeoX keeps them.

How a tensor is divided is asked of the rules by which the reader puts it together; what they do not
know, or would read in another way once it is divided, is refused. Copies are the same in each
partition. A bias that the partitions add up lies in the first one, and the others hold -0.0, the
only number that changes none that it is added to.

`torch.save` lays the files out without any data, and the tensors are put into their places slab by
slab: each element is asked for once, whatever the number of partitions. As torch does not see the
bytes, it leaves their checksums zero; `torch.load` was built not to look at them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from bioinit.errors import ConfigError
from bioinit.formats._filling import (
    SLAB_BYTES,
    Desk,
    Task,
    Unit,
    allocate,
    put,
    write_units,
    writing,
)
from bioinit.formats._partitions import SAME, Rule, Rules, style
from bioinit.formats.protocol import Outgoing, StoredTensor, WriteOptions
from bioinit.layout import Dims, numel
from bioinit.storage import File, Journal
from bioinit.storage.zip import data_start, members

STEP, LATEST = "global_step0", "latest"
_KEY = re.compile(r"(\d{1,6})\.(.+)", re.DOTALL)
_ARCHIVE = "archive"  # what torch calls the folder inside when it is given no name
_SHOWN = 6


def write(
    folder: Path, tensors: Sequence[Outgoing], options: WriteOptions, journal: Journal
) -> None:
    """Write ``tensors``, each called ``<layer>.<name in its files>``, in ``options.partitions``.

    Raises:
        ConfigError: a tensor is not called so, or cannot be divided.
        StorageError: the file system refused.
    """
    if options.partitions < 1:
        raise ConfigError(
            f"cannot write {options.partitions} partitions: a model has 1 or more. Choose another "
            "number."
        )
    shared = _shared(tensors, options.partitions)
    step = folder / STEP
    with writing(step):
        step.mkdir(exist_ok=True)
    write_units([_Layer(step, number, parts) for number, parts in shared.items()], journal)
    with writing(folder / LATEST):
        (folder / LATEST).write_text(STEP)


class _Share(NamedTuple):
    """A tensor and what each of the ``partitions`` holds of it."""

    name: str
    tensor: Outgoing
    rule: Rule
    partitions: int

    @property
    def shape(self) -> Dims:
        """The shape in each partition."""
        shape, dim = self.tensor.shape, self.rule.dim
        if self.rule.kind != "split":
            return shape
        return (*shape[:dim], shape[dim] // self.partitions, *shape[dim + 1 :])

    @property
    def bytes(self) -> int:
        return numel(self.shape) * self.tensor.dtype.itemsize

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows there are of which each partition has a part, and the elements of one."""
        if self.rule.kind != "split":
            return 1, numel(self.tensor.shape)
        outer = numel(self.tensor.shape[: self.rule.dim])
        return outer, numel(self.tensor.shape[self.rule.dim :])


def _shared(tensors: Sequence[Outgoing], count: int) -> dict[int, list[_Share]]:
    """The shares of every layer, in order."""
    layers: dict[int, dict[str, Outgoing]] = {}
    for tensor in tensors:
        found = _KEY.fullmatch(tensor.key)
        if found is None:
            raise ConfigError(
                f"cannot write the tensor {tensor.key!r} in files of layers: its name should be "
                "<number of the layer>.<name>, as in '2.attention.dense.weight'. Give it such a "
                "name, or choose another format."
            )
        layers.setdefault(int(found[1]), {})[found[2]] = tensor
    table = style([name for layer in layers.values() for name in layer])
    everything = {t.key: _stored(t.shape, t) for t in tensors}
    width = Rules(table, everything).hidden
    shared = {}
    for number, layer in sorted(layers.items()):
        rules = Rules(table, {n: _stored(t.shape, t) for n, t in layer.items()}, hidden=width)
        shares = [
            _Share(name, tensor, _rule(rules, name, tensor, count), count)
            for name, tensor in layer.items()
        ]
        _require_read_alike(Rules(table, {s.name: _part(s) for s in shares}, hidden=width), shares)
        shared[number] = shares
    return shared


def _stored(shape: Dims, tensor: Outgoing) -> StoredTensor:
    return StoredTensor(shape, tensor.dtype, ())


def _part(share: _Share) -> StoredTensor:
    return _stored(share.shape, share.tensor)


def _rule(rules: Rules, name: str, tensor: Outgoing, count: int) -> Rule:
    """How ``tensor`` is divided.

    Raises:
        ConfigError: nobody knows, or its size does not allow it.
    """
    if count == 1:
        return SAME
    rule = rules.find(name)
    if rule is None:
        _raise_unknown(tensor, count)
    size = tensor.shape[rule.dim] if rule.kind == "split" else 0
    if size % (count * rule.slabs):
        halves = f" in each of {rule.slabs} parts of it" if rule.slabs > 1 else ""
        whole = size // rule.slabs
        fitting = [n for n in range(1, count + _SHOWN) if not whole % n and not size % rule.slabs]
        raise ConfigError(
            f"cannot divide the tensor {tensor.key!r} {list(tensor.shape)} over {count} "
            f"partitions: its dim {rule.dim} has {size}, which is no multiple of {count}{halves}. "
            f"Choose a number of partitions that fits (here {', '.join(map(str, fitting))})"
            + (", or pad the vocabulary." if "embed" in name or "linear" in name else ".")
        )
    return rule


def _require_read_alike(rules: Rules, shares: Sequence[_Share]) -> None:
    """Raise ConfigError if a part, by its shape, would be put together in another way."""
    for share in shares:
        if share.partitions > 1 and rules.find(share.name) != share.rule:
            _raise_unknown(share.tensor, share.partitions)


def _raise_unknown(tensor: Outgoing, count: int) -> NoReturn:
    raise ConfigError(
        f"nobody knows how the tensor {tensor.key!r} {list(tensor.shape)} is divided over {count} "
        "partitions: no rule of its writers fits its name, and its shape does not tell. Write one "
        "partition."
    )


class _Layer(Unit):
    """The files of one layer."""

    def __init__(self, folder: Path, number: int, shares: Sequence[_Share]) -> None:
        super().__init__(f"layer_{number:02d}")
        self.shares = shares
        self.paths = [
            folder / f"{self.key}-model_{part:02d}-model_states.pt"
            for part in range(shares[0].partitions)
        ]
        self._descriptors: list[int] = []

    def is_whole(self, note: Any) -> bool:
        sizes = [path.stat().st_size if path.is_file() else None for path in self.paths]
        return bool(sizes == note)

    def begin(self) -> Sequence[Task]:
        empty = {
            share.name: torch.empty(share.shape, dtype=share.tensor.dtype) for share in self.shares
        }
        for path in self.paths:
            with writing(path):
                with open(path, "wb") as stream, torch.serialization.skip_data():
                    torch.save(empty, stream)
                self._descriptors.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
                allocate(self._descriptors[-1], path.stat().st_size)
        begins = _begins(File.at(self.paths[0]), self.shares)
        return [
            task
            for share in self.shares
            if numel(share.shape)
            for task in self._tasks(share, begins[share.name])
        ]

    def finish(self) -> Any:
        for path, descriptor in zip(self.paths, self._descriptors, strict=True):
            with writing(path):
                os.fsync(descriptor)
        self.close()
        return [path.stat().st_size for path in self.paths]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _tasks(self, share: _Share, begin: int) -> Iterator[Task]:
        """Tasks that put all of ``share`` into the files, where it begins at byte ``begin``."""
        outer, length = share.rows
        width = share.tensor.dtype.itemsize
        if outer > 1:
            step = max(1, SLAB_BYTES // 2 // (length * width))  # what one gets is held beside it
            for row in range(0, outer, step):
                yield self._columns(share, begin, row, min(step, outer - row), length)
            return
        parts = share.partitions * share.rule.slabs if share.rule.kind == "split" else 1
        stretch = length // parts
        for number in range(parts):
            slab, part = divmod(number, share.partitions)
            to = None if share.rule.kind != "split" else part
            for first in range(0, stretch, SLAB_BYTES // width):
                count = min(SLAB_BYTES // width, stretch - first)
                at = begin + (slab * stretch + first) * width
                yield self._stretch(share, number * stretch + first, count, at, to)

    def _stretch(
        self, share: _Share, first: int, count: int, position: int, to: int | None
    ) -> Task:
        """Consecutive elements, for the partition ``to`` or all of them."""
        tensor = share.tensor

        def task(desk: Desk) -> None:
            memory = desk.memory(count * tensor.dtype.itemsize).view(tensor.dtype)
            tensor.fill(first, memory)
            for part, path in enumerate(self.paths):
                if to is not None and part != to:
                    continue
                if part == 1 and share.rule.kind == "sum":
                    memory[...] = torch.tensor(-0.0).to(tensor.dtype)
                with writing(path):
                    put(self._descriptors[part], memory, position)

        return task

    def _columns(self, share: _Share, begin: int, row: int, rows: int, length: int) -> Task:
        """Some rows, of which each partition has a part."""
        tensor = share.tensor
        width = tensor.dtype.itemsize
        position = begin + row * length // share.partitions * width

        def task(desk: Desk) -> None:
            size = rows * length * width
            memory = desk.memory(size + size // share.partitions).view(tensor.dtype)
            whole, held = memory[: rows * length], memory[rows * length :]
            tensor.fill(row * length, whole)
            table = whole.view(rows, share.rule.slabs, share.partitions, -1)
            for part, path in enumerate(self.paths):
                held.view(rows, share.rule.slabs, -1)[...] = table[:, :, part]
                with writing(path):
                    put(self._descriptors[part], held, position)

        return task


def _begins(file: File, shares: Sequence[_Share]) -> Mapping[str, int]:
    """The byte of ``file`` at which each tensor begins; torch numbers them in their order."""
    found = members(file)
    names = [f"{_ARCHIVE}/data/{number}" for number in range(len(shares))]
    begins = {}
    for share, name in zip(shares, names, strict=True):
        if found[name].size != share.bytes:
            raise ConfigError(
                f"torch {torch.__version__} lays out {name} in {file} with {found[name].size} "
                f"bytes, and {share.bytes} were expected. Use a torch that was tested."
            )
        begins[share.name] = data_start(file, name, found[name])
    file.close()
    return begins
