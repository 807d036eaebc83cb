"""Codecs of stored chunks: which are decoded, and never to more bytes than a chunk has.

Only codecs that turn bytes into numbers are listed; those that make objects are refused by name.
Every decoder is told how many bytes must come out. It checks what the bytes claim before it makes
room for them, so a chunk that would unfold to a disk full of zeros stops at its first bytes. zlib,
gzip, bz2 and lzma are the standard library's; the rest needs the extra ``zarr``.
"""

from __future__ import annotations

import bz2
import importlib
import lzma
import re
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bioinit.errors import ConfigError

Decode = Callable[[Any, int], Any]
"""Given encoded bytes and how many must come out, those bytes."""

MOST_LZMA_MEMORY = 1 << 27  # the strongest setting of xz needs half of it
MOST_BLOSC_BYTES = (1 << 31) - 1
MOST_CACHED_BYTES = 1 << 25
OBJECT_CODECS = ("pickle", "json", "json2", "msgpack", "msgpack2", "categorize")
CURE = "Read it with zarr where it was written, and write it again without that codec."
_DTYPE = re.compile(r"<[fiu][248]|[|<]?[iub]1")
_FAILURES = (
    ArithmeticError,
    EOFError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zlib.error,
)


class Undecodable(ValueError):
    """Encoded bytes that are damaged, or claim what they cannot be."""


class NotDecoded(ValueError):
    """A codec that is not on the list, or that is asked for in a way that is not supported."""


class Codec(NamedTuple):
    """One step. ``most`` bounds how many bytes one stored byte can become.

    ``stored`` is the size of what it makes of so many bytes; None for a compressor, where nobody
    can say.
    """

    name: str
    decode: Decode
    most: int = 1
    stored: Callable[[int], int] | None = None


class Chain(NamedTuple):
    """The steps that were applied to ``size`` bytes, in the order they were applied."""

    codecs: tuple[Codec, ...]
    sizes: tuple[int, ...]
    """How many bytes go into each step when it encodes."""

    @property
    def text(self) -> str:
        return " + ".join(codec.name for codec in self.codecs)

    @property
    def stored(self) -> int | None:
        """How many bytes must be stored; None if that depends on the numbers."""
        last = self.codecs[-1]
        return None if last.stored is None else last.stored(self.sizes[-1])

    def can_become(self, stored: int) -> bool:
        """Whether so many stored bytes can unfold to as many as are expected."""
        return self.sizes[-1] <= self.codecs[-1].most * stored

    def decode(self, data: bytes) -> memoryview:
        """The bytes behind ``data``.

        Raises:
            Undecodable: they are damaged, or are not as many as they should be.
        """
        found: Any = data
        for codec, size in zip(reversed(self.codecs), reversed(self.sizes), strict=True):
            try:
                with np.errstate(all="ignore"):  # damaged numbers are numbers
                    found = memoryview(codec.decode(found, size)).cast("B")
            except _FAILURES as error:
                raise Undecodable(f"{codec.name}: {error}") from error
            if found.nbytes != size:
                raise Undecodable(f"{codec.name}: {found.nbytes} bytes came out, not {size}")
        return memoryview(found)


def chain(size: int, filters: Any, compressor: Any) -> Chain | None:
    """The steps that ``filters`` and ``compressor`` of a header name; None if there are none.

    Raises:
        NotDecoded: one of them is not decoded here, with the reason.
        ValueError: they are no list of codecs and no codec.
        ConfigError: one needs a package that is not installed.
    """
    if filters is not None and not isinstance(filters, list):
        raise ValueError("its filters are no list")
    configs = [*(filters or []), *([] if compressor is None else [compressor])]
    if not configs:
        return None
    codecs, sizes = [], []
    for number, config in enumerate(configs):
        codec = _codec(config)
        codecs.append(codec)
        sizes.append(size)
        if codec.stored is not None:
            size = codec.stored(size)
        elif number + 1 < len(configs):
            raise NotDecoded(f"the codec {codec.name!r} before another")
    return Chain(tuple(codecs), tuple(sizes))


