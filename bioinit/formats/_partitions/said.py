"""What the files of a training run say of themselves: settings, sizes, the step they were saved at.

Nothing here has a type that can be relied on: it comes out of pickles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bioinit.errors import CorruptCheckpoint

_STEPS = ("iteration", "global_steps")


def settings(objects: Any, names: Sequence[str]) -> dict[str, Any]:
    """Those of ``names`` that the plain data of a pickle holds; an inert object as its state."""
    if not isinstance(objects, Mapping):
        return {}
    found = {name: objects[name] for name in names if objects.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, Mapping) and isinstance(value.get("state"), Mapping):
            found[name] = value["state"]
    return found


def argument(said: Mapping[str, Any], *names: str) -> Any:
    """The first of ``names`` that the saved arguments give, spelled with ``_`` or with ``-``."""
    args = said.get("args")
    if not isinstance(args, Mapping):
        return None
    spelled = (s for name in names for s in (name, name.replace("_", "-")))
    return next((args[name] for name in spelled if args.get(name) is not None), None)


def size(said: Mapping[str, Any], *names: str) -> int | None:
    """The same, if it is a number that something can have the size of."""
    value = argument(said, *names)
    return value if type(value) is int and value > 0 else None


def require_one_step(where: str, said: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise CorruptCheckpoint if files were saved at different steps; ``said`` is by file."""
    first: dict[str, tuple[str, int]] = {}
    for file, values in said:
        for key in _STEPS:
            value = values.get(key)
            if type(value) is not int:
                continue
            other, expected = first.setdefault(key, (file, value))
            if value != expected:
                raise CorruptCheckpoint(
                    f"{where} mixes two steps of training: {other} says {key} {expected}, and "
                    f"{file} says {value}. Put the files of one step together again."
                )
