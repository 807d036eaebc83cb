"""The closed unpickler: pickles as plain data, with nothing in them imported or called.

Symbols on a closed list build tensors-to-be and plain values. An object of any other class becomes
an inert :class:`Opaque` with its state. The result of any other call becomes :class:`Refused`, and
a tensor that would need it makes the file refused. Tensors come out as :class:`TensorRef`, which
says where the numbers lie.

>>> import pickle, os
>>> load(pickle.dumps({"epoch": 3, "when": os.system}))
{'epoch': 3, 'when': posix.system}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.unpickle.loop import run
from bioinit.unpickle.machine import Table, Truncated
from bioinit.unpickle.plain import plain
from bioinit.unpickle.symbols import STORAGE_DTYPES, SYMBOLS, storage_ref
from bioinit.unpickle.values import CURE, Opaque, Refused, StorageRef, Symbol, TensorRef
from bioinit.unpickle.weights import Found, Place, Placing, find_weights

__all__ = [
    "STORAGE_DTYPES",
    "SYMBOLS",
    "Found",
    "Opaque",
    "Place",
    "Placing",
    "Refused",
    "StorageRef",
    "Symbol",
    "TensorRef",
    "Truncated",
    "find_weights",
    "load",
    "load_next",
    "plain",
]


def load(
    data: bytes,
    *,
    where: str = "the pickle",
    symbols: Table = SYMBOLS,
    persistent_load: Callable[[Any], Any] = storage_ref,
) -> Any:
    """The value of the pickle ``data``. ``where`` is how messages call it.

    Args:
        data: the whole pickle.
        where: the file, for messages.
        symbols: what stands for a name, by module and name: a :class:`Symbol` or a plain value.
        persistent_load: what stands for a persistent id.

    Raises:
        CorruptCheckpoint: it is no pickle, breaks off, or asks for the impossible.
        RefusedCheckpoint: a tensor in it depends on a call that is not made.
    """
    return load_next(data, 0, where=where, symbols=symbols, persistent_load=persistent_load)[0]


def load_next(
    data: bytes,
    start: int,
    *,
    where: str = "the pickle",
    symbols: Table = SYMBOLS,
    persistent_load: Callable[[Any], Any] = storage_ref,
) -> tuple[Any, int]:
    """Like :func:`load`, for one of several pickles in a row: also the position after it.

    Raises:
        Truncated: the bytes end before the pickle does.
    """
    try:
        return run(data, start, symbols, persistent_load)
    except Truncated as error:
        raise Truncated(f"{where} is truncated: {error}. Fetch or write it again.") from error
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{where} is damaged: {error}. Fetch or write it again.") from error
    except RefusedCheckpoint as error:
        raise RefusedCheckpoint(f"{where} is refused: {error}. {CURE}") from error
