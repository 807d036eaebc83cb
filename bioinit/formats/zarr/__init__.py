"""Directories of zarr arrays, version 2, as Megatron-Core wrote them until 0.15.

Every key is a folder with a header, ``.zarray``, and one file per chunk, named by its place in the
grid: ``3.0.1``. Objects that are no tensors are folders of ``shard_*.pt``, which are counted and
never read. Nothing says which keys there should be, and ``metadata.json`` is written last: its
absence beside ``common.pt`` means that the writer was stopped.

What is there is listed; the grid of an array is never walked, since a header may claim any number
of chunks. A chunk that is not stored has the fill value. ``null``, which is what Megatron wrote,
leaves open which one that is: zarr gives whatever memory holds, tensorstore gives zeros, and so do
we; an array of which more than half is missing that way is unfinished.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bioinit.errors import RefusedCheckpoint, StorageError, UnfinishedCheckpoint
from bioinit.formats._megatron import CONFIG, backend, describe, folded, require_finished
from bioinit.formats._training import training_state
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.formats.zarr.codecs import Cache, Chain, Undecodable
from bioinit.formats.zarr.header import HEADER, Header, corrupt, gaps, read_header
from bioinit.layout import Box, Dims, numel
from bioinit.storage import File, Folder, Made, filled
from bioinit.storage.file import identity

GROUP, VERSION_3 = ".zgroup", "zarr.json"
BACKEND = "zarr"
MOST_CONFIG_BYTES = 1 << 16
MOST_LOOKED_INTO = 1000
MOST_GAPS = 50_000
DEEPEST = 32
LARGEST_CHUNK = 1 << 28
MOST_GROWTH = 64
"""Whole chunks are decoded, for one element too, so beyond ``LARGEST_CHUNK`` bytes each byte of a
stored chunk may become this many. Compressed weights take half of their bytes or more, pruned ones
perhaps a tenth; what unfolds further was made to fill memory, or holds next to nothing.
"""
_NUMBER = "(0|[1-9][0-9]{0,18})"
_CHUNK = re.compile(rf"{_NUMBER}(\.{_NUMBER})*")
_INDEX = re.compile(r"-?[0-9]+([./]-?[0-9]+)*")
_OBJECT = re.compile(r"shard_[0-9.]+(_[0-9.]+)?\.pt")
_PARTIAL = re.compile(r".+\.[0-9a-f]{32}\.partial|.+\.__lock")


def _recognizes(folder: Folder) -> bool:
    if folder.is_file:
        return False
    try:
        found = backend(folder)
        if found is not None:
            return found == BACKEND
        if any(folder.has(name) for name in (HEADER, GROUP, ".zmetadata", VERSION_3)):
            return True
        return any(
            folder.has(f"{inner}/{name}")
            for inner in folder.folders()[:MOST_LOOKED_INTO]
            for name in (HEADER, VERSION_3)
        )
    except StorageError:
        return False


class _Array(NamedTuple):
    name: str
    folder: Folder


class _Tree(NamedTuple):
    """What lies in a directory: its arrays, objects by their key, and what is neither."""

    arrays: list[_Array]
    objects: dict[str, int]
    ignored: dict[str, str]


def _open(folder: Folder, open_inner: Open) -> Contents:
    backend = _require_ours(folder)
    tree = _tree(folder)
    if not tree.arrays:
        corrupt(folder.path, "it is called a checkpoint in zarr format, but holds no array")
    opened = _Opened(folder)
    others = training_state([array.name for array in tree.arrays], by_megatron=backend == BACKEND)
    for array in tree.arrays:
        opened.add(array, "optimizer" if array.name in others else "weight")
    metadata: dict[str, Any] = {}
    if backend == BACKEND:
        metadata |= describe(folder, "zarr 2", opened.tensors)
    metadata["layout"] = f"{opened.num_chunks} chunks of {len(tree.arrays)} zarr arrays"
    if tree.objects:
        count = sum(tree.objects.values())
        metadata["byte_objects"] = {"count": count, "names": folded(tree.objects)}
    if opened.missing:
        metadata["missing_chunks"] = opened.missing
    if opened.unreadable:
        metadata["unreadable"] = opened.unreadable
    if tree.ignored:
        metadata["ignored"] = tree.ignored
    return Contents(tuple(opened.files), opened.tensors, metadata)


def _require_ours(folder: Folder) -> str | None:
    """What ``metadata.json`` says of the writer, once it is clear that the rest can be read."""
    if folder.has(VERSION_3):
        _refuse_version_3(folder.file(VERSION_3))
    if folder.has(HEADER):
        raise RefusedCheckpoint(
            f"{folder.path} is a single zarr array, without a key of its own. Point at the folder "
            "around it."
        )
    if not folder.has(CONFIG):
        require_finished(folder)
        return None
    if folder.file(CONFIG).size > MOST_CONFIG_BYTES:
        corrupt(folder.file(CONFIG), f"it has more than {MOST_CONFIG_BYTES} bytes")
    found = folder.read_json(CONFIG)
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend == BACKEND:
        require_finished(folder)
    version = found.get("sharded_backend_version", 1) if isinstance(found, dict) else 1
    if backend == BACKEND and version != 1:
        raise RefusedCheckpoint(
            f"{folder.file(CONFIG)} names version {version!r:.80} of the zarr backend, and only "
            "1 is known. Load it with the Megatron-Core that wrote it, and save it again."
        )
    return backend if isinstance(backend, str) else None


def _refuse_version_3(file: File) -> None:
    raise RefusedCheckpoint(
        f"{file} is zarr format 3, and only 2 is read, which is what Megatron-Core wrote. Write "
        "the arrays again with zarr_format=2, or as safetensors."
    )


def _tree(root: Folder) -> _Tree:
    """Look into every folder of ``root``, and into those of groups."""
    found = _Tree([], {}, {})
    groups = [("", root)]
    seen = {identity(root.path)}
    while groups:
        prefix, group = groups.pop()
        inner_names = group.folders()
        known = set(inner_names)
        for name in inner_names:
            key, inner = prefix + name, group.folder(name)
            if name.endswith(".sync") and name.removesuffix(".sync") in known:
                continue  # locks of writers that shared a chunk
            if _is_group(key, inner, found):
                place = identity(inner.path)
                if key.count("/") >= DEEPEST:
                    corrupt(f"{inner.path}", f"groups are nested deeper than {DEEPEST}")
                if place is None or place not in seen:  # a link back would never end
                    seen.add(place)
                    groups.append((f"{key}/", inner))
    found.arrays.sort()
    return found


def _is_group(key: str, inner: Folder, found: _Tree) -> bool:
    """Whether arrays may lie in ``inner``; what it is instead is noted in ``found``."""
    names = inner.names()
    if inner.has(HEADER):
        found.arrays.append(_Array(key, inner))
        return False
    if inner.has(VERSION_3):
        _refuse_version_3(inner.file(VERSION_3))
    shown = [name for name in names if not name.startswith(".")]
    objects = [name for name in shown if _OBJECT.fullmatch(name)]
    if objects:
        found.objects[key] = len(objects)
        return False
    if shown and all(_CHUNK.fullmatch(name) for name in shown):
        corrupt(inner.path, f"it holds chunks ({shown[0]}), but no {HEADER}")
    if inner.has(GROUP) or (not shown and inner.folders()):
        return True
    found.ignored[f"{key}/"] = "it holds no zarr array"
    return False


class _Opened:
    """Gathers tensors and the files they lie in."""

    def __init__(self, root: Folder) -> None:
        self._root = root
        self._cache = Cache()
        self.files: list[File] = []
        self.tensors: dict[str, StoredTensor] = {}
        self.missing: dict[str, int] = {}
        self.unreadable: dict[str, str] = {}
        self.num_chunks = 0

    def add(self, array: _Array, kind: str) -> None:
        header = read_header(self._root, array.name)
        counts = header.counts
        found = sorted(_chunks(array, header, counts))
        bomb = self._unbounded(header, [path for _, path in found])
        if bomb is not None and kind == "optimizer":
            self.unreadable[array.name] = bomb
            return
        if bomb is not None:
            raise RefusedCheckpoint(
                f"{self._root.path} is refused: {bomb}, so that memory for all of them would be "
                "taken for any part. Read it with zarr where it was written, and write it again "
                f"in chunks of at most {LARGEST_CHUNK} bytes, or without a compressor."
            )
        pieces = [self._piece(header, index, path) for index, path in found]
        missing = numel(counts) - len(found)
        if missing:
            pieces += self._gaps(header, [index for index, _ in found], missing, kind)
        if not numel(counts):  # an array of no elements
            pieces = [Piece(self._number(header.file), 0, Box.contiguous(header.shape))]
        self.num_chunks += len(found)
        self.tensors[array.name] = StoredTensor(header.shape, header.dtype, tuple(pieces), kind)

    def _unbounded(self, header: Header, paths: Sequence[str]) -> str | None:
        """What is said of a stored chunk that would be decoded to far more than it has."""
        if header.codecs is None or header.chunk_bytes <= LARGEST_CHUNK:
            return None
        for path in paths:
            file = self._root.file(f"{header.name}/{path}")
            can_be = header.codecs.can_become(file.size)  # what cannot be is damaged, not too much
            if can_be and header.chunk_bytes > MOST_GROWTH * file.size:
                return (
                    f"the chunk {file.name} has {file.size} bytes and is decoded to "
                    f"{header.chunk_bytes}"
                )
        return None

    def _number(self, file: File) -> int:
        self.files.append(file)
        return len(self.files) - 1

    def _piece(self, header: Header, index: Dims, path: str) -> Piece:
        file = self._root.file(f"{header.name}/{path}")
        expected, codecs = header.chunk_bytes, header.codecs
        stored = expected if codecs is None else codecs.stored
        if stored is not None and file.size != stored:
            corrupt(file, f"it has {file.size} bytes, and a chunk of {header.file} has {stored}")
        if codecs is not None:
            if stored is None and not codecs.can_become(file.size):
                corrupt(
                    file,
                    f"its {file.size} bytes cannot hold the {expected} of a chunk of {header.file}",
                )
            file = _Decoded(file, expected, codecs, self._cache)
        return Piece(self._number(file), 0, header.box(index))

    def _gaps(
        self, header: Header, present: Sequence[Dims], missing: int, kind: str
    ) -> Iterator[Piece]:
        """Pieces of the fill value for all chunks that are not stored."""
        whole = numel(header.counts)
        if header.fill is None and 2 * missing > whole and kind == "weight":
            raise UnfinishedCheckpoint(
                f"{self._root.path} holds {whole - missing} of the {whole} chunks of "
                f"{header.name!r}, and its fill_value is null: its save never finished, or chunks "
                "were not fetched. Fetch them, or use the checkpoint before."
            )
        self.missing[header.name] = missing
        element = header.fill_bytes()
        how = f"fill value {header.fill!r:.40}" if header.fill is not None else "no chunk: zeros"
        number = self._number(filled(header.file, header.file.name, len(element), element, how))
        for count, (first, cells) in enumerate(gaps(present, header.counts)):
            if count == MOST_GAPS:
                raise UnfinishedCheckpoint(
                    f"{self._root.path} lacks chunks of {header.name!r} in more than {MOST_GAPS} "
                    "places. Fetch them, or use the checkpoint before."
                )
            yield Piece(number, 0, header.gap(first, cells))


def _chunks(array: _Array, header: Header, counts: Dims) -> Iterator[tuple[Dims, str]]:
    """Place and path of each chunk file of an array.

    Raises:
        CorruptCheckpoint: one lies outside of the grid.
        UnfinishedCheckpoint: its writer was stopped in the middle of one.
    """
    separator = header.separator
    is_nested = separator == "/" or (separator is None and _looks_nested(array.folder))
    if is_nested and len(counts) > 1:
        names = _nested(array.folder, len(counts))
    else:
        names = iter(array.folder.names())
    pattern = re.compile(("/" if is_nested else r"\.").join([_NUMBER] * (len(counts) or 1)))
    for name in names:
        found = pattern.fullmatch(name)
        if found is None:
            _require_no_chunk(array, name, header)
            continue
        index = tuple(map(int, found.groups()))
        if any(at >= count for at, count in zip(index, counts or (1,), strict=True)):
            corrupt(
                f"{array.folder.path}/{name}",
                f"it is no chunk of {header.file}, whose grid is {list(counts)}",
            )
        yield index if counts else (), name


def _require_no_chunk(array: _Array, name: str, header: Header) -> None:
    """Raise if a file that is no chunk of this array looks like one."""
    if _PARTIAL.fullmatch(name):
        raise UnfinishedCheckpoint(
            f"{array.folder.path}/{name} is a chunk whose writer was stopped. Fetch or write the "
            "checkpoint again, or use the one before."
        )
    if _INDEX.fullmatch(name):
        corrupt(
            f"{array.folder.path}/{name}",
            f"it is no chunk of {header.file}, whose grid is {list(header.counts)}",
        )


def _looks_nested(folder: Folder) -> bool:
    """Whether an array that does not say it has its chunks in folders: older writers did not."""
    if any(_CHUNK.fullmatch(name) for name in folder.names()):
        return False
    return any(_CHUNK.fullmatch(name) for name in folder.folders())


def _nested(folder: Folder, num_dims: int) -> Iterator[str]:
    """Paths of the files ``num_dims`` folders deep; shallower ones too, for the caller to judge."""
    seen = {identity(folder.path)}
    waiting = [("", folder)]
    while waiting:
        prefix, here = waiting.pop()
        yield from (prefix + name for name in here.names())
        if prefix.count("/") + 1 >= num_dims:
            continue
        for name in here.folders():
            inner = here.folder(name)
            place = identity(inner.path)
            if place is not None and place in seen:
                corrupt(inner.path, "it leads back to a folder of chunks that was seen before")
            seen.add(place)
            waiting.append((f"{prefix}{name}/", inner))


class _Decoded(Made):
    """A chunk as it is behind its codecs, decoded when the first byte is asked for."""

    __slots__ = ("_cache", "_key")

    def __init__(self, file: File, size: int, codecs: Chain, cache: Cache) -> None:
        make = functools.partial(_part, cache, file, codecs)
        how = f"zarr chunk, {codecs.text}, decoded whole"
        super().__init__(file, file.name, size, make, sources=(file,), how=how)
        self._cache = cache
        self._key = file

    def close(self) -> None:
        self._cache.drop(self._key)
        super().close()


def _part(cache: Cache, file: File, codecs: Chain, offset: int, size: int) -> memoryview:
    return cache.get(file, lambda: _decode(file, codecs))[offset : offset + size]


def _decode(file: File, codecs: Chain) -> memoryview:
    try:
        return codecs.decode(file.read(0, file.size))
    except Undecodable as error:
        corrupt(file, f"it cannot be decoded ({error})", error)


FORMAT = Format(recognizes=_recognizes, open=_open, marks="folders with .zarray")
