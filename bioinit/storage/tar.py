"""Members of a tar archive as windows of it: read in place, never extracted.

Only headers are read, 512 bytes per member. The archive may be packed with gzip; its members are
then windows of the bytes that come out, see :mod:`bioinit.storage.gzip`.

The standard library's reader is not used: a damaged header in the middle is the end of the archive
to it, what was behind it is silently gone, and headers that announce each other lead it into deep
recursion. The three ways to write a header (POSIX, its extended headers, GNU) are few lines.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NoReturn

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import gzip
from bioinit.storage.file import File

BLOCK = 512
MOST_HEADERS = 400_000  # walked in three seconds
LONGEST_NAME = 4096  # PATH_MAX of Linux
DEEPEST_NAME = 64
LONGEST_EXTENSION = 1 << 20
_ZEROS = bytes(BLOCK)
_CHECKSUM_AT = slice(148, 156)
_CHECKSUM_OF_SPACES = 8 * ord(" ")
_LINKS = (b"1", b"2")
_FILES, _FOLDER = (b"0", b"\0", b"7"), b"5"
_EXTENDED, _FOR_ALL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
    b"M": "a part of a file that another archive begins",
}
_CURE = "Get the checkpoint from a source you trust."
_DEREFERENCE = "If you trust its source, pack it again with tar --dereference --hard-dereference."

Span = tuple[int, int]
"""First byte and number of bytes of a member's data."""
Walk = Generator[Span, bytes, dict[str, Span]]
"""Yields which bytes it needs next, always further on, and is sent them, or fewer at the end."""


def members(file: File) -> dict[str, File]:
    """The files in the archive ``file`` by name, without a leading ``./``, each as a window.

    Raises:
        CorruptCheckpoint: a header is damaged, a member reaches beyond the archive, or two members
            have one name.
        RefusedCheckpoint: a member is a link or a device, or its name leads out of the archive.
    """
    whole, spans = _walked(file)
    if whole.size % BLOCK:
        _corrupt(
            str(file),
            f"it has {whole.size} bytes, but an archive consists of blocks of {BLOCK}: it is "
            "truncated, or something was appended",
        )
    for name, (start, size) in spans.items():
        if start + size > whole.size:
            _corrupt(
                str(file),
                f"its member {_shown(name)} should end at byte {start + size}, but the archive has "
                f"{whole.size}: it is truncated",
            )
    return {name: whole.window(name, start, size) for name, (start, size) in spans.items()}


def first_name(block: bytes) -> str | None:
    """The name that the first ``block`` of an archive gives; None if it is no header of a tar."""
    if len(block) != BLOCK or not _is_header(block):
        return None
    return _raw_name(block).decode("utf-8", "backslashreplace")


def _walked(file: File) -> tuple[File, dict[str, Span]]:
    walk = _walk(str(file))
    if file.size >= len(gzip.MAGIC) and file.read(0, len(gzip.MAGIC)) == gzip.MAGIC:
        return gzip.unpacked(file, file.name, walk)
    try:
        offset, size = next(walk)
        while True:
            held = max(0, min(size, file.size - offset))
            offset, size = walk.send(file.read(offset, held) if held else b"")
    except StopIteration as done:
        return file, done.value


