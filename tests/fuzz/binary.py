"""Hostile changes to bytes, pickles, and the archives that hold them."""

from __future__ import annotations

import gzip
import io
import pickletools
import re
import struct
import zipfile
import zlib
from functools import lru_cache
from typing import NamedTuple

from tests.fuzz.choices import Choices
from tests.fuzz.trees import TEXTS, spoil_json

LARGE = 1 << 17
WIDE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def spoil_bytes(data: bytes, choices: Choices) -> bytes:
    """Bits turned, numbers blown up, stretches cut out, doubled or exchanged."""
    found = bytearray(data)
    at = choices.below(len(found)) if choices.byte() % 2 == 0 else 0
    if choices.byte() % 3 == 1:
        at = max(0, len(found) - 1 - choices.below(100))
    action = choices.below(7)
    if action == 0 and found:
        found[at] ^= 1 << choices.below(8)
    elif action == 1:
        size = choices.pick((4, 8, 2, 1))
        number = choices.pick(WIDE) & (1 << 8 * size) - 1
        found[at : at + size] = number.to_bytes(size, choices.pick(("little", "big")))
    elif action == 2:
        del found[at:]
    elif action == 3:
        del found[at : at + 1 + choices.below(64)]
    elif action == 4:
        found[at:at] = found[at : at + 1 + choices.below(600)]
    elif action == 5:
        found[at:at] = choices.some(1 + choices.below(16))
    else:
        found.extend(bytes(choices.pick((1, 511, 512, 1024))))
    return bytes(found)


OPS = (
    b"N", b"\x88", b"\x89", b"K\x01", b"K\x00", b"M\xff\xff", b"J\xff\xff\xff\x7f",
    b"J\x00\x00\x00\x80",
    b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01",
    b"\x8a\x00", b"\x8b\xff\xff\xff\x7f", b"\x8b\x00\x00\x00\x80",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"I01\n", b"I-5\n", b"I" + b"9" * 5000 + b"\n", b"L7L\n",
    b"F1e999\n", b"Fnan\n", b"S'a'\n", b"S'\\x\n", b"Vx\\ud800\n", b"V\\U00110000\n", b"Pa\n",
    b"]", b"}", b")", b"(", b"\x8f", b"\x91", b"\x90", b"0", b"1", b"2", b"R", b"b", b"\x81",
    b"\x92",
    b"Q", b"e", b"a", b"u", b"s", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"\x93", b"\x94",
    b"h\x00", b"h\x01", b"h\x05", b"j\x00\x00\x00\x00", b"j\xff\xff\xff\xff", b"g0\n", b"gx\n",
    b"q\x00",
    b"q\xff", b"r\x00\x00\x00\x00", b"r\xff\xff\xff\x7f", b"p0\n", b"p-1\n", b"\x80\x02",
    b"\x80\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"X\xff\xff\xff\x7f", b"X\x03\x00\x00\x00\xed\xa0\x80", b"X\x01\x00\x00\x00\xff", b"U\xff",
    b"T\xff\xff\xff\x7f", b"T\xff\xff\xff\xff", b"B\xff\xff\xff\xff", b"C\x01a", b"\x96" + bytes(8),
    b"\x97", b"\x98", b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b".",
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cposix\nsystem\n", b"c__main__\nX\n", b"c\n\n",
    b"ctorch\nSize\n", b"ctorch\nfloat32\n", b"ctorch\nFloatStorage\n", b"ctorch\nload\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ccollections\nOrderedDict\n",
    b"ccollections\ndefaultdict\n", b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n",
    b"cbuiltins\nrange\n",
    b"cnumpy\ndtype\n", b"cnumpy._core.multiarray\nscalar\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cdatetime\ndatetime\n", b"cpathlib\nPosixPath\n", b"cargparse\nNamespace\n",
    b"c_codecs\nencode\n",
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"itorch\nSize\n", b"ios\nsystem\n",
    b"o",
    b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x05torch\x8c\x04Size\x93",
    b"(lp0\nh\x00a", b"}q\x00h\x00h\x00s", b"(K\x01K\x02t",
)  # fmt: skip


@lru_cache(64)
def _cut_ops(data: bytes) -> tuple[bytes, ...]:
    """A pickle cut where its operations begin; what no longer parses is one last part."""
    starts = [0]
    try:
        for _, _, position in pickletools.genops(data):
            starts += [position] if position else []
    except Exception:  # the standard library raises all kinds
        pass
    return tuple(data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True))


def _text_op(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def _number_op(number: int) -> bytes:
    size = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)


