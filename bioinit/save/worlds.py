"""In which dialects a family is written, and in which format each of them usually lies."""

from __future__ import annotations

from collections.abc import Collection

from bioinit import formats
from bioinit.errors import ConfigError
from bioinit.families.protocol import Dialect, Family
from bioinit.keys import suggestion

_USUAL = "safetensors"
_FORMATS = {"hf": _USUAL, "nemo2": "torch_dist", "neox": "neox"}


def format_for(dialect: str, asked: str | None) -> str:
    """The format ``asked`` for, or the one that goes with ``dialect``.

    Raises:
        ConfigError: nothing is written in it.
    """
    chosen = asked or _FORMATS.get(dialect, _USUAL)
    writing = [name for name, found in formats.SIBLINGS.usable() if found.write is not None]
    if chosen not in writing:
        raise ConfigError(
            f"nothing is written in the format {chosen!r}. {suggestion(chosen, writing)} "
            f"Choose from {', '.join(sorted(writing))}."
        )
    return chosen


def writers(family: Family) -> Collection[str]:
    """The dialects in which the family can be written."""
    return [name for name, dialect in family.dialects.items() if dialect.write is not None]


def written_dialect(family: Family, name: str, to: str) -> Dialect:
    """The dialect ``to`` of the family called ``name``.

    Raises:
        ConfigError: the family is not written in that dialect.
    """
    dialect = family.dialects.get(to)
    if family.tensors is not None and dialect is not None and dialect.write is not None:
        return dialect
    known = writers(family)
    why = family.absent.get(to)
    if not known:
        raise ConfigError(
            f"the family {name!r} has no tables of other worlds: its models stay in the "
            f"dialect they are in, and {to!r} is another. A family of its own in the entry-point "
            "group bioinit.families adds them."
        )
    raise ConfigError(
        f"the family {name!r} cannot be written in the dialect {to!r}"
        + (f": {why}. " if why else ". ")
        + f"Choose from {', '.join(known)}."
    )
