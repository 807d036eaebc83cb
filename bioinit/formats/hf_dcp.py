"""What torch's distributed checkpoint writes for the hub: safetensors files, one per rank and part.

Each file holds the piece of each tensor that its rank had; a note in its header says where in the
whole tensor every piece begins. No index says how large a tensor is: it is as large as its pieces
reach. Where the writer also merged the pieces, into ordinary files beside the folder ``sharded``,
those are read and this format is not asked.
"""

from __future__ import annotations

import re

from bioinit.errors import CorruptCheckpoint, UnfinishedCheckpoint
from bioinit.formats._items import saved_offsets
from bioinit.formats._tiling import fault
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.layout import Dims
from bioinit.storage import File, Folder

PART = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")
INSIDE = ("sharded", "model")
"""Where torch puts them if it is to merge them too, and where NeMo Automodel does."""

CONFIGS = ("consolidated", ".hf_metadata")
"""Where NeMo Automodel leaves the config, inside the folder of the parts."""

MOST = 1 << 63


def _recognizes(folder: Folder) -> bool:
    return not folder.is_file and _parts_in(folder) is not None


def _parts_in(folder: Folder) -> Folder | None:
    """``folder`` if it holds such files, or the one inside it if nothing merged them beside it."""
    if any(PART.fullmatch(name) for name in folder.names()):
        return folder
    if any(name.endswith(".safetensors") for name in folder.names()):
        return None
    for name in INSIDE:
        if name in folder.folders():
            inner = folder.folder(name)
            if any(PART.fullmatch(found) for found in inner.names()):
                return inner
    return None


def _open(folder: Folder, open_inner: Open) -> Contents:
    inner = _parts_in(folder) or folder
    names = [name for name in inner.names() if PART.fullmatch(name)]
    _require_one_set(inner, names)
    files: list[File] = []
    pieces: dict[str, list[tuple[File, StoredTensor, Piece]]] = {}
    version = None
    for name in names:
        found = open_inner(inner.lone(name))
        (file,) = found.files
        saved = saved_offsets(file, found.metadata)
        version = found.metadata.get("DCP_VERSION", version)
        number = len(files)
        for key, stored in found.tensors.items():
            piece = _moved(file, key, stored, saved, number)
            pieces.setdefault(key, []).append((file, stored, piece))
        files.append(file)
    tensors = {key: _merged(inner, key, held) for key, held in pieces.items()}
    ranks = {match[1] for name in names if (match := PART.fullmatch(name))}
    metadata = {
        "writer": f"torch.distributed.checkpoint, for the hub {version or ''}".rstrip(),
        "layout": f"{len(names)} files by {len(ranks)} ranks",
    }
    configs = [inner.folder(name) for name in CONFIGS if name in inner.folders()]
    return Contents(tuple(files), tensors, metadata, homes=(inner, *configs))


def _require_one_set(folder: Folder, names: list[str]) -> None:
    totals = {match[3] for name in names if (match := PART.fullmatch(name))}
    if len(totals) > 1:
        raise CorruptCheckpoint(
            f"{folder.path} holds parts of several checkpoints: {names[0]} says that there are "
            f"{min(totals)} parts per rank, and another file says {max(totals)}. Remove those that "
            "are not meant."
        )
    here = {int(match[2]) for name in names if (match := PART.fullmatch(name))}
    total = int(totals.pop())
    missing = next((n for n in range(1, min(total, len(here) + 1) + 1) if n not in here), None)
    if missing is not None:
        raise UnfinishedCheckpoint(
            f"{folder.path} holds {len(here)} of the {total} parts that {names[0]} is one of: "
            f"shard-*-model-{missing:05d}-of-{total:05d}.safetensors is missing. Fetch it, or "
            "point at a checkpoint that was finished."
        )


def _moved(
    file: File, key: str, stored: StoredTensor, saved: dict[str, Dims], number: int
) -> Piece:
    """The piece of a tensor that ``file`` holds, at its place in the whole tensor."""
    at = saved.get(key)
    if at is None or len(at) != len(stored.shape):
        raise CorruptCheckpoint(
            f"{file} is damaged: its note DCP_SHARDING_INFO does not say where in the whole tensor "
            f"its piece of {key!r}, {list(stored.shape)}, begins. Fetch or write it again."
        )
    ((_, offset, box),) = stored.pieces
    return Piece(number, offset, box._replace(offsets=at))


def _merged(folder: Folder, key: str, held: list[tuple[File, StoredTensor, Piece]]) -> StoredTensor:
    first_file, first, _ = held[0]
    for file, stored, _ in held:
        if stored.dtype != first.dtype or len(stored.shape) != len(first.shape):
            raise CorruptCheckpoint(
                f"{folder.path} is damaged: {first_file.name} holds {first.dtype} "
                f"{list(first.shape)} of the tensor {key!r}, and {file.name} holds {stored.dtype} "
                f"{list(stored.shape)}. Fetch or write both again."
            )
    pieces = tuple(piece for _, _, piece in held)
    spans = [(piece.box.offsets, piece.box.sizes) for piece in pieces]
    dims = range(len(first.shape))
    shape = tuple(max(p.box.offsets[d] + p.box.sizes[d] for p in pieces) for d in dims)
    if any(size >= MOST for size in shape):
        raise CorruptCheckpoint(
            f"{folder.path} is damaged: its pieces of the tensor {key!r} reach to {shape}. Fetch "
            "or write it again."
        )
    wrong = fault(shape, spans)
    if wrong is not None:
        raise CorruptCheckpoint(
            f"{folder.path} is damaged or incomplete: in the tensor {key!r} {wrong}. Fetch the "
            "files that are missing, or write the checkpoint again."
        )
    kept = tuple(piece for piece in pieces if 0 not in piece.box.sizes)
    return StoredTensor(shape, first.dtype, kept or pieces[:1])


FORMAT = Format(recognizes=_recognizes, open=_open, marks="shard-*-model-*.safetensors")
