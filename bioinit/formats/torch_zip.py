"""What `torch.save` writes: a zip archive with one pickle, and one stored member per storage.

The pickle goes through the closed unpickler and says which tensor is which view of which storage;
the archive's directory says where the storages lie. Nothing is extracted and no tensor is made.
"""

from __future__ import annotations

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.storage import File, Folder
from bioinit.storage.zip import LOCAL_START, Member, data_start, first_name, members
from bioinit.unpickle import Found, Placing, find_weights, load

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE = "data.pkl"


def _recognizes(folder: Folder) -> bool:
    if not folder.is_file:
        return False
    file = folder.file(folder.names()[0])
    if file.name.endswith(SUFFIXES):
        return file.size >= len(LOCAL_START) and file.read(0, len(LOCAL_START)) == LOCAL_START
    if file.name.endswith(".distcp"):  # such archives one after the other: a part of something else
        return False
    name = first_name(file)
    return name is not None and name.endswith(f"/{PICKLE}")


def _open(folder: Folder, open_inner: Open) -> Contents:
    file = folder.file(folder.names()[0])
    found_members = members(file)
    root = _root(file, found_members)
    _require_little_endian(file, root, found_members)
    where = f"{file} ({root}{PICKLE})"
    found = find_weights(load(_content(file, root + PICKLE, found_members), where=where), str(file))
    placing = Placing(_storages(file, root, found_members, found), str(file))
    tensors = {}
    for kind, refs in (("weight", found.weights), ("optimizer", found.others)):
        for name, ref in refs.items():
            shape, dtype, offset, box = placing.place(name, ref)
            tensors[name] = StoredTensor(shape, dtype, (Piece(0, offset, box),), kind)
    return Contents((file,), tensors, found.metadata)


def _root(file: File, found: dict[str, Member]) -> str:
    """The folder of the archive that everything is in, with its slash."""
    pickles = [name for name in found if name.endswith(f"/{PICKLE}") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CorruptCheckpoint(
            f"{file} is a zip archive with {len(pickles)} members called {PICKLE}, and torch.save "
            "writes one. Check that it is the file that is meant."
        )
    root = pickles[0].removesuffix(PICKLE)
    if f"{root}constants.pkl" in found or any(name.startswith(f"{root}code/") for name in found):
        raise RefusedCheckpoint(
            f"{file} is a TorchScript program, which brings its own code. Load it with "
            "torch.jit.load where you trust it, and save its state_dict()."
        )
    return root


def _require_little_endian(file: File, root: str, found: dict[str, Member]) -> None:
    if f"{root}byteorder" not in found:
        return
    order = _content(file, f"{root}byteorder", found)
    if order != b"little":
        raise RefusedCheckpoint(
            f"{file} was written with the byte order {order[:20]!r}, and only 'little' is read. "
            "Load it with torch on any machine and save it again."
        )


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
