"""What torch's distributed checkpoint writes, also for Megatron-Core and NeMo 2.

A pickled index, ``.metadata``, says which chunk of which tensor lies in which ``.distcp`` file;
each chunk there is an archive of its own, as `torch.save` writes it, or all of a file are one
safetensors image. Megatron adds ``common.pt``, which holds everything that is no tensor, and last
of all ``metadata.json``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bioinit.errors import CorruptCheckpoint, UnfinishedCheckpoint
from bioinit.formats import _megatron
from bioinit.formats._items import Item, Items, begins_item, require_alike
from bioinit.formats._tiling import fault
from bioinit.formats._training import training_state
from bioinit.formats.protocol import (
    Contents,
    Format,
    Open,
    Outgoing,
    Piece,
    StoredTensor,
    WriteOptions,
)
from bioinit.formats.torch_dist.index import (
    Index,
    Indexed,
    is_index,
    read_index,
    require_untransformed,
)
from bioinit.formats.torch_dist.optimizer import Lazily
from bioinit.layout import Box
from bioinit.storage import File, Folder, Journal

SUFFIX = ".distcp"
INDEX = ".metadata"
RANK_INDEX = re.compile(r"__(\d{1,6})\.metadata")
RANK_FILE = re.compile(r".*__(\d{1,6})_\d{1,6}\.distcp")
SHOWN = 4


def _recognizes(folder: Folder) -> bool:
    if folder.is_file:
        file = folder.file(folder.names()[0])
        if file.name.endswith(SUFFIX):
            return folder.around is not None and file.size > 4 and file.read(0, 4) == b"PK\x03\x04"
        return folder.around is not None and file.name == INDEX and is_index(file)
    names = folder.names()
    if any(name.endswith(SUFFIX) for name in names):
        return True
    indices = [name for name in names if name == INDEX or RANK_INDEX.fullmatch(name)]
    if indices and is_index(folder.file(indices[0])):
        return True
    return _megatron.is_begun(folder)


def _open(folder: Folder, open_inner: Open) -> Contents:
    if folder.is_file and folder.around is not None:
        return open_inner(folder.around)  # one part stands for the whole
    index = _read_indices(folder)
    files = _files(folder, index)
    others = training_state(index.tensors, by_megatron=_megatron.wrote(folder))
    unreadable: dict[str, str] = {}
    for name, indexed in index.tensors.items():
        wrong = fault(indexed.shape, indexed.chunks)
        if wrong is not None and name not in others:
            raise CorruptCheckpoint(
                f"{folder.path}/{INDEX} is damaged: in the tensor {name!r} {wrong}. Fetch or write "
                "the checkpoint again."
            )
        if wrong is not None:
            unreadable[name] = wrong
    items = Items(folder, open_inner, _require_apart(folder, index, files, others))
    lazily = Lazily(index, items, files)
    numbers = {name: number for number, name in enumerate(files)}
    tensors: dict[str, StoredTensor] = {}
    for name, indexed in index.tensors.items():
        if name in unreadable:
            continue
        if name in others:
            tensors[name] = StoredTensor(
                indexed.shape, indexed.dtype, lazily.pieces(name, indexed, len(files)), "optimizer"
            )
        else:
            pieces = _pieces(index, name, indexed, items, files, numbers)
            tensors[name] = StoredTensor(indexed.shape, indexed.dtype, pieces)
    metadata = _describe(folder, index, files, tensors)
    if unreadable:
        metadata["unreadable"] = unreadable
    every = tuple(files.values())
    return Contents((*every, lazily.file()) if lazily.size else every, tensors, metadata)


def _read_indices(folder: Folder) -> Index:
    """The index, or the indices that ranks wrote which did not talk to each other."""
    names = folder.names()
    _megatron.require_readable(folder)
    found = [INDEX] if INDEX in names else [n for n in names if RANK_INDEX.fullmatch(n)]
    if not found:
        parts = [name for name in names if name.endswith(SUFFIX)]
        begun = [name for name in names if name.endswith(f"{INDEX}.tmp")]
        raise UnfinishedCheckpoint(
            f"{folder.path} holds {len(parts)} {SUFFIX} files, but no {INDEX}, which is written "
            f"after them{f' (only {begun[0]})' if begun else ''}: its writer was stopped, or a "
            "copy left out the hidden files. Point at a checkpoint that was finished, or copy "
            f"{INDEX} too."
        )
    index = Index()
    for name in found:
        read_index(folder.file(name), index)
    if found != [INDEX]:
        _require_all_ranks(folder, index)
    _megatron.require_finished(folder)
    return index


def _require_all_ranks(folder: Folder, index: Index) -> None:
    """Raise if a rank stored something, and the index that it wrote afterwards is not there."""
    names = folder.names()
    unnamed = _unnamed(folder, {place.path for place in index.places.values()})
    stored = {*unnamed, *(name for name in names if RANK_FILE.fullmatch(name))}
    for name in sorted(stored):
        rank = RANK_FILE.fullmatch(name)
        if rank is None or f"__{rank[1]}{INDEX}" not in names or name in unnamed:
            lacks = f"__{rank[1]}{INDEX}" if rank is not None else INDEX
            said = "does not name it" if lacks in names else "is missing"
            raise UnfinishedCheckpoint(
                f"{folder.path} holds {name}, but {lacks}, which its rank writes after it, {said}: "
                "the writer was stopped, or a part was not fetched. Fetch it, or point at a "
                "checkpoint that was finished."
            )


def _unnamed(folder: Folder, known: Container[str]) -> list[str]:
    """Files of items that no index names; empty ones are of ranks that had nothing to store."""
    return [
        name
        for name in folder.names()
        if name.endswith(SUFFIX) and name not in known and folder.file(name).size
    ]


def _files(folder: Folder, index: Index) -> dict[str, File]:
    """The files that the index names, by name."""
    wanted = sorted({place.path for place in index.places.values()})
    for path in wanted:
        folder.require_inside(path)
    here = set(folder.names())
    missing = [path for path in wanted if path not in here and not folder.has(path)]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (
            f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        )
        raise UnfinishedCheckpoint(
            f"{folder.path} lacks {len(missing)} of the {len(wanted)} files that its index names: "
            f"{shown}. Fetch them, or point at a checkpoint that was finished."
        )
    return {path: folder.file(path) for path in wanted}


def _require_apart(
    folder: Folder, index: Index, files: dict[str, File], others: set[str]
) -> set[str]:
    """Raise if items of weights overlap, or two chunks of them lie in one item.

    Only a safetensors image holds several tensors, and one chunk of each. Returns the files in
    which several items lie.
    """
    held: dict[str, dict[int, list[tuple[str, int]]]] = {}
    for (name, _), (path, offset, length, _) in index.places.items():
        if name in index.tensors and name not in others:
            held.setdefault(path, {}).setdefault(offset, []).append((name, length))
    for path, items in held.items():
        end, before = 0, ""
        for offset, inside in sorted(items.items()):
            if offset < end:
                raise CorruptCheckpoint(
                    f"{folder.path}/{INDEX} is damaged: it lets the item of {inside[0][0]!r} in "
                    f"{path} begin at byte {offset}, inside another one, that of {before!r}, which "
                    f"ends at byte {end}. Fetch or write the checkpoint again."
                )
            if len(inside) > 1:
                _require_image(folder, files[path], offset, [name for name, _ in inside])
            end, before = offset + min(length for _, length in inside), inside[0][0]
    return {path for path, items in held.items() if len(items) > 1}


def _require_image(folder: Folder, file: File, offset: int, names: list[str]) -> None:
    """Raise if no image of several tensors begins at ``offset``, where ``names`` should lie."""
    names.sort()
    twice = next((one for one, other in pairwise(names) if one == other), None)
    if twice is None and not begins_item(file, offset):
        return
    what = f"{names[0]!r} and {names[1]!r}" if twice is None else f"two chunks of {twice!r}"
    kept = "" if twice is None else ", of which a writer kept only one of several chunks"
    raise CorruptCheckpoint(
        f"{folder.path}/{INDEX} is damaged: it lets {what} lie in the same item of {file.name}, at "
        f"byte {offset}{kept}. Fetch or write the checkpoint again."
    )


def _pieces(
    index: Index,
    name: str,
    indexed: Indexed,
    items: Items,
    files: dict[str, File],
    numbers: dict[str, int],
) -> tuple[Piece, ...]:
    """Where the chunks of a tensor lie, each held against what its own item says."""
    shape, dtype, chunks = indexed
    if 0 in shape:
        return (Piece(0, 0, Box.contiguous(shape)),) if files else ()
    pieces = []
    for at, sizes in chunks:
        if 0 in sizes:
            continue
        place = index.place(name, at)
        if place is None:
            raise CorruptCheckpoint(
                f"{items.folder.path}/{INDEX} is damaged: it does not say where the chunk of "
                f"{name!r} at {at} lies. Fetch or write the checkpoint again."
            )
        path, offset, length, transforms = place
        file = files[path]
        if transforms:
            require_untransformed(place, name, file)
        found = items.locate(Item(file, offset, length), name, at)
        strides = found.strides
        if found.shape != sizes or found.dtype != dtype:
            strides = require_alike(file, name, found, dtype, sizes)
        pieces.append(Piece(numbers[path], found.offset, Box(at, sizes, 0, strides)))
    return tuple(pieces)


def _describe(
    folder: Folder, index: Index, files: dict[str, File], tensors: dict[str, StoredTensor]
) -> dict[str, Any]:
    ranks = len(_ranks(files))
    many = f"{len(files)} files" if len(files) != 1 else "1 file"
    layout = f"{many} by {ranks} rank{'s' if ranks != 1 else ''}" if ranks else many
    metadata: dict[str, Any] = {"layout": layout}
    if index.objects:
        metadata["byte_objects"] = {
            "count": len(index.objects),
            "names": _megatron.folded(index.objects),
        }
    ignored = dict.fromkeys(_unnamed(folder, files), "no index names it")
    if ignored:
        metadata["ignored"] = ignored
    torch_writer = f"torch.distributed.checkpoint {index.version or 'before 1.0.0'}"
    metadata.update(_megatron.describe(folder, torch_writer, tensors))
    return metadata


def _ranks(files: Iterable[str]) -> set[str]:
    return {found[1] for name in files if (found := RANK_FILE.fullmatch(name))}


def _write(
    folder: Path, tensors: Sequence[Outgoing], options: WriteOptions, journal: Journal
) -> None:
    # Torch's checkpoint takes half a second to import, and reading needs nothing of it.
    from bioinit.formats.torch_dist.parts import write

    write(folder, tensors, options, journal)


FORMAT = Format(
    recognizes=_recognizes,
    open=_open,
    marks=".metadata with *.distcp",
    write=_write,
    honours=("objects", "common"),
)
