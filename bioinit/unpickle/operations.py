"""The rarer operations of a pickle, by their byte. The frequent ones stand in ``loop``."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any, Final

from bioinit.unpickle.build import call, checked, extend, new, put
from bioinit.unpickle.machine import Machine
from bioinit.unpickle.values import Opaque

HIGHEST_PROTOCOL = 5
MOST_DIGITS = 1000
_INT32 = struct.Struct("<i").unpack_from
_UINT32 = struct.Struct("<I").unpack_from
_UINT64 = struct.Struct("<Q").unpack_from
_DOUBLE = struct.Struct(">d").unpack_from


def _integer(text: bytes) -> Any:
    if text in (b"00", b"01"):
        return text == b"01"
    return _number(text)


def _number(text: bytes) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _string(m: Machine) -> None:
    text = m.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    m.stack.append(_old_text(codecs.escape_decode(text[1:-1])[0]))


def _old_text(text: bytes) -> str | bytes:
    """A string as Python 2 wrote it: text if it reads as text."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text


def _protocol(m: Machine) -> None:
    version = m.take(1)[0]
    if version > HIGHEST_PROTOCOL:
        raise ValueError(f"protocol {version}, and {HIGHEST_PROTOCOL} is the highest")


def _object(m: Machine) -> None:
    cls, *args = m.since_mark()
    m.stack.append(call(cls, tuple(args)) if args else new(cls, ()))


def _instance(m: Machine) -> None:
    m.symbol(m.line().decode("utf-8"), m.line().decode("utf-8"))
    cls, args = m.stack.pop(), tuple(m.since_mark())
    m.stack.append(call(cls, args) if args else new(cls, ()))


def _new_with_keywords(m: Machine) -> None:
    keywords, args, cls = m.stack.pop(), m.stack.pop(), m.stack.pop()
    made = new(cls, args)
    if isinstance(made, Opaque):
        made.args = (*made.args, keywords)
    m.stack.append(made)


def _global(m: Machine) -> None:
    m.symbol(m.line().decode("utf-8"), m.line().decode("utf-8"))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.symbol(module, name)


def _append(m: Machine) -> None:
    item = m.stack.pop()
    extend(m.stack[-1], [item])


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    put(m.stack[-1], [key, value])


def _fill(into: Callable[[Any, list[Any]], None]) -> Callable[[Machine], None]:
    def fill(m: Machine) -> None:
        items = m.since_mark()
        into(m.stack[-1], items)

    return fill


def _dict(m: Machine) -> None:
    made: dict[Any, Any] = {}
    put(made, m.since_mark())
    m.stack.append(made)


def _pop(m: Machine) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


def _pop_mark(m: Machine) -> None:
    m.since_mark()


def _tuple_of_three(m: Machine) -> None:
    m.stack[-3:] = ((m.stack[-3], m.stack[-2], m.stack[-1]),)


def _pushes(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def push(m: Machine) -> None:
        m.stack.append(read(m))

    return push


def _counted(
    unpack: Callable[..., tuple[Any, ...]], size: int, make: Callable[[bytes], Any]
) -> Callable[[Machine], None]:
    """Push ``make`` of as many bytes as the number before them says."""
    return _pushes(lambda m: make(m.take(m.number(unpack, size))))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _long(data: bytes) -> int:
    if len(data) > MOST_DIGITS:
        raise ValueError(f"a number of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _uint8(data: bytes, position: int) -> tuple[int]:
    return (data[position],)


_OPERATIONS: Final[dict[int, Callable[[Machine], None]]] = {
    ord("0"): _pop,
    ord("1"): _pop_mark,
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    ord("F"): _pushes(lambda m: float(m.line())),
    ord("G"): _pushes(lambda m: m.number(_DOUBLE, 8)),
    ord("I"): _pushes(lambda m: _integer(m.line())),
    ord("L"): _pushes(lambda m: _number(m.line().rstrip(b"L"))),
    ord("P"): _pushes(lambda m: m.persistent(m.line().decode("utf-8"))),
    ord("S"): _string,
    ord("T"): _counted(_INT32, 4, _old_text),
    ord("U"): _counted(_uint8, 1, _old_text),
    ord("V"): _pushes(lambda m: m.line().decode("raw-unicode-escape")),
    ord("B"): _counted(_UINT32, 4, bytes),
    ord("C"): _counted(_uint8, 1, bytes),
    ord("a"): _append,
    ord("c"): _global,
    ord("d"): _dict,
    ord("e"): _fill(extend),
    ord("g"): lambda m: m.recall(_number(m.line())),
    ord("i"): _instance,
    ord("l"): _pushes(lambda m: m.since_mark()),
    ord("o"): _object,
    ord("p"): lambda m: m.remember(_number(m.line())),
    ord("s"): _set_item,
    0x87: _tuple_of_three,
    ord("]"): lambda m: m.stack.append([]),
    0x80: _protocol,
    0x88: lambda m: m.stack.append(True),
    0x8A: _counted(_uint8, 1, _long),
    0x8B: _counted(_INT32, 4, _long),
    0x8D: _counted(_UINT64, 8, _text),
    0x8E: _counted(_UINT64, 8, bytes),
    0x8F: lambda m: m.stack.append(set()),
    0x90: _fill(extend),
    0x91: _pushes(lambda m: frozenset(checked(m.since_mark()))),
    0x92: _new_with_keywords,
    0x93: _stack_global,
    0x95: lambda m: m.number(_UINT64, 8),
    0x96: _counted(_UINT64, 8, bytearray),
}
_UNITS: Final = {
    **{ord("d"): 3, ord("s"): 2, ord("i"): 1, ord("o"): 1, ord("]"): 1},
    **{0x87: 1, 0x8F: 4, 0x91: 3, 0x92: 1},
}
"""What they build, in the units of memory that ``loop`` counts. Marks are paid for already."""
RARE: Final = {op: (run, _UNITS.get(op, 0)) for op, run in _OPERATIONS.items()}