def _codec(config: Any) -> Codec:
    name = config.get("id") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise ValueError("it names a codec that is no object with an 'id'")
    if name in OBJECT_CODECS or name.startswith("vlen-"):
        raise NotDecoded(f"the codec {name!r}, which makes objects and not numbers")
    if name == "lzma" and config.get("format", 1) not in (0, 1, 2):
        raise NotDecoded("the codec 'lzma' without headers")
    if name in COMPRESSORS:
        if name in _PACKED:
            _numcodecs(name)
        return COMPRESSORS[name]
    if name in FILTERS:
        return FILTERS[name](name, config)
    raise NotDecoded(f"the codec {name!r:.80}")


def _streams(make: Callable[[], Any]) -> Decode:
    """Decode one or more streams of the standard library that follow one another."""

    def decode(data: Any, size: int) -> bytes:
        parts: list[bytes] = []
        room, rest = size, data
        while rest or not parts:
            stream = make()
            part = stream.decompress(rest, room + 1)
            if len(part) > room:
                raise Undecodable(f"more than {size} bytes come out")
            if not stream.eof:
                raise Undecodable(f"it ends after {size - room + len(part)} of {size} bytes")
            if len(stream.unused_data) == len(rest):
                raise Undecodable("a stream without a byte")
            room, rest = room - len(part), stream.unused_data
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return decode


def _blosc(data: Any, size: int) -> Any:
    # The C library trusts what the header says of its own length.
    if len(data) < 16:
        raise Undecodable(f"{len(data)} bytes are no header of 16")
    unpacked, block, packed = struct.unpack_from("<3I", data, 4)
    if packed != len(data):
        raise Undecodable(f"its header says {packed} stored bytes, and there are {len(data)}")
    if unpacked != size or size > MOST_BLOSC_BYTES or not 0 < block <= size:
        raise Undecodable(f"its header says {unpacked} bytes in blocks of {block}, not {size}")
    return _into(_numcodecs("blosc").decompress, data, size)


def _lz4(data: Any, size: int) -> Any:
    if len(data) <= 4:
        raise Undecodable(f"{len(data)} bytes are no header of 4 and data")
    (unpacked,) = struct.unpack_from("<I", data)
    if unpacked != size:
        raise Undecodable(f"its header says {unpacked} bytes, not {size}")
    return _into(_numcodecs("lz4").decompress, data, size)


def _zstd(data: Any, size: int) -> Any:
    unpacked = _zstd_size(bytes(data[:18]))
    if unpacked != size:
        said = "does not say how many bytes" if unpacked is None else f"says {unpacked} bytes"
        raise Undecodable(f"its header {said}, not {size}")
    return _into(_numcodecs("zstd").decompress, data, size)


def _zstd_size(start: bytes) -> int | None:
    """What the header of a frame says of its content; None if it says nothing."""
    if len(start) < 6 or start[:4] != b"\x28\xb5\x2f\xfd":
        raise Undecodable("it begins like no frame of zstd")
    describes = start[4]
    is_single = bool(describes & 32)
    width = (1 if is_single else 0, 2, 4, 8)[describes >> 6]
    at = 5 + (not is_single) + (0, 1, 2, 4)[describes & 3]
    field = start[at : at + width]
    if len(field) < width:
        raise Undecodable("its header is cut off")
    return int.from_bytes(field, "little") + (256 if width == 2 else 0) if width else None


def _into(decompress: Callable[[Any, Any], Any], data: Any, size: int) -> Any:
    out = np.empty(size, np.uint8)  # a bytearray would be filled with zeros first
    decompress(data, out)
    return out


_PACKED = ("blosc", "lz4", "zstd")
COMPRESSORS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (  # what a byte can become at most: a property of each format, rounded up
        Codec("zlib", _streams(zlib.decompressobj), 1100),
        Codec("gzip", _streams(lambda: zlib.decompressobj(wbits=31)), 1100),
        Codec("bz2", _streams(bz2.BZ2Decompressor), 2_000_000),
        Codec("lzma", _streams(lambda: lzma.LZMADecompressor(memlimit=MOST_LZMA_MEMORY)), 20_000),
        Codec("blosc", _blosc, 50_000),
        Codec("lz4", _lz4, 256),
        Codec("zstd", _zstd, 50_000),
    )
}


