"""What torch's distributed checkpoint writes for the hub: safetensors files, one per rank and part.

Each file holds the piece of each tensor that its rank had; a note in its header says where in the
whole tensor every piece begins. No index says how large a tensor is: it is as large as its pieces
reach, so files that are missing of the last ranks leave no trace, except in an index of the merged
files where one was kept. Where the writer also merged the pieces, into ordinary files beside the
folder ``sharded``, those are read and this format is not asked.
"""

from __future__ import annotations

import re

from bioinit.errors import CorruptCheckpoint, UnfinishedCheckpoint
from bioinit.formats._items import saved_offsets
from bioinit.formats._tiling import fault
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.layout import Dims, numel
from bioinit.storage import File, Folder

PART = re.compile(r"shard-(\d+)-model-(\d+)-of-(\d+)\.safetensors")
INSIDE = "sharded"
"""Where torch puts them if it is to merge them too."""

CONFIGS = ("consolidated", ".hf_metadata")
"""Where NeMo Automodel leaves the config, inside the folder of the parts."""

INDEX = "model.safetensors.index.json"
"""What is written with merged files, and sometimes kept where they were not."""

MOST = 1 << 63


def _recognizes(folder: Folder) -> bool:
    return not folder.is_file and _parts_in(folder) is not None


def _parts_in(folder: Folder) -> Folder | None:
    """``folder`` if it holds such files, or the one inside it if nothing merged them beside it."""
    if any(PART.fullmatch(name) for name in folder.names()):
        return folder
    if any(name.endswith(".safetensors") for name in folder.names()):
        return None
    if INSIDE in folder.folders():
        inner = folder.folder(INSIDE)
        if any(PART.fullmatch(name) for name in inner.names()):
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
        saved = saved_offsets(file, found)
        version = found.metadata.get("DCP_VERSION", version)
        number = len(files)
        for key, stored in found.tensors.items():
            piece = _moved(file, key, stored, saved, number)
            pieces.setdefault(key, []).append((file, stored, piece))
        files.append(file)
    tensors = {key: _merged(inner, key, held) for key, held in pieces.items()}
    configs = [inner.folder(name) for name in CONFIGS if name in inner.folders()]
    is_whole = _is_whole(inner, (folder, *configs), tensors)
    ranks = sorted({int(match[1]) for name in names if (match := PART.fullmatch(name))})
    many = f"{len(ranks)} ranks" if len(ranks) > 1 else "1 rank"
    metadata = {
        "writer": f"torch.distributed.checkpoint, for the hub {version or ''}".rstrip(),
        "layout": f"{len(names)} {'files' if len(names) > 1 else 'file'} by {many}",
    }
    if not is_whole:
        _require_in_a_row(inner, ranks)
        metadata["layout"] += ", and the files do not say how many there were"
    if not is_whole and len(ranks) > 1:
        metadata["doubt"] = (
            f"nothing in these files says how many ranks wrote them, and those of {len(ranks)} are "
            "there: if later ones are missing, tensors are shorter than they were"
        )
    return Contents(tuple(files), tensors, metadata, homes=(inner, *configs))


def _is_whole(inner: Folder, others: tuple[Folder, ...], tensors: dict[str, StoredTensor]) -> bool:
    """Whether an index of the merged files counts just the bytes that are here.

    Raises:
        UnfinishedCheckpoint: it counts more, or lists other tensors too.
    """
    home = next((home for home in (inner, *others) if home.has(INDEX)), None)
    found = None if home is None else home.read_json(INDEX)
    if home is None or not isinstance(found, dict):
        return False
    listed, said = found.get("weight_map"), found.get("metadata")
    total = said.get("total_size") if isinstance(said, dict) else None
    here = sum(numel(stored.shape) * stored.dtype.itemsize for stored in tensors.values())
    lacking = [name for name in listed if name not in tensors] if isinstance(listed, dict) else []
    if lacking or (type(total) is int and here < total):
        what = f"lists {lacking[0]!r:.200}" if lacking else f"counts {total} bytes of tensors"
        held = "no such tensor is in the files" if lacking else f"the files hold {here}"
        raise UnfinishedCheckpoint(
            f"{home.file(INDEX)} {what}, and {held}: of shard-*-model-*.safetensors "
            f"in {inner.path} those of some ranks are missing. Fetch them, or remove the index if "
            "it belongs to another checkpoint."
        )
    return type(total) is int and here == total


def _require_in_a_row(folder: Folder, ranks: list[int]) -> None:
    """Raise if files of a rank are missing between, or before, those of others."""
    low = min(1, ranks[0])  # torch counts from 1
    missing = next((low + at for at, rank in enumerate(ranks) if rank != low + at), None)
    if missing is not None:
        raise UnfinishedCheckpoint(
            f"{folder.path} holds shard-{ranks[-1]:05d}-model-*.safetensors of one rank, but "
            f"shard-{missing:05d}-model-*.safetensors of an earlier one is missing. Fetch it, or "
            "point at a checkpoint that was finished."
        )


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
