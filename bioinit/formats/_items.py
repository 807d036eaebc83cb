"""Single tensors that `torch.save` wrote one after the other into a file, read in place.

Each is a zip archive of its own, whose pickle says dtype, strides and where in its storage the
tensor begins. Items of the same length almost always begin with the same bytes, up to the data, so
what an archive says is worked out once for each such beginning, and one small read per item is
left.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, NoReturn

import torch

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats import _archive
from bioinit.formats.protocol import Contents, Open, StoredTensor
from bioinit.layout import Dims
from bioinit.storage import File, Folder
from bioinit.storage.zip import LOCAL_START, data_start, members
from bioinit.unpickle import Opaque, Placing, Refused, TensorRef, load

FIRST_READ = 1024
LONGEST_HEAD = 1 << 20
MOST_HEADS = 8
LENGTH_BYTES = 8
LETTERS_PER_ENTRY = 128


class Located(NamedTuple):
    """A tensor in an item: its shape and dtype, the byte of element 0 in the file, its strides."""

    shape: Dims
    dtype: torch.dtype
    offset: int
    strides: Dims


class Item(NamedTuple):
    """Where one item lies: ``length`` bytes of ``file`` from ``offset`` on."""

    file: File
    offset: int
    length: int


class Items:
    """Locates the tensors of items. Remembers how items begin."""

    def __init__(self, folder: Folder, open_inner: Open, shared: Container[str]) -> None:
        """``shared`` names the files in which several items lie, so that none is an image."""
        self.folder = folder
        self.open_inner = open_inner
        self.shared = shared
        # By length of the item, then by length of its head: what a head says.
        self.heads: dict[int, dict[int, dict[bytes, Located]]] = {}
        # By file and offset: any number of names may be given to one item.
        self.located: dict[tuple[str, int], tuple[int, Located]] = {}
        self.blobs: dict[tuple[str, int], tuple[Mapping[str, StoredTensor], dict[str, Dims]]] = {}

    def locate(self, item: Item, name: str, at: Dims) -> Located:
        """Where the tensor in ``item`` lies: the chunk of ``name`` that begins ``at``.

        Raises:
            CorruptCheckpoint: there is no such tensor.
            RefusedCheckpoint: only code could bring it to life, or it is compressed.
        """
        file, offset, length = item
        before = self.located.get((file.name, offset))
        if before is not None:
            if before[0] != length:
                _corrupt(
                    file,
                    name,
                    f"is said to take {length} bytes from byte {offset} on, and another one "
                    f"{before[0]} bytes from there",
                )
            return before[1]
        if offset + length > file.size:
            raise CorruptCheckpoint(
                f"{file} has {file.size} bytes, but the tensor {name!r} should end at byte "
                f"{offset + length}: the file is truncated, or the index is wrong. Fetch or write "
                "it again."
            )
        known = self.heads.get(length, {})
        first = max(known, default=FIRST_READ)
        start = file.read(offset, min(length, first))
        for size, heads in known.items():
            found = heads.get(start[:size])
            if found is not None:
                found = found._replace(offset=offset + found.offset)
                self.located[file.name, offset] = length, found
                return found
        if start.startswith(LOCAL_START):
            return self._parse(item, name, start)
        if offset + LENGTH_BYTES + 1 < file.size and _looks_like_header(file, offset):
            return self._in_blob(item, name, at)
        _corrupt(file, name, f"is said to begin at byte {offset}, where no tensor begins")

    def _parse(self, item: Item, name: str, start: bytes) -> Located:
        """What the archive says by itself, from the directory at its end."""
        file, offset, length = item
        window = file.window(f"{file.name}, tensor {name!r} at byte {offset}", offset, length)
        found = members(window)
        root = _archive.root(window, found)
        member = found[f"{root}{_archive.PICKLE}"]
        pickle_begins = data_start(window, f"{root}{_archive.PICKLE}", member)
        value = load(window.read(pickle_begins, member.size), where=str(window))
        ref = _require_tensor(window, value)
        key, _, numel, _ = ref.storage
        data = f"{root}data/{key}"
        if data not in found:
            _corrupt(file, name, f"lies in the storage {key!r}, which its archive lacks")
        begin, size = data_start(window, data, found[data]), found[data].size
        if size < numel * ref.storage.dtype.itemsize:
            _corrupt(
                file, name, f"has {size} bytes in its archive, but its pickle says {numel} elements"
            )
        shape, dtype, at, box = Placing({key: (begin, size)}, str(window)).place(name, ref)
        located = Located(shape, dtype, at, box.strides)
        if max(pickle_begins + member.size, at) <= begin <= LONGEST_HEAD:
            head = start if begin <= len(start) else window.read(0, begin)
            by_size = self.heads.setdefault(length, {})
            if len(by_size) < MOST_HEADS or begin in by_size:
                by_size.setdefault(begin, {})[head[:begin]] = located
        found_here = located._replace(offset=offset + at)
        self.located[file.name, offset] = length, found_here
        return found_here

    def _in_blob(self, item: Item, name: str, at: Dims) -> Located:
        """The same where all tensors of a file are in one safetensors image."""
        file, offset, _ = item
        key = (file.name, offset)
        if file.name in self.shared:
            _corrupt(
                file,
                name,
                f"is said to lie in a safetensors image at byte {offset}, which reaches to the end "
                "of the file, and other items are said to lie there too",
            )
        if key not in self.blobs:
            window = file.window(f"{file.name} from byte {offset}", offset, file.size - offset)
            alone = Folder.over(self.folder.path, {"image.safetensors": window})
            contents = self.open_inner(alone.lone("image.safetensors"))
            self.blobs[key] = contents.tensors, saved_offsets(file, contents)
        tensors, all_saved = self.blobs[key]
        if name not in tensors:
            _corrupt(file, name, "is not among its tensors")
        saved = all_saved.get(name)
        if saved is not None and saved != at:
            _corrupt(
                file,
                name,
                f"is stored as the chunk at {saved}, but the index wants the one at {at}: the "
                "writer kept only one of several chunks",
            )
        stored = tensors[name]
        piece = stored.pieces[0]
        return Located(stored.shape, stored.dtype, offset + piece.offset, piece.box.strides)


def begins_item(file: File, offset: int) -> bool:
    """Whether a tensor of its own begins there, rather than an image of several."""
    return offset + 4 <= file.size and file.read(offset, 4) == LOCAL_START


def saved_offsets(file: File, contents: Contents) -> dict[str, Dims]:
    """Where in the whole tensor each tensor of a safetensors file begins, as DCP notes it."""
    text = contents.metadata.get("DCP_SHARDING_INFO")
    if text is None:
        return {}
    # JSON spells a byte of a name with up to 6 letters, and an offset with up to 20.
    names = sum(len(name.encode("utf-8", "replace")) for name in contents.tensors)
    dims = sum(len(stored.shape) for stored in contents.tensors.values())
    most = LETTERS_PER_ENTRY * (1 + len(contents.tensors)) + 6 * names + 24 * dims
    if len(text) > most:
        raise CorruptCheckpoint(
            f"{file} is damaged: its note DCP_SHARDING_INFO takes {len(text)} letters, and where "
            f"its {len(contents.tensors)} tensors begin takes {most} at most. Fetch or write it "
            "again."
        )
    try:
        noted = json.loads(text)
        return {name: _whole_numbers(entry["saved_offsets"]) for name, entry in noted.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{file} is damaged: its note DCP_SHARDING_INFO does not say where the tensors begin "
            f"({type(error).__name__}). Fetch or write it again."
        ) from error


def require_alike(file: File, name: str, found: Located, dtype: torch.dtype, sizes: Dims) -> Dims:
    """The strides of an item as a chunk of ``sizes``: dims of size 1 may be written or not.

    Raises:
        CorruptCheckpoint: item and index contradict each other.
    """
    if found.shape == sizes and found.dtype == dtype:
        return found.strides
    kept = [(n, step) for n, step in zip(found.shape, found.strides, strict=True) if n != 1]
    if found.dtype != dtype or [n for n, _ in kept] != [n for n in sizes if n != 1]:
        raise CorruptCheckpoint(
            f"{file} is damaged: its item for {name!r} is {found.dtype} {list(found.shape)}, and "
            f"the index says {dtype} {list(sizes)}. Fetch or write the checkpoint again."
        )
    steps = iter(kept)
    return tuple(1 if n == 1 else next(steps)[1] for n in sizes)


def _whole_numbers(found: Any) -> Dims:
    if type(found) is not list or not all(type(n) is int and 0 <= n < 1 << 63 for n in found):
        raise ValueError("not offsets")
    return tuple(found)


def _looks_like_header(file: File, offset: int) -> bool:
    start = file.read(offset, LENGTH_BYTES + 2)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    return start[LENGTH_BYTES:] == b'{"' and length <= file.size - offset


def _require_tensor(window: File, value: Any) -> TensorRef:
    if type(value) is TensorRef:
        return value
    if isinstance(value, Refused | Opaque):
        raise RefusedCheckpoint(
            f"{window} is refused: the tensor would be made by {value.module}.{value.name}, and "
            "nothing that a checkpoint brings along is called. Load it with the program that wrote "
            "it, and save plain tensors."
        )
    raise CorruptCheckpoint(
        f"{window} is damaged: it holds a {type(value).__name__}, and a tensor was expected. "
        "Fetch or write it again."
    )


def _corrupt(file: File, name: str, what: str) -> NoReturn:
    raise CorruptCheckpoint(
        f"{file} is damaged: the tensor {name!r} {what}. Fetch or write it again."
    )
