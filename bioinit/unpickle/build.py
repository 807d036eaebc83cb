"""What the operations of a pickle do here: calls to stand-ins, state into inert objects."""

from __future__ import annotations

from typing import Any

from bioinit.errors import RefusedCheckpoint
from bioinit.unpickle.values import Opaque, Refused, Symbol, TensorRef

DEEPEST_KEY = 8
_INERT = frozenset((Opaque, Refused, Symbol))
_PLAIN_KEYS = frozenset((int, float, bool, bytes, type(None), complex))


def call(function: Any, args: Any) -> Any:
    """What calling ``function`` gives: our stand-in's answer, or a mark that it was not called."""
    if type(args) is not tuple:
        raise TypeError("arguments are not a tuple")
    if type(function) is Symbol:
        if function.build is None:
            return Refused(function.module, function.name, args)
        try:
            return function.build(*args)
        except (TypeError, ValueError):
            if any(type(arg) in _INERT for arg in args):
                return Refused(function.module, function.name, args)
            raise
    if type(function) in _INERT:
        return Refused(function.module, function.name, (function, args))
    raise TypeError(f"a {type(function).__name__} is called")


def new(cls: Any, args: Any) -> Any:
    """What making an object of ``cls``, without calling it, gives."""
    if type(cls) is Symbol and cls.build is None and type(args) is tuple:
        return Opaque(cls.module, cls.name, None, args)
    return call(cls, args)


def restore(target: Any, state: Any) -> None:
    """Hand ``state`` to ``target``, which keeps it only if it is inert."""
    if type(target) is Opaque:
        if type(state) is tuple and len(state) == 2 and type(state[1]) is dict and not state[0]:
            state = state[1]  # the values of __slots__, and no __dict__
        target.state = state
    elif type(target) is Refused:
        target.args = (target.args, state)
    elif not isinstance(target, dict | TensorRef):
        # A state dict carries its `_metadata` this way, a tensor its Python attributes: dropped.
        raise TypeError(f"a {type(target).__name__} is given a state")


def _check_key(key: Any, depth: int = 0) -> None:
    """Raise unless ``key`` may be hashed: that of a deep tuple overflows Python's own stack."""
    kind = type(key)
    if kind is str or kind in _PLAIN_KEYS:
        return
    if kind is Refused:
        raise RefusedCheckpoint(
            f"a name in the pickle would be what {key.module}.{key.name} returns, and nothing that "
            "a checkpoint brings along is called"
        )
    if isinstance(key, tuple):
        if depth == DEEPEST_KEY:
            raise RecursionError("a key is nested too deep")
        for item in key:
            _check_key(item, depth + 1)


def put(target: Any, pairs: list[Any]) -> None:
    """Put keys and values, which alternate in ``pairs``, into ``target``."""
    if type(target) is Refused:
        target.args = (target.args, pairs)
        return
    if type(target) is Opaque:
        if target.items is None:
            target.items = {}
        target = target.items
    if type(target) is not dict:
        raise TypeError(f"a {type(target).__name__} is given named items")
    keys = pairs[::2]
    for key in keys:
        if type(key) is not str:
            _check_key(key)
    target.update(zip(keys, pairs[1::2], strict=True))


def extend(target: Any, items: list[Any]) -> None:
    """Put ``items`` at the end of ``target``, or into it."""
    if type(target) is Refused:
        target.args = (target.args, items)
        return
    if type(target) is Opaque:
        if target.items is None:
            target.items = []
        target = target.items
    if type(target) is list:
        target.extend(items)
    elif type(target) is set:
        target.update(checked(items))
    else:
        raise TypeError(f"a {type(target).__name__} is given items")


def checked(items: list[Any]) -> list[Any]:
    """``items``, all of which may be hashed."""
    for item in items:
        _check_key(item)
    return items
