"""A part of a saved config, by its dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.keys import suggestion

_MOST_SHOWN = 400
_MODEL, _CONFIG = "model", "config"


def at(context: Context, subpath: str | None) -> Any:
    """What ``context`` has at ``subpath``; everything if there is none.

    A key is a name, or the index of a list item. A key that has dots itself is found too. Where a
    kind of config has the model's fields under ``model`` alone, ``model.config`` means the same.

    Raises:
        ConfigError: there is nothing; the message lists what there is.
    """
    found: Any = context.tree
    keys = subpath.split(".") if subpath else []
    taken: list[str] = []
    while keys:
        if taken == [_MODEL] and keys[0] == _CONFIG and _CONFIG not in found:
            taken.append(keys.pop(0))  # other systems keep a model's config one step further down
            continue
        inside = _inside(found)
        count = next((n for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in inside), 0)
        if not count:
            there = [key for key in inside if not key.startswith("_")] or list(inside)
            raise ConfigError(_missing(context, subpath, taken, keys[0], there))
        key = ".".join(keys[:count])
        found = inside[key]
        taken.append(key)
        del keys[:count]
    return found


def _inside(value: Any) -> dict[str, Any]:
    """What is inside of ``value``, by the text of its key."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, list | tuple):
        return {str(index): item for index, item in enumerate(value)}
    return {}


def _missing(
    context: Context, subpath: str | None, taken: list[str], key: str, there: list[str]
) -> str:
    place = ".".join(taken) or "the top"
    shown = ", ".join(sorted(there)[:_MOST_SHOWN])
    more = f" and {len(there) - _MOST_SHOWN} more" if len(there) > _MOST_SHOWN else ""
    return (
        f"{context.where} has nothing at {subpath!r}: at {place} there is no {key!r}. "
        f"{suggestion(key, there)} There is: {shown or 'a single value'}{more}."
    )
