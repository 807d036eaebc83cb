"""What `torch.save` writes: a zip archive with one pickle, and one stored member per storage.

The pickle goes through the closed unpickler and says which tensor is which view of which storage;
the archive's directory says where the storages lie. Nothing is extracted and no tensor is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bioinit.errors import CorruptCheckpoint
from bioinit.formats import _archive
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.storage import File, Folder
from bioinit.storage.zip import LOCAL_START, Member, data_start, first_name, members
from bioinit.unpickle import Found, Placing, find_weights, load

_LIGHTNING = "pytorch-lightning_version"
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def _recognizes(folder: Folder) -> bool:
    if not folder.is_file:
        return False
    file = folder.file(folder.names()[0])
    if file.name.endswith(SUFFIXES):
        return file.size >= len(LOCAL_START) and file.read(0, len(LOCAL_START)) == LOCAL_START
    if file.name.endswith(".distcp"):  # such archives one after the other: a part of something else
        return False
    name = first_name(file)
    return name is not None and name.endswith(f"/{_archive.PICKLE}")


def _open(folder: Folder, open_inner: Open) -> Contents:
    file = folder.file(folder.names()[0])
    found_members = members(file)
    root = _archive.root(file, found_members)
    pickle = f"{root}{_archive.PICKLE}"
    value = load(_content(file, pickle, found_members), where=f"{file} ({pickle})")
    found = find_weights(value, str(file))
    placing = Placing(_storages(file, root, found_members, found), str(file))
    tensors = {}
    for kind, refs in (("weight", found.weights), ("optimizer", found.others)):
        for name, ref in refs.items():
            shape, dtype, offset, box = placing.place(name, ref)
            tensors[name] = StoredTensor(shape, dtype, (Piece(0, offset, box),), kind)
    return Contents((file,), tensors, {**_writer(found.metadata), **found.metadata})


def _writer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Who wrote it and at which step, if that is among the objects beside the tensors."""
    objects = metadata.get("objects")
    version = objects.get(_LIGHTNING) if isinstance(objects, dict) else None
    if not isinstance(objects, dict) or not isinstance(version, str):
        return {}
    step = objects.get("global_step")
    said: dict[str, Any] = {"writer": f"Lightning {version}"}
    return {**said, "iteration": step} if type(step) is int else said


def _content(file: File, name: str, found: dict[str, Member]) -> bytes:
    member = found[name]
    return file.read(data_start(file, name, member), member.size)


def _storages(
    file: File, root: str, members_by_name: dict[str, Member], found: Found
) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of every storage that a tensor lies in."""
    storages: dict[str, tuple[int, int]] = {}
    for refs in (found.weights, found.others):
        for ref in refs.values():
            key, dtype, numel, _ = ref.storage
            if key in storages:
                continue
            name = f"{root}data/{key}"
            member = members_by_name.get(name)
            if member is None:
                continue  # the tensor that needs it says so, by its own name
            if member.size < numel * dtype.itemsize:
                raise CorruptCheckpoint(
                    f"{file} is damaged: its member {name} has {member.size} bytes, and the pickle "
                    f"says {numel} elements of {dtype}. Fetch or write it again."
                )
            storages[key] = (data_start(file, name, member), member.size)
    return storages


FORMAT = Format(
    recognizes=_recognizes,
    open=_open,
    marks="*.bin, *.pt, *.pth or *.ckpt of torch.save",
)