class _Names:
    """Names of members seen so far, and of the folders that they imply."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.files: dict[str, Span] = {}
        self.folders: set[str] = set()

    def add_file(self, name: str, span: Span) -> None:
        if name in self.files:
            _corrupt(self.where, f"it has two members called {_shown(name)}")
        if name in self.folders:
            self._raise_both(name)
        self.files[name] = span
        self.add_folder(name.rpartition("/")[0])

    def add_folder(self, name: str) -> None:
        while name and name not in self.folders:
            if name in self.files:
                self._raise_both(name)
            self.folders.add(name)
            name = name.rpartition("/")[0]

    def _raise_both(self, name: str) -> NoReturn:
        _corrupt(self.where, f"{_shown(name)} is both a file and a folder in it")


def _walk(where: str) -> Walk:
    """Walk over the headers; what was read of the archive named ``where`` is sent in."""
    names = _Names(where)
    position, name, size = 0, None, None
    for _ in range(MOST_HEADERS):
        header = yield position, BLOCK
        if not header or header == _ZEROS:
            break
        if len(header) < BLOCK:
            _corrupt(where, f"it ends inside the header at byte {position}: it is truncated")
        if not _is_header(header):
            if not position:
                _corrupt(where, "it does not begin like a tar archive")
            _corrupt(where, f"the checksum of the header at byte {position} is wrong")
        kind, start = header[156:157], position + BLOCK
        if kind in (_EXTENDED, _FOR_ALL, _GNU_NAME, _GNU_LINK):
            held = _number(where, header, position)
            if held > LONGEST_EXTENSION:
                _corrupt(where, f"the header at byte {position} is extended by {held} bytes")
            if kind != _GNU_LINK:
                data = yield start, held
                if len(data) < held:
                    _corrupt(where, f"it ends inside the header at byte {position}")
                name, size = _extended(where, position, kind, data, name, size)
            position = start + _padded(held)
            continue
        raw = _raw_name(header) if name is None else name
        _require_plain(where, kind, raw)
        length = _number(where, header, position) if size is None else size
        inside = _inside(where, raw)
        if kind == _FOLDER or raw.endswith(b"/"):
            if length:
                _corrupt(where, f"its folder {_shown(inside)} has {length} bytes")
            names.add_folder(inside)
        elif inside:
            names.add_file(inside, (start, length))
        else:
            _corrupt(where, f"the member at byte {position} has no name")
        position, name, size = start + _padded(length), None, None
    else:
        raise RefusedCheckpoint(
            f"{where} has more than {MOST_HEADERS} headers, more than any checkpoint. " + _CURE
        )
    if name is not None or size is not None:
        _corrupt(where, f"it ends at byte {position}, where a member should follow")
    if not names.files:
        _corrupt(where, "there is no file in it")
    return names.files


def _require_plain(where: str, kind: bytes, raw: bytes) -> None:
    """Refuse a member that is no file and no folder."""
    if kind in _FILES or kind == _FOLDER:
        return
    name = _shown(raw.decode("utf-8", "backslashreplace"))
    what = _REFUSED.get(kind, f"a kind of member that nobody knows ({kind!r})")
    cure = _DEREFERENCE if kind in _LINKS else _CURE
    raise RefusedCheckpoint(
        f"{where} holds {what}, {name}, and only files and folders are read from an archive. {cure}"
    )


def _is_header(block: bytes) -> bool:
    """Whether the checksum that ``block`` carries is its own."""
    field = block[_CHECKSUM_AT]
    try:
        said = int(field.strip(b" \0"), 8)
    except ValueError:
        return False
    # Most bytes are zeros: leaving them out first halves the time of a sum over all.
    return sum(block.translate(None, b"\0")) - sum(field) + _CHECKSUM_OF_SPACES == said


def _raw_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU keeps other things there
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _number(where: str, header: bytes, position: int) -> int:
    """The size that a header gives: octal digits, or, beyond 8 GiB, eleven bytes after a mark."""
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.isdigit():  # a sign or an underscore, which int() would take, is no digit
        try:
            return int(digits, 8)
        except ValueError:
            pass
    if not digits:
        return 0
    _corrupt(where, f"the header at byte {position} gives the size {field!r}, which is none")


def _extended(
    where: str, position: int, kind: bytes, data: bytes, name: bytes | None, size: int | None
) -> tuple[bytes | None, int | None]:
    """Name and size of the next member, where its headers so far say them."""
    if kind == _GNU_NAME:
        said: dict[bytes, bytes] = {b"path": data.partition(b"\0")[0]}
    else:
        said = _records(where, position, data)
    if any(key.startswith(b"GNU.sparse.") for key in said):
        raise RefusedCheckpoint(
            f"{where} holds a sparse file, announced at byte {position}, whose bytes are not in "
            "one piece. Unpack it and pack it again without --sparse."
        )
    new_name, new_size = said.get(b"path"), said.get(b"size")
    if kind == _FOR_ALL and (new_name is not None or new_size is not None):
        _corrupt(where, f"the header at byte {position} gives all members one name or size")
    if (new_name is not None and name is not None) or (new_size is not None and size is not None):
        _corrupt(where, f"the header at byte {position} says again what one before it says")
    if new_size is None:
        return new_name if name is None else name, size
    if not new_size.isdigit() or len(new_size) > 20:
        _corrupt(where, f"the header at byte {position} gives the size {new_size[:40]!r}")
    return new_name if name is None else name, int(new_size)


def _records(where: str, position: int, data: bytes) -> dict[bytes, bytes]:
    """What an extended header says: records of a length, a blank, a key, ``=``, a value."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        blank = data.find(b" ", at, at + 21)
        digits = data[at:blank] if blank > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        if not blank < end <= len(data) or data[end - 1 : end] != b"\n":
            _corrupt(where, f"the extended header at byte {position} is no list of records")
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not equals:
            _corrupt(where, f"the extended header at byte {position} has a record without a value")
        found[key] = value
        at = end
    return found


def _inside(where: str, raw: bytes) -> str:
    """The name of a member as a plain relative one; empty for the archive's own root."""
    name = raw.decode("utf-8", "backslashreplace")
    if len(raw) > LONGEST_NAME or "\0" in name:
        _corrupt(where, f"the name {_shown(name)} of a member is too long, or none")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise RefusedCheckpoint(
            f"{where} holds a member {_shown(name)}, whose name leads out of the archive. " + _CURE
        )
    if len(parts) > DEEPEST_NAME:
        _corrupt(where, f"its member {_shown(name)} lies in {len(parts) - 1} folders")
    return "/".join(parts)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}..."


def _corrupt(where: str, what: str) -> NoReturn:
    raise CorruptCheckpoint(f"{where} is damaged: {what}. Fetch or write it again.")
