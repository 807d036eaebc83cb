"""Members of a zip archive as ranges of its bytes: read in place, never extracted.

Only the directory at the end is read, and for each member that is asked for the thirty bytes before
its data. The standard library's reader would cost ten times as much per member.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, NoReturn

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage.file import File

LOCAL_START = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LONGEST_COMMENT = 0xFFFF
_SEE_EXTRA_32 = 0xFFFFFFFF
_SEE_EXTRA_16 = 0xFFFF
_ZIP64_EXTRA = 1
_ENCRYPTED = 1


class Member(NamedTuple):
    """A member of an archive: where its header is, and how many bytes it has."""

    header: int
    size: int
    is_plain: bool
    """Neither compressed nor encrypted: its bytes in the archive are its bytes."""
    end: int
    """Where the next member, or the directory, begins."""


def members(file: File) -> dict[str, Member]:
    """The members of the archive ``file`` by name.

    Raises:
        CorruptCheckpoint: its directory is missing or contradicts itself, or members overlap.
    """
    count, begin, size = _directory(file)
    if begin + size > file.size:
        _corrupt(file, f"its directory should end at byte {begin + size} of {file.size}")
    data = file.read(begin, size)
    found: dict[str, tuple[int, int, bool]] = {}
    ends: list[tuple[int, int]] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > size:
            _corrupt(file, f"its directory has {len(found)} of {count} members")
        entry = _ENTRY.unpack_from(data, position)
        start, flags, method, packed, unpacked = entry[0], entry[3], entry[4], entry[8], entry[9]
        name_size, extra_size, comment_size, header = entry[10], entry[11], entry[12], entry[16]
        if start != b"PK\x01\x02":
            _corrupt(file, f"member {len(found)} of its directory is no directory entry")
        position += _ENTRY.size
        name = data[position : position + name_size].decode("utf-8", "surrogateescape")
        position += name_size
        if _SEE_EXTRA_32 in (packed, unpacked, header):
            extra = data[position : position + extra_size]
            unpacked, packed, header = _large(file, name, extra, unpacked, packed, header)
        position += extra_size + comment_size
        is_plain = method == 0 and not flags & _ENCRYPTED and packed == unpacked
        if name in found:
            _corrupt(file, f"it has two members called {name!r}")
        found[name] = (header, unpacked, is_plain)
        ends.append((header, header + _LOCAL.size + name_size + packed))
    return _apart(file, found, ends, begin)


def _apart(
    file: File, found: dict[str, tuple[int, int, bool]], ends: list[tuple[int, int]], begin: int
) -> dict[str, Member]:
    """The members, none of which begins before the one before it has ended."""
    ends.sort()
    follows: dict[int, int] = {}
    for (header, end), (following, _) in zip(ends, [*ends[1:], (begin, 0)], strict=True):
        if end > following:
            names = {member[0]: name for name, member in found.items()}
            after = names.get(following)
            _corrupt(
                file,
                f"its member {names[header]} at byte {header} ends at byte {end} at the earliest, "
                f"and {f'member {after}' if after else 'the directory'} begins at byte {following}",
            )
        follows[header] = following
    return {name: Member(*member, follows[member[0]]) for name, member in found.items()}


def data_start(file: File, name: str, member: Member) -> int:
    """The byte of ``file`` at which the data of ``member`` begins.

    Raises:
        CorruptCheckpoint: another member or none is there, or it reaches beyond its end.
        RefusedCheckpoint: its bytes are compressed or encrypted.
    """
    if not member.is_plain:
        raise RefusedCheckpoint(
            f"{file} holds {name} compressed or encrypted, so its bytes cannot be read in place. "
            "Unpack it and write it again with torch.save, or as safetensors."
        )
    spelled = name.encode("utf-8", "surrogateescape")
    header = file.read(member.header, _LOCAL.size + len(spelled))
    fields = _LOCAL.unpack_from(header)
    if fields[0] != LOCAL_START:
        _corrupt(file, f"its member {name} does not begin at byte {member.header}")
    if fields[9] != len(spelled) or not header.endswith(spelled):
        _corrupt(
            file, f"its directory says {name} begins at byte {member.header}, and another does"
        )
    start: int = member.header + _LOCAL.size + fields[9] + fields[10]
    if start + member.size > member.end:
        _corrupt(
            file, f"its member {name} ends at byte {start + member.size} instead of {member.end}"
        )
    return start


def first_name(file: File) -> str | None:
    """The name of the first member, from the first bytes alone; None if this is no archive."""
    if file.size < _LOCAL.size:
        return None
    fields = _LOCAL.unpack(file.read(0, _LOCAL.size))
    if fields[0] != LOCAL_START or _LOCAL.size + fields[9] > file.size:
        return None
    return file.read(_LOCAL.size, fields[9]).decode("utf-8", "replace")


def _directory(file: File) -> tuple[int, int, int]:
    """How many members there are, the byte at which the directory begins, and its size."""
    tail_begin = max(0, file.size - _END.size - _LONGEST_COMMENT)
    tail = file.read(tail_begin, file.size - tail_begin)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        _corrupt(file, "it has no directory at its end: it is truncated")
    _, _, _, _, count, size, begin, _ = _END.unpack_from(tail, at)
    ends = tail_begin + at
    locator_at = ends - _LOCATOR_64.size
    locator = file.read(locator_at, _LOCATOR_64.size) if locator_at >= 0 else b""
    if locator.startswith(b"PK\x06\x07"):
        ends = _LOCATOR_64.unpack(locator)[2]
        if ends + _END_64.size > locator_at:
            _corrupt(file, "the second part of its directory is missing")
        fields = _END_64.unpack(file.read(ends, _END_64.size))
        if fields[0] != b"PK\x06\x06":
            _corrupt(file, "the second part of its directory is missing")
        count, size, begin = fields[7], fields[8], fields[9]
    elif count == _SEE_EXTRA_16 or _SEE_EXTRA_32 in (size, begin):
        _corrupt(file, "the second part of its directory is missing")
    # Other readers go back from the end; two archives in a row would be two things to two readers.
    if begin + size != ends:
        _corrupt(file, f"its directory should end at byte {begin + size}, and its end is at {ends}")
    return count, begin, size


def _large(
    file: File, name: str, extra: bytes, unpacked: int, packed: int, header: int
) -> tuple[int, int, int]:
    """Sizes and place of a member beyond 4 GiB, which stand in an extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == _ZIP64_EXTRA:
            held = extra[position + 4 : position + 4 + length]
            numbers = iter(struct.unpack(f"<{len(held) // 8}Q", held[: len(held) // 8 * 8]))
            given = (unpacked, packed, header)
            found = [next(numbers, None) if n == _SEE_EXTRA_32 else n for n in given]
            if None not in found:
                return found[0] or 0, found[1] or 0, found[2] or 0
        position += 4 + length
    _corrupt(file, f"the size of its member {name} is missing")


def _corrupt(file: File, what: str) -> NoReturn:
    raise CorruptCheckpoint(f"{file} is damaged: {what}. Fetch or write it again.")