def spoil_pickle(data: bytes, choices: Choices) -> bytes:
    ops = list(_cut_ops(data))
    if choices.hardly() and len(data) < LARGE:
        at = choices.below(len(ops))
        part = ops[at : at + 1 + choices.below(24)]
        ops[at:at] = part * min(choices.pick((3000, 300)), (1 << 20) // (1 + len(b"".join(part))))
    for _ in range(1 + choices.below(4)):
        at = choices.below(len(ops))
        action = choices.below(8)
        if action == 0:
            numbers = [i for i, op in enumerate(ops) if op[:1] in b"KMJ\x8a"]
            if numbers:
                wide = choices.pick((0, 1, 2, 3, 5, 12, 255, -1, *WIDE, 10**25))
                ops[choices.pick(numbers)] = _number_op(wide)
        elif action == 1:
            texts = [i for i, op in enumerate(ops) if op[:1] in b"X\x8cU"]
            if texts:
                ops[choices.pick(texts)] = _text_op(choices.pick(TEXTS))
        elif action == 2:
            ops.insert(at, choices.pick(OPS))
        elif action == 3:
            ops[at] = choices.pick(OPS)
        elif action == 4:
            del ops[at]
        elif action == 5:
            ops[at] = choices.pick(ops)
        elif action == 6:
            first = choices.below(len(ops))
            ops[at:at] = ops[first : first + 1 + choices.below(24)]
        else:
            return spoil_bytes(b"".join(ops), choices)
        ops = ops or [b"."]
    return b"".join(ops)


class Member(NamedTuple):
    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0


@lru_cache(64)
def unzipped(data: bytes) -> tuple[Member, ...]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return tuple(Member(i.filename.encode(), archive.read(i)) for i in archive.infolist())


def zipped(members: list[Member], *, zip64: bool = False) -> bytes:
    """A zip archive; ``zip64`` writes sizes and places into extra fields."""
    body, directory = bytearray(), bytearray()
    for name, data, method, flags in members:
        stored = data
        if method == 8:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            stored = packer.compress(data) + packer.flush()
        crc, begin = zlib.crc32(data), len(body)
        sizes = (len(stored), len(data))
        extra = b""
        if zip64:
            extra = struct.pack("<2H3Q", 1, 24, len(data), len(stored), begin)
            sizes = (0xFFFFFFFF, 0xFFFFFFFF)
        body += struct.pack(
            "<4s5H3I2H", b"PK\3\4", 45, flags, method, 0, 0, crc, *sizes, len(name), 0
        )
        body += name + stored
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 45, 45, flags, method, 0, 0, crc, *sizes, len(name),
            len(extra), 0, 0, 0, 0, 0xFFFFFFFF if zip64 else begin,
        )  # fmt: skip
        directory += name + extra
    begin, count = len(body), len(members)
    end = bytearray()
    if zip64:
        end += struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), begin
        )
        end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(directory), 1)
        begin, count = 0xFFFFFFFF, 0xFFFF
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(directory), begin, 0)
    return bytes(body + directory + end)


def spoil_zip(data: bytes, choices: Choices) -> bytes:
    try:
        members = list(unzipped(data))
    except Exception:  # changed before: the standard library raises all kinds
        members = []
    if not members:
        return spoil_bytes(data, choices)
    action = choices.below(8)
    at = choices.below(len(members))
    if action < 4:
        at = next((i for i, m in enumerate(members) if m.name.endswith(b".pkl")), at)
        members[at] = members[at]._replace(data=spoil_pickle(members[at].data, choices))
    elif action == 4:
        members[at] = members[at]._replace(data=spoil_bytes(members[at].data, choices))
    elif action == 5:
        name = members[at].name
        names = (
            b"",
            b"/",
            b"data.pkl",
            b"x/data.pkl",
            name + b"x",
            b"../" + name,
            b"\xff",
            name.upper(),
        )
        members[at] = members[at]._replace(name=choices.pick(names))
    elif action == 6:
        change = choices.below(5)
        if change == 0:
            del members[at]
        elif change == 1:
            members.append(members[at])
        elif change == 2:
            members[at] = members[at]._replace(method=8)
        elif change == 3:
            members[at] = members[at]._replace(flags=1)
        else:
            members.insert(0, members.pop(at))
    if members and choices.hardly() and len(data) < LARGE:
        name, content, *_ = members[min(at, len(members) - 1)]
        members += [Member(b"%s%d" % (name, number), content[:10]) for number in range(3000)]
    made = zipped(members, zip64=choices.byte() % 4 == 1)
    return spoil_bytes(made, choices) if action == 7 or choices.rarely() else made


def spoil_safetensors(data: bytes, choices: Choices) -> bytes:
    length = int.from_bytes(data[:8], "little")
    action = choices.below(6)
    if action == 5 or length > len(data):
        return spoil_bytes(data, choices)
    header = data[8 : 8 + length]
    header = spoil_bytes(header, choices) if action == 4 else spoil_json(header, choices)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def spoil_legacy(data: bytes, choices: Choices) -> bytes:
    """The layout before zip: five pickles in a row, of which one is changed."""
    starts = [0]
    try:
        for _ in range(5):
            *_, (_, _, last) = pickletools.genops(data[starts[-1] :])
            starts.append(starts[-1] + last + 1)
    except Exception:  # changed before: the standard library raises all kinds
        return spoil_bytes(data, choices)
    number = choices.pick((3, 3, 4, 0, 1, 2))
    begin, end = starts[number], starts[number + 1]
    return data[:begin] + spoil_pickle(data[begin:end], choices) + data[end:]


