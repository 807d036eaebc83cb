"""The index that torch's distributed checkpoint keeps: which chunk of which tensor lies where.

It is a pickle of torch's own classes, which are not imported: they come out of the closed
unpickler as inert objects whose state is looked at here, one field after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats._tiling import Span
from bioinit.layout import Dims, numel
from bioinit.storage import File
from bioinit.unpickle import SYMBOLS, Opaque, Symbol, load

MOST_DIMS = 64
MOST = 1 << 63
LARGEST = 1 << 31
"""Of 70 billion weights with their optimizer on 1000 ranks, an index has some 100 MiB."""

SMALLEST_CHUNK = 16
"""Bytes that a chunk takes in an index, at the very least."""

_PLANS = (b"X\x0f\x00\x00\x00all_local_plans", b"\x8c\x0fall_local_plans")
CLASS_WORDS = (b"torch.distributed.checkpoint", b"torch.distributed._shard.checkpoint")


def _as_it_is(items: Any) -> Any:
    """A shape is the tuple it was made from: nothing is copied, so nothing has to be counted."""
    if type(items) is not tuple:
        raise TypeError(f"a shape of a {type(items).__name__}")
    return items


_TABLE = {**SYMBOLS, ("torch", "Size"): Symbol("torch", "Size", _as_it_is)}


class Place(NamedTuple):
    """Where an item lies: bytes of a file of the folder. ``transforms``: what was done to them."""

    path: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


class Indexed(NamedTuple):
    """A tensor of the index."""

    shape: Dims
    dtype: torch.dtype
    chunks: list[Span]


@dataclass
class Index:
    """What one or several index files say."""

    tensors: dict[str, Indexed] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    places: dict[tuple[str, Dims | None], Place] = field(default_factory=dict)
    version: str | None = None
    room: int = 0
    """How many more chunks there can be: a pickle can name one list of them many times."""

    def place(self, name: str, at: Dims) -> Place | None:
        """Where the chunk of ``name`` that begins ``at`` lies."""
        found = self.places.get((name, at))
        if found is None and len(self.tensors[name].chunks) == 1:
            found = self.places.get((name, None))
        return found


def is_index(file: File) -> bool:
    """Whether ``file`` begins like a pickle of torch's classes."""
    start = file.read(0, min(file.size, 200))
    return start.startswith(b"\x80") and any(word in start for word in CLASS_WORDS)


def read_index(file: File, into: Index) -> None:
    """Add what the index ``file`` says.

    Raises:
        CorruptCheckpoint: it contradicts itself, or is no index.
    """
    if file.size > LARGEST:
        _corrupt(file, f"it has {file.size} bytes, and no index has more than {LARGEST}")
    data = file.read(0, file.size)
    value = _without_plans(data, str(file))
    if value is None:
        value = load(data, where=str(file), symbols=_TABLE)
    into.room += len(data) // SMALLEST_CHUNK
    state = _state(file, value)
    version = state.get("version")
    into.version = version if type(version) is str else into.version
    for name, entry in _mapping(file, state, "state_dict_metadata").items():
        if type(name) is not str:
            _corrupt(file, f"it names a tensor by a {type(name).__name__}")
        if type(entry) is Opaque and entry.name == "BytesStorageMetadata":
            into.objects.append(name)
        else:
            _add_tensor(file, into, name, entry)
    stored = state.get("storage_data")
    if type(stored) is not dict:
        _corrupt(file, f"its storage_data are a {type(stored).__name__}, not a table of places")
    _add_places(file, into, stored)


def _without_plans(data: bytes, where: str) -> Any:
    """The index without what Megatron appends to it, half of it all, which only a saver needs.

    None if there is no such part, or it is not the last one.
    """
    starts = [at for key in _PLANS if (at := data.find(key)) > 0]
    if not starts:
        return None
    try:
        # Its attributes end here: put them into their dict, hand that to the object, stop.
        value = load(data[: min(starts)] + b"ub.", where=where, symbols=_TABLE)
    except (CorruptCheckpoint, RefusedCheckpoint):
        return None
    state = value.state if type(value) is Opaque else None
    return value if type(state) is dict and type(state.get("storage_data")) is dict else None


