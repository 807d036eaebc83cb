"""The rows of the merge table, applied to one field after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import fiddle as fdl

from bioinit.errors import ConfigError, Problem
from bioinit.keys import suggestion
from bioinit.merge.decision import Decision
from bioinit.merge.derivation import Derivation, derivations
from bioinit.record import (
    Origin,
    SavedField,
    Spec,
    Unreadable,
    fit,
    same,
    set_in,
    shown,
    specs,
    with_records,
)

OnConflict = Literal["error", "checkpoint", "recipe"]
_PYTHON = Origin("recipe", "Python")
_DERIVED = "derived"


@dataclass(frozen=True)
class Draft:
    """A decision before the merged config exists.

    What the record does not set is read from the live config. ``expected`` is what it was in the
    checkpoint where it is derived again.
    """

    field: str
    record: Any
    origin: Origin
    lost: tuple[Any, Origin] | None = None
    note: str = ""
    expected: tuple[Any, Origin] | None = None

    def settled(self, live: Any) -> Decision:
        name = self.field.rpartition(".")[2]
        if name in set_in(self.record):
            value = set_in(self.record)[name]
        else:
            value = live
            for segment in self.field.split("."):
                value = getattr(value, segment)
            value = with_records(value)
        origin, lost = self.origin, self.lost
        if self.expected is not None and same(value, self.expected[0]):
            origin = self.expected[1]
        elif self.expected is not None:
            lost = self.expected
        if lost is not None and same(value, lost[0]):
            lost = None
        return Decision(self.field, value, origin, lost, self.note)


@dataclass
class Table:
    """The rows of the table, applied to one field after the other."""

    origins: Mapping[str, Origin]
    on_conflict: OnConflict
    listed: frozenset[str]
    drafts: list[Draft] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def decide(
        self, record: Any, saved: dict[str, SavedField] | None, at: str, prefix: str
    ) -> None:
        """Decide every field of ``record``, and change it accordingly."""
        known = specs(fdl.get_callable(record))
        fitting, notes = _in_our_fields(known, saved or {})
        derived = derivations(record, fitting, at)
        for spec in known.values():
            if spec.marks.bookkeeping:
                continue
            one = _Field(self, record, spec, at, prefix + spec.name, notes.get(spec.name, ""))
            if not spec.init:
                one.keep("computed")
            elif spec.marks.own or saved is None:
                one.keep()
            elif spec.name in fitting:
                one.decide(fitting[spec.name], derived.get(spec.name))
            else:
                self.missing.append(one.dotted)
                one.keep("not in the saved config")
        for name, value in (saved or {}).items():
            if name not in known and not any(name in s.marks.renamed_from for s in known.values()):
                self.unknown.append(prefix + name)
                self._report_unknown(known, name, value, prefix)

    def is_listed(self, dotted: str) -> bool:
        parts = dotted.split(".")
        return any(".".join(parts[: n + 1]) in self.listed for n in range(len(parts)))

    def _report_unknown(
        self, known: Mapping[str, Spec], name: str, saved: SavedField, prefix: str
    ) -> None:
        if self.is_listed(prefix + name):
            return
        self.problems.append(
            Problem(
                "field",
                prefix + name,
                f"the saved config says {prefix}{name}={shown(saved.value)!r} ({saved.where}), a "
                f"field that this model's config does not have. {suggestion(name, known)}".strip(),
                f"List {prefix + name!r} in model.override_parent_fields to leave it behind, or "
                f"mark the field that it became: renamed_from({name!r}).",
            )
        )


@dataclass
class _Field:
    """One field of one config: our side of it, and the rows that may apply."""

    table: Table
    record: Any
    spec: Spec
    at: str
    dotted: str
    note: str

    @property
    def path(self) -> str:
        return f"{self.at}.{self.spec.name}" if self.at else self.spec.name

    @property
    def is_set(self) -> bool:
        return self.spec.name in set_in(self.record)

    @property
    def value(self) -> Any:
        if self.is_set:
            return set_in(self.record)[self.spec.name]
        return with_records(self.spec.default_value())

    @property
    def origin(self) -> Origin:
        if not self.is_set:
            return Origin("default", fdl.get_callable(self.record).__name__)
        parts = self.path.split(".")
        above = len(self.table_at.split(".")) if self.table_at else 0
        for length in range(len(parts), above, -1):
            origin = self.table.origins.get(".".join(parts[:length]))
            if origin is not None:
                return origin
        return _PYTHON

    @property
    def table_at(self) -> str:
        """Where the outermost config stands: ``path`` without ``dotted``."""
        return self.path.removesuffix(self.dotted).rstrip(".")

    def keep(self, note: str = "", lost: tuple[Any, Origin] | None = None) -> None:
        """Our side wins."""
        note = "; ".join(filter(None, (self.note, note)))
        self.table.drafts.append(Draft(self.dotted, self.record, self.origin, lost, note))

    def take(self, saved: SavedField, lost: tuple[Any, Origin] | None) -> None:
        """The checkpoint's side wins."""
        setattr(self.record, self.spec.name, saved.value)
        origin = Origin("checkpoint", saved.where)
        self.table.drafts.append(Draft(self.dotted, self.record, origin, lost, self.note))

    def derive_again(self, saved: SavedField, derivation: Derivation) -> None:
        if self.is_set:
            delattr(self.record, self.spec.name)
        expected = (derivation.value, Origin("checkpoint", saved.where))
        origin = Origin("default", _DERIVED)
        self.table.drafts.append(
            Draft(self.dotted, self.record, origin, note=self.note, expected=expected)
        )

    def decide(self, saved: SavedField, derivation: Derivation | None) -> None:
        ours, origin = self.value, self.origin
        is_person = origin.is_person and not (derivation is not None and ours is None)
        is_listed = self.table.is_listed(self.dotted)
        if derivation is not None and saved.value is None:
            saved = saved._replace(value=derivation.value)
        recipe_wins = is_person and (not saved.literal or self.table.on_conflict == "recipe")
        theirs = (saved.value, Origin("checkpoint", saved.where))
        if isinstance(saved.value, Unreadable):
            self._decide_unreadable(saved, is_listed or recipe_wins)
        elif self._is_nested(saved.value) and not is_listed:
            self._go_inside(saved)
        elif is_listed or (recipe_wins and not (saved.literal and same(ours, saved.value))):
            self.keep(lost=theirs)
        elif is_person:
            if not same(ours, saved.value) and self.table.on_conflict == "error":
                self._report_conflict(ours, origin, saved)
            self.take(saved, lost=(ours, origin))
        elif derivation is not None and derivation.is_saved:
            self.derive_again(saved, derivation)
        elif derivation is not None and not self.is_set:
            self.take(saved, lost=(derivation.value, Origin("default", _DERIVED)))
        else:
            self.take(saved, lost=(ours, origin))

    def _is_nested(self, value: Any) -> bool:
        ours = self.value
        return (
            isinstance(value, fdl.Config)
            and isinstance(ours, fdl.Config)
            and fdl.get_callable(value) is fdl.get_callable(ours)
        )

    def _go_inside(self, saved: SavedField) -> None:
        inner = self.value
        setattr(self.record, self.spec.name, inner)
        values = set_in(saved.value)
        where = f"{saved.where}."
        fields = {n: SavedField(v, saved.literal, where + n) for n, v in values.items()}
        self.table.decide(inner, fields, self.path, f"{self.dotted}.")

    def _decide_unreadable(self, saved: SavedField, ours_wins: bool) -> None:
        self.keep("the saved value cannot be read")
        if ours_wins:
            return
        self.table.problems.append(
            Problem(
                "field",
                self.dotted,
                f"the saved config says {self.dotted}={saved.value.shown} ({saved.where}), which "
                f"this field cannot hold: {saved.value.reason}",
                f"Set {self.path} and list {self.dotted!r} in model.override_parent_fields.",
            )
        )

    def _report_conflict(self, ours: Any, origin: Origin, saved: SavedField) -> None:
        mine, theirs = shown(ours), shown(saved.value)
        self.table.problems.append(
            Problem(
                "conflict",
                self.dotted,
                f"{self.path} is {mine!r} ({origin}), but the checkpoint says {theirs!r} "
                f"({saved.where}).",
                f"To keep {mine!r}, list {self.dotted!r} in model.override_parent_fields "
                f"(model.override_parent_fields=[{self.dotted}]); to keep "
                f"{theirs!r}, drop {self.path}. init.on_conflict=recipe or checkpoint decides for "
                "all fields.",
            )
        )


def _in_our_fields(
    known: Mapping[str, Spec], saved: Mapping[str, SavedField]
) -> tuple[dict[str, SavedField], dict[str, str]]:
    """The saved values as our fields hold them, under today's names; and notes on renamed ones."""
    fitting: dict[str, SavedField] = {}
    notes: dict[str, str] = {}
    for spec in known.values():
        names = (spec.name, *spec.marks.renamed_from)
        name = next((name for name in names if name in saved), None)
        if name is None or not spec.init:
            continue
        value, literal, where = saved[name]
        if not isinstance(value, Unreadable):
            try:
                value = fit(spec, value, spec.name)
            except ConfigError as error:
                value = Unreadable(repr(shown(value)), str(error))
        fitting[spec.name] = SavedField(value, literal, where)
        if name != spec.name:
            notes[spec.name] = f"saved as {name!r}"
    return fitting, notes
