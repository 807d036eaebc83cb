"""The names that a saved file may use: what this program has said itself, and a short closed list.

Nothing is imported because a file names it. A name is known if the running program

- made a subclass of ``IOMixin`` of it, or called ``track_io`` or ``make_known`` on it;
- wrote it into a file with ``io_dump``;
- states it in the signature of such a class: a dataclass or an enum as a type, a class or a
  function as a default;

or if it is a dtype, an activation or an initializer of torch, or a plain type of Python. What may
be known may not be called for that: see :class:`Use`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import typing
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, get_args

from bioinit.contexts._aliases import MOVED
from bioinit.record import names

ABSENT = object()
"""What :func:`find` answers for a name that is not known."""


class Use(enum.IntEnum):
    """What a saved file may do with what it names; each includes those before it."""

    NAME = 0
    """Hand it on as a value: what ``io_dump`` met as one, and defaults in signatures."""
    PREPARE = 1
    """Put arguments to it, in a partial: what ``io_dump`` met in a partial, and plain types."""
    CALL = 2
    """Have it called: what the program said may be built, and dataclasses that it holds."""


_HELD: dict[str, tuple[Any, Use]] = {}
_WRITTEN: dict[Any, tuple[str, str]] = {}
_SIGNED: dict[type, dict[str, tuple[Any, Use]]] = {}
_PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))
_MODULES = "ReLU GELU ReLU6 SiLU Sigmoid SELU ELU Hardtanh Hardswish LeakyReLU Mish Softplus Tanh"
_INITIALIZERS = (
    "constant_ dirac_ eye_ kaiming_normal_ kaiming_uniform_ normal_ ones_ orthogonal_ sparse_ "
    "trunc_normal_ uniform_ xavier_normal_ xavier_uniform_ zeros_"
)
_C_FUNCTIONS = "torch._C._nn."
_FUNCTIONAL = "torch.nn.functional."


def dotted(value: Any) -> str:
    """The name of a class or function, as files spell it: module and qualified name."""
    return ".".join(spelled(value))


def spelled(value: Any) -> tuple[str, str]:
    """The module and the name by which a class, a function or a member of an enum is written."""
    if isinstance(value, enum.Enum):
        return type(value).__module__, f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, MethodType):  # its own name is the one of the class that defines it
        owner: Any = value.__self__
        return owner.__module__, f"{owner.__qualname__}.{value.__name__}"
    return _WRITTEN.get(value) or _public(value) or (value.__module__, value.__qualname__)


def register(value: Any, *others: str, use: Use = Use.CALL) -> None:
    """Let saved files name a class, an enum or a function. The last one of a name wins.

    Args:
        value: what they may name, by its own dotted name.
        others: other dotted names for it, such as those from before it was moved.
        use: what they may do with it; what was allowed before stays allowed.
    """
    for name in (dotted(value), *others):
        before, allowed = _HELD.get(name, (ABSENT, Use.NAME))
        _HELD[name] = value, max(use, allowed) if _same(before, value) else use


def _same(one: Any, other: Any) -> bool:
    # A class method is another object each time it is asked for.
    return one is other or (isinstance(one, MethodType) and bool(one == other))


def write_as(value: Any, module: str, name: str) -> None:
    """Write a class of ours under the name by which other readers know it, and know it by that."""
    _WRITTEN[value] = module, name
    register(value, f"{module}.{name}")


def find(name: str) -> Any:
    """What ``name`` means to this program, or :data:`ABSENT`."""
    for spelled in dict.fromkeys((name, MOVED.get(name, name))):
        if spelled in _HELD:
            return _HELD[spelled][0]
        found = _closed(spelled)
        if found is ABSENT:
            found = _member(spelled)
        if found is ABSENT:
            found = _signed(spelled)[0]
        if found is not ABSENT:
            return found
    return ABSENT


def is_known(name: str) -> bool:
    """Whether a file may name ``name``: a dotted name of a class or function."""
    return find(name) is not ABSENT


def may_be_called(value: Any) -> bool:
    """Whether a file may have ``value`` called."""
    return _allowed(value) == Use.CALL


def may_be_prepared(value: Any) -> bool:
    """Whether a file may put arguments to ``value``, for the program to call it with later."""
    return _allowed(value) >= Use.PREPARE or is_closed(value)


def _allowed(value: Any) -> Use:
    if isinstance(value, type) and any(value is known for known in _torch().values()):
        return Use.CALL
    allowed = max(
        (use for held, use in list(_HELD.values()) if _same(held, value)), default=Use.NAME
    )
    if allowed < Use.CALL and dataclasses.is_dataclass(value):
        signed, use = _signed(dotted(value))
        return max(allowed, use) if signed is value else allowed
    return allowed


def _public(value: Any) -> tuple[str, str] | None:
    """Module and name of ``value`` on the closed list, which Python may know by another name."""
    for name, known in _torch().items():
        if known is value:
            module, _, last = name.rpartition(".")
            return module, last
    return None


@functools.cache
def _torch() -> Mapping[str, Any]:
    """Dtypes, activations and initializers by the public names."""
    import torch

    found: dict[str, Any] = {
        f"torch.{name}": value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
    }
    found |= names.functions()
    for name in _MODULES.split():
        found[f"torch.nn.{name}"] = getattr(torch.nn, name)
    for name in _INITIALIZERS.split():
        found[f"torch.nn.init.{name}"] = getattr(torch.nn.init, name)
    return found


@functools.cache
def _inner_names() -> Mapping[str, Any]:
    """The same by the names that Python gives them, which older files have."""
    found = {f"builtins.{kind.__name__}": kind for kind in _PLAIN}
    for name, value in _torch().items():
        if name.startswith(_FUNCTIONAL):
            found[_C_FUNCTIONS + name.removeprefix(_FUNCTIONAL)] = value
        if isinstance(value, type):
            found[dotted(value)] = value
    return found


def is_closed(value: Any) -> bool:
    """Whether every file may name ``value``, because it is on the closed list."""
    return any(value is one for table in (_torch(), _inner_names()) for one in table.values())


def _closed(name: str) -> Any:
    return _torch().get(name, _inner_names().get(name, ABSENT))


def _member(name: str) -> Any:
    """A member of an enum that is known."""
    kind, _, member = name.rpartition(".")
    held = (_HELD.get(kind) or _signed(kind))[0]
    if isinstance(held, type) and issubclass(held, enum.Enum):
        return held.__members__.get(member, ABSENT)
    return ABSENT


def _signed(name: str) -> tuple[Any, Use]:
    """What stands in the signature of a class that may be called."""
    found = ABSENT, Use.NAME
    held = [value for value, use in list(_HELD.values()) if use == Use.CALL]
    for kind in held:
        if not isinstance(kind, type):
            continue
        if kind not in _SIGNED:
            _SIGNED[kind] = _all_signed(kind)
        found = _SIGNED[kind].get(name, found)
        if found[1] == Use.CALL:
            break
    return found


def _all_signed(kind: type) -> dict[str, tuple[Any, Use]]:
    """What stands in the signature of ``kind``, and in those of the dataclasses there."""
    found: dict[str, tuple[Any, Use]] = {}
    waiting: list[Any] = [kind]
    while waiting:
        for value, use in _in_signature(waiting.pop()):
            name = dotted(value)
            if name not in found or found[name][1] < use:
                found[name] = value, use
                waiting.extend([value] if use == Use.CALL else [])
    return found


def _in_signature(kind: Any) -> Iterator[tuple[Any, Use]]:
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return
    for parameter in parameters:
        if isinstance(parameter.default, enum.Enum):
            yield type(parameter.default), Use.NAME
        elif isinstance(parameter.default, type | FunctionType | BuiltinFunctionType):
            yield parameter.default, Use.NAME
    try:
        hints = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)
    except (NameError, TypeError, AttributeError, SyntaxError):  # of annotations that are text
        return
    for hint in hints.values():
        for part in _parts(hint):
            if dataclasses.is_dataclass(part):
                yield part, Use.CALL
            elif issubclass(part, enum.Enum):
                yield part, Use.NAME


def _parts(hint: Any) -> Iterator[type]:
    if isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        yield from _parts(part)
