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
    refuses others. A field that a config leaves out is taken to mean it, unless the world's
    ``defaults`` say otherwise. One that is not ``written`` goes without saying: older versions of
    that world do not have it.
    """

    values: tuple[Any, ...]
    why: str
    written: bool = True


class Joint(NamedTuple):
    """Fields of theirs that mean fields of ours together, and not one by one.

    ``read`` gets their values (None where nothing is said) and gives ours; ``write`` is the way
    back and gives what it has a word for. Either raises ``ValueError`` for what the other world
    has no word for. Nothing is read where the saved config and the defaults are silent.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class World:
    """How one dialect writes the fields of a family's config.

    ``names`` maps theirs to ours, ``codecs`` converts values by our name. ``only`` holds what is
    fixed, ``lacks`` the fields of ours that this world has no word for, with the values that need
    none. ``ignored`` gives reasons for their fields that describe no model. ``defaults`` are their
    values where a saved config is silent, by their name. ``joint`` comes before ``names``.
    ``needed`` are fields of ours without which there is no model. ``rest`` is the reason why fields
    that nothing here names are ignored; they are carried if it is empty.
    """

    dialect: str
    names: Mapping[str, str]
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    only: Mapping[str, Only] = field(default_factory=dict)
    lacks: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    joint: tuple[Joint, ...] = ()
    needed: tuple[str, ...] = ()
    rest: str = ""

    @property
    def says(self) -> frozenset[str]:
        """Fields of ours that this world has a word for."""
        return frozenset(self.names.values()).union(*(joint.ours for joint in self.joint))

    def read(
        self,
        context: Context,
        more: Mapping[str, SavedField] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> ReadFields:
        """The fields of a saved config, every one accounted for.

        Args:
            context: the saved config.
            more: fields of ours that were learned otherwise; they count where it is silent.
            defaults: their values where it is silent, by their names, before those of the world.

        Raises:
            ConfigError: a value that makes it another model than this family has, or a field that
                nobody can do without is missing.
        """
        data = context.data
        silent = {**self.defaults, **(defaults or {})}
        fields: dict[str, SavedField] = dict(more or {})
        account: list[SourceField] = []
        for theirs, ours in self.names.items():
            if theirs not in data and theirs in silent:
                fields.setdefault(ours, self._saved(theirs, silent[theirs], context, False))
        together: dict[str, Joint] = {}
        for joint in self.joint:
            together |= dict.fromkeys(joint.theirs, joint)
            fields |= self._read_joint(joint, context, silent)
        for theirs in self.only:
            if theirs not in together:
                self._check_only(theirs, data.get(theirs, silent.get(theirs)), context.where)
        for theirs, value in data.items():
            if theirs in together and together[theirs].ours:
                account.append(SourceField(theirs, "mapped", ", ".join(together[theirs].ours)))
            elif theirs in self.names:
                ours = self.names[theirs]
                if value is not None or ours not in fields:
                    fields[ours] = self._saved(theirs, value, context, True)
                account.append(SourceField(theirs, "mapped", ours))
            elif theirs in self.only or theirs in together:
                account.append(SourceField(theirs, "ignored", "the only kind that this family has"))
            elif theirs in self.ignored or self.rest:
                reason = self.ignored.get(theirs, self.rest)
                account.append(SourceField(theirs, "ignored", reason))
            else:
                account.append(SourceField(theirs, "carried", "no field of ours means it"))
        for ours in self.needed:
            if ours not in fields or fields[ours].value is None:
                raise self._missing(ours, context)
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
            if only.written:
                found[theirs] = only.values[0]
        for theirs, ours in self.names.items():
            _, write = self.codecs.get(ours, (None, _same))
            value = getattr(config, ours)
            try:
                found[theirs] = write(value)
            except (KeyError, ValueError, TypeError) as error:
                raise self._unsayable(config, {ours: value}, error) from error
            account.append(SourceField(ours, "mapped", theirs))
        for joint in self.joint:
            meant = {ours: getattr(config, ours) for ours in joint.ours}
            try:
                said = joint.write(meant)
            except ValueError as error:
                raise self._unsayable(config, meant, error) from error
            found.update(said)
            to = ", ".join(said) or "what the class means anyway"
            account += [SourceField(ours, "mapped", to) for ours in joint.ours]
        return found, tuple(account)

    def _read_joint(
        self, joint: Joint, context: Context, silent: Mapping[str, Any]
    ) -> dict[str, SavedField]:
        data = context.data
        stated = [theirs for theirs in joint.theirs if theirs in data]
        if not stated and not any(theirs in silent for theirs in joint.theirs):
            return {}
        values = {theirs: data.get(theirs, silent.get(theirs)) for theirs in joint.theirs}
        try:
            found = joint.read(values)
        except (KeyError, ValueError, TypeError) as error:
            said = ", ".join(f"{k}={v!r:.80}" for k, v in values.items() if v is not None)
            raise ConfigError(
                f"{context.where} says {said}, which this family has no word for ({error}). "
                "Correct the file if that is wrong; otherwise it is a model of another kind."
            ) from error
        where = context.where if stated else f"the class that {context.where} names"
        named = ", ".join(stated or joint.theirs)
        return {k: SavedField(v, bool(stated), f"{where}: {named}") for k, v in found.items()}

    def _missing(self, ours: str, context: Context) -> ConfigError:
        theirs = next((name for name, our in self.names.items() if our == ours), ours)
        named = f", and {context.model} is no class whose defaults are known"
        return ConfigError(
            f"{context.where} does not say {theirs}{named if context.model else ''}. Write it into "
            "that file, or let the config that the writer saved in full lie beside it (NeMo 2: "
            "context/model.yaml)."
        )

    def _unsayable(
        self, config: TrainableModelConfig, values: Mapping[str, Any], error: Exception
    ) -> ConfigError:
        said = ", ".join(f"{name}={value!r:.80}" for name, value in values.items())
        return ConfigError(
            f"{type(config).__name__} has {said}, which {self.dialect} cannot express ({error}). "
            "Convert to another dialect, or change the field if the model was not trained with it."
        )

    def _saved(self, theirs: str, value: Any, context: Context, literal: bool) -> SavedField:
        ours = self.names[theirs]
        read, _ = self.codecs.get(ours, (_same, None))
        where = context.where if literal else f"the class that {context.where} names"
        try:
            return SavedField(read(value), literal, f"{where}: {theirs}")
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{context.where} says {theirs}={value!r:.200}, which is no {ours} that the family "
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
