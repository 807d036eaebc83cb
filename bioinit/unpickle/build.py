"""What the operations of a pickle do here: calls to stand-ins, state into inert objects."""

from __future__ import annotations

import datetime
import pathlib
from typing import Any

import torch

from bioinit.errors import RefusedCheckpoint
from bioinit.unpickle.values import Opaque, Refused, Symbol, TensorRef

MOST_KEY_ITEMS = 8
LONGEST_KEY = 10_000
KEY_BITS = 64
_INERT = frozenset((Opaque, Refused, Symbol))
# These hash and compare in one step, whatever the pickle says: by place, or by a few bytes.
_CHEAP_KEYS = frozenset(
    (
        *(bool, type(None), Opaque, Symbol, torch.dtype),
        *(pathlib.PurePosixPath, datetime.date, datetime.datetime, datetime.timedelta),
    )
)


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


def _check_key(key: Any) -> None:
    """Raise unless ``key`` is cheap to hash and to compare, and shares its hash with few others.

    Python's hashes of numbers can be foretold, so a pickle could hold thousands that are alike.
    There are few of them among numbers of 64 bits, and among tuples with 64 bits of numbers.
    """
    kind = type(key)
    if kind is tuple:
        items = _flat(key)
        for item in items:
            _check_leaf(item, KEY_BITS // len(items))
    else:
        _check_leaf(key, KEY_BITS)


def _check_leaf(key: Any, bits: int) -> None:
    kind = type(key)
    if kind in _CHEAP_KEYS:
        return
    if kind is str or kind is bytes:
        if len(key) > LONGEST_KEY:
            raise ValueError(f"a key of {len(key)} characters")
    elif kind is int:
        if key.bit_length() > bits:
            raise ValueError(f"a key is a number of {key.bit_length()} bits")
    elif kind is float:
        if bits < KEY_BITS:
            raise ValueError("a key is a tuple with a number that is not whole")
    elif kind is Refused:
        raise RefusedCheckpoint(
            f"a name in the pickle would be what {key.module:.100}.{key.name:.100} returns, and "
            "nothing that a checkpoint brings along is called"
        )
    else:
        raise TypeError(f"a key is a {kind.__name__}")


def _flat(key: tuple[Any, ...]) -> list[Any]:
    """What the tuples in a tuple hold; a tuple of tuples of the same tuple could go on for ever."""
    found: list[Any] = []
    waiting, seen = [key], 0
    while waiting:
        for item in waiting.pop():
            seen += 1
            if seen > MOST_KEY_ITEMS:
                raise ValueError(f"a key is a tuple of more than {MOST_KEY_ITEMS} items")
            if type(item) is tuple:
                waiting.append(item)
            else:
                found.append(item)
    return found


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
        if type(key) is not str or len(key) > LONGEST_KEY:
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
