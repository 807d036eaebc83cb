"""What a merge comes to: one decision per field, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bioinit.errors import Problem
from bioinit.record import Origin, shown


@dataclass(frozen=True)
class Decision:
    """What became of one field: its value, who gave it, and the value that lost, if it differs.

    ``field`` is dotted below the model's config, ``vision.depth``; ``note`` says what else a reader
    should know.
    """

    field: str
    value: Any
    origin: Origin
    shadowed: tuple[Any, Origin] | None = None
    note: str = ""

    @property
    def is_remarkable(self) -> bool:
        """Whether a person should see it in a plan: somebody wrote it, or something was lost."""
        return self.shadowed is not None or self.origin.is_person

    def to_json(self) -> dict[str, Any]:
        """The entry of ``plan --json`` and of a receipt."""
        lost = None
        if self.shadowed is not None:
            value, origin = self.shadowed
            lost = {"value": shown(value), "origin": origin.by, "where": origin.where}
        entry = {
            "field": self.field,
            "value": shown(self.value),
            "origin": self.origin.by,
            "where": self.origin.where,
            "shadowed": lost,
        }
        return {**entry, "note": self.note} if self.note else entry

    def render(self) -> str:
        """One line for a person."""
        line = f"{self.field} = {shown(self.value)!r} ({self.origin})"
        if self.shadowed is not None:
            line += f", not {shown(self.shadowed[0])!r} ({self.shadowed[1]})"
        return f"{line}; {self.note}" if self.note else line


@dataclass(frozen=True)
class Merged:
    """The merged record, one decision per field, and what keeps it from being used."""

    record: Any
    decisions: tuple[Decision, ...]
    problems: tuple[Problem, ...]
    missing: tuple[str, ...] = ()
    """Fields of ours that the saved config lacks."""
    unknown: tuple[str, ...] = ()
    """Fields of the saved config that ours lacks."""
