"""Checkpoints of torch's distributed format, and hostile changes to their index.

The index is loaded with torch's own classes, changed as an object and pickled again, so that the
changes get past the pickle and reach what reads it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tests.fuzz import binary
from tests.fuzz.choices import Choices

MANY = 4000
ODD = (
    None, True, 0, 1, -1, 2, 3, 7, 2**31, 2**62, 2**63, 2**64, -(2**63), 0.5, float("nan"),
    float("inf"),
    "", "..", "../x", "/etc/passwd", "a\0b", "__0_0.distcp", "x" * 5000, b"x", (), [], {}, (0,),
    [2, 2],
    (2**40, 2**40), (1,) * 70, (True, 1), ("1",), torch.Size([3]), torch.float32, torch.bfloat16,
    torch.complex64, torch.quint8, set(), {1: 2}, {"a": {}}, range(3), slice(1),
)  # fmt: skip


def _properties(tensor: torch.Tensor) -> Any:
    return index.TensorProperties.create_from_tensor(tensor)


def write(folder: Path, state: dict[str, Any]) -> None:
    """Every tensor in one chunk, all in one file."""
    _write(folder, state, cuts=1)


def write_cut(folder: Path, state: dict[str, Any]) -> None:
    """Tensors cut in two along dim 0 where they can be, each half in a file of its own."""
    _write(folder, state, cuts=2)


def _write(folder: Path, state: dict[str, Any], cuts: int) -> None:
    files = [bytearray() for _ in range(cuts)]
    tensors: dict[str, Any] = {}
    places: dict[Any, Any] = {}

    def place(key: Any, number: int, value: Any) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getvalue()
        places[key] = _StorageInfo(f"__{number}_0.distcp", len(files[number]), len(data))
        files[number].extend(data)

    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            tensors[name] = index.BytesStorageMetadata()
            place(index.MetadataIndex(name), 0, value.getvalue())
            continue
        parts = [value]
        if cuts > 1 and value.dim() and value.shape[0] > 1:
            parts = [value[: value.shape[0] // 2], value[value.shape[0] // 2 :]]
        chunks, low = [], 0
        for number, part in enumerate(parts):
            at = torch.Size([low] + [0] * (value.dim() - 1) if value.dim() else [])
            chunks.append(index.ChunkStorageMetadata(at, part.shape))
            place(index.MetadataIndex(name, at, number), number % cuts, part.clone())
            low += part.shape[0] if value.dim() else 0
        tensors[name] = index.TensorStorageMetadata(_properties(value), value.shape, chunks)
    made = index.Metadata(tensors, storage_data=places)
    for number, data in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(made))


def is_index(name: str) -> bool:
    return name.endswith(".metadata")


def _spots(root: Any) -> list[Callable[[Any], None]]:
    """Functions that each put a value into one place of an object, its key places included."""
    found: list[Callable[[Any], None]] = []
    waiting, seen = [root], set()

    def into_dict(target: dict[Any, Any], key: Any) -> None:
        found.append(lambda value: target.__setitem__(key, value))
        found.append(lambda value: target.__setitem__(value, target.pop(key)))

    while waiting:
        here = waiting.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        if isinstance(here, dict):
            for key, value in here.items():
                into_dict(here, key)
                waiting += [key, value]
        elif isinstance(here, list):
            for number, value in enumerate(here):
                found.append(lambda v, target=here, n=number: target.__setitem__(n, v))
                waiting.append(value)
        elif type(here).__module__.startswith("torch.distributed"):
            for name, value in vars(here).items():
                found.append(lambda v, target=here, n=name: object.__setattr__(target, n, v))
                waiting.append(value)
    return found


def _values(root: Any) -> list[Any]:
    """What stands in an index, to be put into other places of it."""
    found: list[Any] = []
    for entry in root.state_dict_metadata.values():
        found.append(entry)
        found += getattr(entry, "chunks", [])
        found += [getattr(entry, "size", ()), getattr(entry, "properties", None)]
    for key, value in (root.storage_data or {}).items():
        found += [key, value, getattr(key, "offset", None)]
    return found


def _swell(root: Any, choices: Choices) -> None:
    """Thousands of chunks, entries or places: whole rows, crosswise, or all the same."""
    names = [n for n, entry in root.state_dict_metadata.items() if getattr(entry, "chunks", None)]
    name = choices.pick(names)
    entry = root.state_dict_metadata[name]
    action = choices.below(5)
    if action == 0:
        entry.chunks *= MANY
    elif action == 1:
        root.state_dict_metadata.update({f"{name}{n}": entry for n in range(MANY)})
    elif action == 2:
        key, place = next(iter(root.storage_data.items()))
        more = {index.MetadataIndex(key.fqn, torch.Size([n])): place for n in range(MANY)}
        root.storage_data.update(more)
    else:
        side = 70 if action == 3 else MANY
        dims = (side, side) if action == 3 else (side,)
        entry.size = torch.Size(dims)
        spots = (
            [(a, b) for a in range(side) for b in range(side)]
            if action == 3
            else [(a,) for a in range(side)]
        )
        one = torch.Size([1] * len(dims))
        entry.chunks = [index.ChunkStorageMetadata(torch.Size(at), one) for at in spots]
        if choices.byte() % 2:
            place = next(iter(root.storage_data.values()))
            more = {index.MetadataIndex(name, torch.Size(at)): place for at in spots}
            root.storage_data.update(more)


def spoil_index(data: bytes, choices: Choices) -> bytes:
    if choices.byte() % 4 == 3:
        return binary.spoil_pickle(data, choices)
    try:
        root = pickle.loads(data)
        if choices.hardly():
            _swell(root, choices)
            return pickle.dumps(root)
        values = _values(root)
        for _ in range(1 + choices.below(2)):
            put = choices.pick(_spots(root))
            value = choices.pick(ODD) if choices.byte() % 3 else choices.pick(values)
            put(value)
        return pickle.dumps(root)
    except Exception:  # changed before, or a change that cannot be: then the bytes
        return binary.spoil_pickle(data, choices)


def spoil_item(case: dict[str, bytes], choices: Choices) -> None:
    """Change the archive of one tensor, and let the index agree with where everything lies."""
    name = next(filter(is_index, sorted(case)))
    try:
        root = pickle.loads(case[name])
        keys = list(root.storage_data)
        key = choices.pick(keys)
        info = root.storage_data[key]
        path = name.removesuffix(".metadata") + info.relative_path
        data = case[path]
        end = info.offset + info.length
        item = binary.spoil_zip(data[info.offset : end], choices)
        case[path] = data[: info.offset] + item + data[end:]
        for other, place in root.storage_data.items():
            if place.relative_path == info.relative_path and place.offset > info.offset:
                moved = place.offset + len(item) - info.length
                root.storage_data[other] = _StorageInfo(place.relative_path, moved, place.length)
        root.storage_data[key] = _StorageInfo(info.relative_path, info.offset, len(item))
        case[name] = pickle.dumps(root)
    except Exception:  # changed before: then the bytes
        case[name] = binary.spoil_pickle(case[name], choices)
