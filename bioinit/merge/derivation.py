"""Which saved values nobody chose: the saved config computes them from its other fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fiddle as fdl

from bioinit.errors import ConfigError
from bioinit.record import SavedField, Unreadable, build, same, set_in, specs, with_records


@dataclass(frozen=True)
class Derivation:
    """A field that a config computes when it is not set, and what the saved one computes."""

    value: Any
    is_saved: bool
    """Whether the saved config holds just that, so that nobody chose it there."""


def derivations(record: Any, saved: Mapping[str, SavedField], at: str) -> dict[str, Derivation]:
    """The fields that the saved config computes, with the values it computes for them.

    Whether a saved value was chosen or computed is found out by taking it away: the config is built
    from the other saved fields, and if the value comes back, nobody had chosen it.
    """
    cls = fdl.get_callable(record)
    theirs = fdl.Config(cls, **set_in(record))
    for name, (value, _, _) in saved.items():
        if not specs(cls)[name].marks.own and not isinstance(value, Unreadable):
            setattr(theirs, name, value)
    found: dict[str, Derivation] = {}
    for spec in specs(cls).values():
        value = saved[spec.name].value if spec.name in saved else None
        can_be_derived = spec.marks.derive is not None or spec.default is None
        if not can_be_derived or not spec.init or spec.marks.own or spec.name not in saved:
            continue
        if spec.name in set_in(theirs):
            delattr(theirs, spec.name)
        derived = _value_in(theirs, spec.name, at)
        if derived is None:
            setattr(theirs, spec.name, value)
            continue
        is_saved = value is None or same(value, derived)
        found[spec.name] = Derivation(derived, is_saved)
        if not is_saved:
            setattr(theirs, spec.name, value)
    return found


def _value_in(record: Any, name: str, at: str) -> Any:
    try:
        return with_records(getattr(build(record, at=at), name))
    except ConfigError:
        return None
