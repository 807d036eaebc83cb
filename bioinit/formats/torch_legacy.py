"""What `torch.save` wrote before version 1.6: pickles in a row, then one storage after the other.

Five pickles come first: a magic number, the version of the protocol, facts about the machine, the
object itself, and the keys of its storages. Then, for each key, a count of elements in eight bytes
and the elements. The older layout still, a tar archive, is recognized and refused.
"""

from __future__ import annotations

from typing import Any

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats.protocol import Contents, Format, Open, Piece, StoredTensor
from bioinit.storage import File, Folder
from bioinit.unpickle import Placing, StorageRef, Truncated, find_weights, load_next
from bioinit.unpickle.symbols import storage_key, storage_ref

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
COUNT_BYTES = 8
FIRST_READ = 64 * 1024
READ_GROWTH = 4
_MAGIC_SPELLINGS = (MAGIC.to_bytes(10, "little"), f"L{MAGIC}L".encode())
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_TAR_MEMBERS = ("sys_info", "pickle", "storages", "tensors")


def _recognizes(folder: Folder) -> bool:
    if not folder.is_file:
        return False
    file = folder.file(folder.names()[0])
    start = file.read(0, min(file.size, 32))
    return any(spelling in start for spelling in _MAGIC_SPELLINGS) or _is_tar(file)


def _is_tar(file: File) -> bool:
    """Whether this is the tar layout of torch before 0.1.10, by its first member."""
    end = _TAR_MAGIC_AT + len(_TAR_MAGIC)
    if file.size < end:
        return False
    start = file.read(0, end)
    name = start[:100].rstrip(b"\0").decode("utf-8", "replace")
    return start.endswith(_TAR_MAGIC) and name.removeprefix("./") in _TAR_MEMBERS


def _open(folder: Folder, open_inner: Open) -> Contents:
    file = folder.file(folder.names()[0])
    if _is_tar(file):
        raise RefusedCheckpoint(
            f"{file} is a tar archive of torch 0.1, which is not read. Load it with torch.load and "
            "save it again, best as safetensors."
        )
    value, keys, refs, end = _pickles(file)
    found = find_weights(value, str(file))
    placing = Placing(_storages(file, keys, refs, end), str(file))
    tensors = {}
    for kind, by_name in (("weight", found.weights), ("optimizer", found.others)):
        for name, ref in by_name.items():
            shape, dtype, offset, box = placing.place(name, ref)
            tensors[name] = StoredTensor(shape, dtype, (Piece(0, offset, box),), kind)
    return Contents((file,), tensors, found.metadata)


def _pickles(file: File) -> tuple[Any, list[str], dict[str, StorageRef], int]:
    """The object, the keys of the storages in order, what it says of each, and the end of it all.

    How long the pickles are stands nowhere, so the file is read from its start in growing steps.
    """
    size = min(file.size, FIRST_READ)
    while True:
        try:
            return _parse(file, file.read(0, size))
        except Truncated:
            if size == file.size:
                raise
            size = min(file.size, size * READ_GROWTH)


def _parse(file: File, data: bytes) -> tuple[Any, list[str], dict[str, StorageRef], int]:
    refs: dict[str, StorageRef] = {}

    def remember(pid: Any) -> Any:
        ref = storage_ref(pid)
        if isinstance(ref, StorageRef):
            refs.setdefault(ref.key, ref)
        return ref

    def following(start: int, part: str) -> tuple[Any, int]:
        return load_next(data, start, where=f"{file} ({part})", persistent_load=remember)

    magic, end = following(0, "magic number")
    protocol, end = following(end, "protocol version")
    if magic != MAGIC or protocol != PROTOCOL:
        raise CorruptCheckpoint(
            f"{file} is damaged: it does not begin with the number {MAGIC} and the protocol "
            f"{PROTOCOL}. Fetch or write it again."
        )
    system, end = following(end, "facts about the machine")
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise RefusedCheckpoint(
            f"{file} was written with the highest byte first, and only the lowest first is read. "
            "Load it with torch on any machine and save it again."
        )
    value, end = following(end, "the object")
    keys, end = following(end, "keys of the storages")
    if not isinstance(keys, list):
        raise CorruptCheckpoint(
            f"{file} is damaged: the keys of its storages are a {type(keys).__name__}. Fetch or "
            "write it again."
        )
    try:
        return value, [storage_key(key) for key in keys], refs, end
    except ValueError as error:
        raise CorruptCheckpoint(f"{file} is damaged: {error}. Fetch or write it again.") from error


def _storages(
    file: File, keys: list[str], refs: dict[str, StorageRef], position: int
) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of each storage; they follow each other from ``position``."""
    storages: dict[str, tuple[int, int]] = {}
    for key in keys:
        ref = refs.get(key)
        if ref is None:
            raise CorruptCheckpoint(
                f"{file} is damaged: no tensor says what its storage {key!r} holds. Fetch or write "
                "it again."
            )
        numel = int.from_bytes(file.read(position, COUNT_BYTES), "little", signed=True)
        if numel != ref.numel:
            raise CorruptCheckpoint(
                f"{file} is damaged: its storage {key!r} has {numel} elements, and the pickle says "
                f"{ref.numel}. Fetch or write it again."
            )
        position += COUNT_BYTES
        size = numel * ref.dtype.itemsize
        if position + size > file.size:
            raise CorruptCheckpoint(
                f"{file} has {file.size} bytes, but its storage {key!r} should end at byte "
                f"{position + size}: it is truncated. Fetch or write it again."
            )
        storages[key] = (position, size)
        position += size
    return storages


FORMAT = Format(recognizes=_recognizes, open=_open, marks="the same, of torch before 1.6")