FIELDS = {
    "name": (0, 100), "mode": (100, 8), "size": (124, 12), "time": (136, 12), "kind": (156, 1),
    "link": (157, 100), "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip
TAR_TEXTS = (
    b"", b".", b"./", b"..", b"../x", b"/etc/passwd", b"a/../../x", b"model_config.yaml",
    b"model_weights.ckpt", b"model_weights.ckpt/x", b"././@LongLink", b"\xff\xfe", b"x" * 100,
    b"a/" * 50, b"model_weights/.metadata",
)  # fmt: skip
TAR_SIZES = (
    b"00000000000\0", b"77777777777\0", b"00000000001\0", b"           \0", b"-0000000001\0",
    b"0000000000_1", b"9999999999 \0", b"\x80" + b"\xff" * 11, b"\x80" + bytes(10) + b"\x01",
    b"\xff" * 12, b"\x00" * 12, b"0x000000001\0",
)  # fmt: skip
PAX = (
    b"11 path=ab\n", b"12 path=../\n", b"14 size=99999\n", b"10 size=-1\n", b"99 path=x\n",
    b"0 a=b\n",
    b"20 GNU.sparse.major=1\n", b"5 =b\n", b" path=x\n",
    b"18 path=\xff\xff\xff\xff\xff\xff\xff\n", b"",
    b"999999999999999999999 a=b\n", b"28 size=99999999999999999999\n", b"\xb2 a=b\n",
)  # fmt: skip


def _header(name: bytes, size: int, kind: bytes) -> bytes:
    head = bytearray(512)
    head[: len(name[:100])] = name[:100]
    head[100:124] = b"0000644\0" + b"0000000\0" * 2
    head[124:136] = b"%011o\0" % size
    head[136:148] = b"00000000000\0"
    head[156:157] = kind
    head[257:265] = b"ustar\x0000"
    return _summed(head)


def _summed(head: bytearray) -> bytes:
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def tarred(files: dict[str, bytes]) -> bytes:
    parts = []
    for name, data in files.items():
        parts += [_header(name.encode(), len(data), b"0"), data, bytes(-len(data) % 512)]
    return b"".join(parts) + bytes(1024)


def spoil_tar(data: bytes, choices: Choices) -> bytes:
    heads, at = [], 0
    while at + 512 <= len(data) and re.fullmatch(rb"[0-7]{11}", data[at + 124 : at + 135]):
        heads.append(at)
        at += 512 + -(-int(data[at + 124 : at + 135], 8) // 512) * 512
    if not heads:
        return spoil_bytes(data, choices)
    at = choices.pick(heads)
    end = next((start for start in heads if start > at), at)
    if choices.hardly() and len(data) < LARGE:
        kind = choices.pick((b"0", b"x", b"L", b"5", b"g"))
        name = choices.pick((b"%d", b"a/%d/c", b"same"))
        names = [name % number if b"%" in name else name for number in range(2000)]
        return data[:at] + b"".join(_header(one, 0, kind) for one in names) + data[at:]
    action = choices.below(6)
    if action in (0, 1):
        begin, size = FIELDS[choices.pick(tuple(FIELDS))]
        head = bytearray(data[at : at + 512])
        if begin == 124:
            value = choices.pick(TAR_SIZES)
        elif begin == 156:
            value = b"01234567xgLKSMVAZ\0\xff"[(n := choices.below(19)) : n + 1]
        else:
            value = choices.pick(TAR_TEXTS)[:size].ljust(size, b"\0")
        head[begin : begin + size] = value
        return data[:at] + (_summed(head) if choices.byte() % 8 != 7 else head) + data[at + 512 :]
    if action == 2:
        text, kind = choices.pick(PAX), choices.pick((b"x", b"g"))
        if choices.byte() % 3 == 2:
            text, kind = choices.pick(TAR_TEXTS), choices.pick((b"L", b"K"))
        extra = _header(b"extended", len(text), kind) + text + bytes(-len(text) % 512)
        return data[:at] + extra * (1 + choices.below(3)) + data[at:]
    if action == 3:
        return data[:at] + data[end:]
    if action == 4:
        return data[:at] + data[at:end] + data[at:]
    return spoil_bytes(data, choices)


def spoil_gzip(data: bytes, choices: Choices) -> bytes:
    action = choices.below(5)
    try:
        inner = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        action = 4
    if action in (0, 1):
        return gzip.compress(spoil_tar(inner, choices), 1, mtime=0)
    if action == 2:
        cut = choices.below(len(inner))
        return b"".join(gzip.compress(part, 1, mtime=0) for part in (inner[:cut], inner[cut:]))
    if action == 3:
        return data + choices.pick(
            (b"\0" * 512, b"x", data, gzip.compress(b"", mtime=0), b"\x1f\x8b")
        )
    return spoil_bytes(data, choices)
