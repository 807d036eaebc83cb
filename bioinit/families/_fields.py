"""Fields of saved configs that are plain data: which is which of ours, in either direction.

A :class:`World` is one table for one family in one dialect. Every field of a saved config meets one
fate: *mapped* to a field of ours; *ignored*, because it says how something ran and not what the
model is, or because it holds the one value that this family has; *carried*, because no field of
ours means it. A value that would make it another model is refused, on the way in and on the way
out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.protocol import ReadFields, SourceField
from bioinit.record import SavedField

Codec = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""Their value to ours, and ours to theirs."""


class Only(NamedTuple):
    """A field of theirs that has one meaning for this family.

    ``values`` are those that mean it, the one that is written first; ``why`` ends the sentence that
    refuses others. A field that a config leaves out is taken to mean it.
    """

    values: tuple[Any, ...]
    why: str


@dataclass(frozen=True, kw_only=True)
class World:
    """How one dialect writes the fields of a family's config.

    ``names`` maps theirs to ours, ``codecs`` converts values by our name. ``only`` holds what is
    fixed, ``lacks`` the fields of ours that this world has no word for, with the values that need
    none. ``ignored`` gives reasons for their fields that describe no model. ``defaults`` are their
    values where a saved config is silent, by their name.
    """

    dialect: str
    names: Mapping[str, str]
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    only: Mapping[str, Only] = field(default_factory=dict)
    lacks: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def read(self, context: Context, more: Mapping[str, SavedField] | None = None) -> ReadFields:
        """The fields of a saved config, every one accounted for.

        Args:
            context: the saved config.
            more: fields of ours that were learned otherwise; they count where it is silent.

        Raises:
            ConfigError: a value that makes it another model than this family has.
        """
        data = context.data
        fields: dict[str, SavedField] = dict(more or {})
        account: list[SourceField] = []
        for theirs, ours in self.names.items():
            if theirs not in data and theirs in self.defaults:
                fields.setdefault(ours, self._saved(theirs, self.defaults[theirs], context, False))
        for theirs, value in data.items():
            if theirs in self.names:
                ours = self.names[theirs]
                if value is not None or ours not in fields:
                    fields[ours] = self._saved(theirs, value, context, True)
                account.append(SourceField(theirs, "mapped", ours))
            elif theirs in self.only:
                self._check_only(theirs, value, context.where)
                account.append(SourceField(theirs, "ignored", "the only kind that this family has"))
            elif theirs in self.ignored:
                account.append(SourceField(theirs, "ignored", self.ignored[theirs]))
            else:
                account.append(SourceField(theirs, "carried", "no field of ours means it"))
        return ReadFields(fields, tuple(account))

    def write(
        self, config: TrainableModelConfig, carried: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[SourceField, ...]]:
        """The fields of their config, and what became of each field of ours.

        Raises:
            ConfigError: this world cannot express a value.
        """
        for ours, values in self.lacks.items():
            value = getattr(config, ours)
            if value not in values:
                raise ConfigError(
                    f"{type(config).__name__}.{ours} is {value!r}, which {self.dialect} cannot "
                    f"express: it only has {' or '.join(map(repr, values))}. Convert to another "
                    "dialect, or change the field if the model was not trained with it."
                )
        found = dict(carried)
        account = [SourceField(name, "carried", "from the sidecar") for name in carried]
        for theirs, only in self.only.items():
            found[theirs] = only.values[0]
        for theirs, ours in self.names.items():
            _, write = self.codecs.get(ours, (None, _same))
            found[theirs] = write(getattr(config, ours))
            account.append(SourceField(ours, "mapped", theirs))
        return found, tuple(account)

    def _saved(self, theirs: str, value: Any, context: Context, literal: bool) -> SavedField:
        ours = self.names[theirs]
        read, _ = self.codecs.get(ours, (_same, None))
        where = context.where if literal else f"the class that {context.where} names"
        try:
            return SavedField(read(value), literal, f"{where}: {theirs}")
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{context.where} says {theirs}={value!r:.200}, which is no {ours} that this family "
                f"knows ({type(error).__name__}: {error}). Correct the file if that is wrong."
            ) from error

    def _check_only(self, theirs: str, value: Any, where: str) -> None:
        only = self.only[theirs]
        if value is not None and value not in only.values:
            raise ConfigError(
                f"{where} says {theirs}={value!r:.200}, and {only.why}. It would have to be "
                f"{' or '.join(map(repr, only.values))}."
            )


def _same(value: Any) -> Any:
    return value
