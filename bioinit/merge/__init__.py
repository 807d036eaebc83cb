"""Saved config and recipe become one config: one decision per field, each with its reason.

The table of every combination stands in ``docs/design.md``, "Who wins". In short: a field takes the
checkpoint's value unless it is listed in ``override_parent_fields``; a person's value that would be
lost that way is a problem, not a surprise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import fiddle as fdl

from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.merge.decision import Decision, Merged
from bioinit.merge.table import OnConflict, Table
from bioinit.record import Origin, SavedField, build, is_config, judge, set_in, specs

__all__ = ["Decision", "Merged", "OnConflict", "merge"]


def merge(
    record: Any,
    saved: Mapping[str, SavedField] | None,
    origins: Mapping[str, Origin],
    on_conflict: OnConflict = "error",
    *,
    at: str = "model",
) -> Merged:
    """Decide every field of a model's config.

    Args:
        record: what the recipe and the command line set. It is not changed.
        saved: the checkpoint's config in our fields; None without one.
        origins: who set which dotted key; a field that is set and not in here was set in Python.
        on_conflict: who wins where a person's value differs from what the checkpoint states.
        at: where the config stands in the run, the prefix of its keys in ``origins``.

    Raises:
        ConfigError: a listed name that nobody knows, or the merged values contradict each other.
    """
    record = copy.deepcopy(record)
    by_hand = {path: Origin("recipe", where) for path, where in judge(record, at).items()}
    table = Table({**origins, **by_hand}, on_conflict, _listed(record, saved or {}, at))
    table.decide(record, None if saved is None else dict(saved), at, "")
    live = build(record, at=at)
    return Merged(
        record,
        tuple(draft.settled(live) for draft in table.drafts),
        tuple(table.problems),
        tuple(table.missing),
        tuple(table.unknown),
    )


def _listed(record: Any, saved: Mapping[str, SavedField], at: str) -> frozenset[str]:
    """The names in ``override_parent_fields``, each of which somebody must know."""
    cls = fdl.get_callable(record)
    if "override_parent_fields" not in specs(cls):
        return frozenset()
    names = record.override_parent_fields
    known = {*_dotted_fields(record), *saved}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{at}.override_parent_fields lists {name!r}, which is a field of neither "
                f"{cls.__name__} nor the saved config. "
                + (suggestion(name, known) or f"Fields: {', '.join(sorted(known))}.")
            )
    return frozenset(names)


def _dotted_fields(record: Any, prefix: str = "") -> Iterator[str]:
    arguments = set_in(record)
    for spec in specs(fdl.get_callable(record)).values():
        yield prefix + spec.name
        value = arguments.get(spec.name)
        if value is None and is_config(spec.default_factory):
            value = fdl.Config(spec.default_factory)
        if isinstance(value, fdl.Config):
            yield from _dotted_fields(value, f"{prefix}{spec.name}.")