def _filter(module: str, kind: str, *keys: str) -> Callable[[str, Mapping[str, Any]], Codec]:
    """A filter of numcodecs that is made from ``keys`` of its configuration."""

    def make(name: str, config: Mapping[str, Any]) -> Codec:
        given = {key: config[key] for key in keys if config.get(key) is not None}
        for key, value in given.items():
            is_good = _DTYPE.fullmatch(value) if isinstance(value, str) else _is_number(value)
            if value == 0 and key == "scale":
                raise ValueError(f"{key} of its codec {name!r} is {value!r}")
            if not is_good and not (key == "location" and value in ("start", "end")):
                raise ValueError(f"{key} of its codec {name!r} is {value!r:.80}")
        try:
            step = getattr(_numcodecs(module), kind)(**given)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"its codec {name!r} cannot be set up: {error}") from error
        return Codec(name, lambda data, size: step.decode(data), 1, _stored_size(name, given))

    return make


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _stored_size(name: str, given: Mapping[str, Any]) -> Callable[[int], int]:
    if name in ("crc32", "adler32", "fletcher32"):
        return lambda size: size + 4
    if name == "packbits":
        return lambda size: 1 + -(-size // 8)
    before = given.get("decode_dtype", given.get("dtype"))
    after = given.get("encode_dtype", given.get("astype", before))
    if isinstance(before, str) and isinstance(after, str):
        old, new = int(before[-1]), int(after[-1])
        return lambda size: size // old * new
    return lambda size: size


FILTERS: Mapping[str, Callable[[str, Mapping[str, Any]], Codec]] = {
    "shuffle": _filter("shuffle", "Shuffle", "elementsize"),
    "delta": _filter("delta", "Delta", "dtype", "astype"),
    "fixedscaleoffset": _filter(
        "fixedscaleoffset", "FixedScaleOffset", "offset", "scale", "dtype", "astype"
    ),
    "quantize": _filter("quantize", "Quantize", "digits", "dtype", "astype"),
    "bitround": _filter("bitround", "BitRound", "keepbits"),
    "astype": _filter("astype", "AsType", "encode_dtype", "decode_dtype"),
    "packbits": _filter("packbits", "PackBits"),
    "crc32": _filter("checksum32", "CRC32", "location"),
    "adler32": _filter("checksum32", "Adler32", "location"),
    "fletcher32": _filter("fletcher32", "Fletcher32"),
}


def known() -> Sequence[str]:
    """Names of the codecs that are decoded."""
    return (*COMPRESSORS, *FILTERS)


def _numcodecs(module: str) -> Any:
    try:
        return importlib.import_module(f"numcodecs.{module}")
    except ImportError as error:
        raise ConfigError(
            f"chunks compressed with {module!r} need the package numcodecs, which cannot be "
            f"imported ({error}). Install it: pip install 'bioinit[zarr]'"
        ) from error


class _Entry:
    __slots__ = ("found", "lock")

    def __init__(self) -> None:
        self.found: memoryview | None = None
        self.lock = threading.Lock()


class Cache:
    """What was decoded last, for several readers of parts of the same chunk.

    The newest is always kept, older ones while all of them together are small.
    """

    def __init__(self, most: int = MOST_CACHED_BYTES) -> None:
        self._most = most
        self._entries: OrderedDict[object, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object, decode: Callable[[], memoryview]) -> memoryview:
        """What ``decode`` returned for ``key``; who comes while it runs waits for it."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            if entry.found is None:
                entry.found = decode()
                self._trim()
            return entry.found

    def drop(self, key: object) -> None:
        with self._lock:
            self._entries.pop(key, None)

    def _trim(self) -> None:
        with self._lock:
            sizes = {key: e.found.nbytes for key, e in self._entries.items() if e.found is not None}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if total <= self._most:
                    break
                total -= sizes[key]
                del self._entries[key]