def _add_tensor(file: File, into: Index, name: str, entry: Any) -> None:
    try:
        state = entry.state
        properties = state["properties"]
        shape = dims(state["size"])
        dtype = _dtype(properties)
        chunks = state["chunks"]
        if type(chunks) is not list:
            raise ValueError("chunks are no list")
        into.room -= len(chunks)
        if into.room < 0:
            raise ValueError("it lists more chunks than the index has room for")
        spans = []
        for chunk in chunks:
            inside = chunk.state
            spans.append((dims(inside["offsets"]), dims(inside["sizes"])))
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        _corrupt(file, f"its entry for {name!r:.200} makes no sense: {_said(error)}")
    if dtype is None:
        _corrupt(file, f"its entry for {name!r:.200} has no dtype")
    if numel(tuple(n for n in shape if n)) * dtype.itemsize >= MOST:
        _corrupt(file, f"its entry for {name!r:.200} has the shape {shape}, more than there can be")
    known = into.tensors.get(name)
    if known is None:
        into.tensors[name] = Indexed(shape, dtype, spans)
        return
    # Ranks that wrote an index each may all have stored what they hold alike.
    if known[:2] != (shape, dtype):
        _corrupt(
            file,
            f"its entry for {name!r:.200} says {dtype} {shape}, and another index says "
            f"{known.dtype} {known.shape}",
        )
    held = set(known.chunks)
    known.chunks.extend(span for span in spans if span not in held)


def _dtype(properties: Any) -> torch.dtype | None:
    """The dtype among a tensor's properties, which pickle as a tuple, or in old torch by name."""
    state = properties.state
    found = state.get("dtype") if type(state) is dict else state[0]
    return found if type(found) is torch.dtype else None


def dims(value: Any) -> Dims:
    """``value`` if it is a shape or an offset.

    Raises:
        ValueError: it is not, or larger than there can be.
    """
    if type(value) is list:
        value = tuple(value)
    if type(value) is not tuple or len(value) > MOST_DIMS:
        raise ValueError("an offset or a size is no short tuple")
    for number in value:
        if type(number) is not int or not 0 <= number < MOST:
            raise ValueError("an offset or a size is no whole number that can be")
    return value


def _add_places(file: File, into: Index, stored: dict[Any, Any]) -> None:
    places, entry = into.places, None
    names: dict[str, str] = {}
    try:
        for index, entry in stored.items():
            key = index.state
            name, at = key["fqn"], key.get("offset")
            place = entry.state
            path, offset, length = place["relative_path"], place["offset"], place["length"]
            if type(name) is not str or type(path) is not str:
                raise ValueError("a name is no text")
            if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
                raise ValueError("a place in a file is no whole number")
            found = Place(names.setdefault(path, path), offset, length)
            transforms = place.get("transform_descriptors")
            if transforms:
                found = found._replace(transforms=tuple(str(t)[:100] for t in transforms[:10]))
            where = (name, None if at is None else dims(at))
            places.setdefault(where, found)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        _corrupt(file, f"its storage_data make no sense at entry {len(places)}: {_said(error)}")


def _state(file: File, value: Any) -> dict[str, Any]:
    """The fields of torch's ``Metadata``, or of what a writer derived from it."""
    if type(value) is not Opaque or type(value.state) is not dict:
        found = value.name if isinstance(value, Opaque) else type(value).__name__
        _corrupt(file, f"the index is a {found:.100}, not torch's Metadata")
    return value.state


def _mapping(file: File, state: dict[str, Any], name: str) -> dict[Any, Any]:
    found = state.get(name)
    if type(found) is not dict:
        _corrupt(file, f"its {name} are a {type(found).__name__}, not a table")
    return found


def _said(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, AttributeError | TypeError):
        return "it is of another kind than torch writes"
    return str(error)


def _corrupt(file: File, what: str) -> NoReturn:
    raise CorruptCheckpoint(f"{file} is damaged: {what:.500}. Fetch or write it again.")


def require_untransformed(place: Place, name: str, file: File) -> None:
    """Refuse an item that went through a codec on its way to disk."""
    if place.transforms:
        raise RefusedCheckpoint(
            f"{file} stores the tensor {name!r} through {', '.join(place.transforms)}, so its "
            "bytes cannot be read in place. Load it with torch.distributed.checkpoint and save it "
            "again without extensions."
        )
