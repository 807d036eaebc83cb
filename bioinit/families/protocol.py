"""The seam for families: what a model is, how its config is spelled, what its tensors are called.

A family owns a config class (in the field's names), one account per saved config of where each of
its fields went, and one table of names per dialect. Tables lead to the family's canonical space
and never to one another, so a dialect is one table and a backend is one table.

A new family is one new file in this folder that defines ``FAMILY``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from bioinit.backends.protocol import Backend
from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.layout import Dims
from bioinit.mapping import Names
from bioinit.record import SavedField, read_fields

Fate = Literal["mapped", "carried", "ignored", "unknown"]


class SourceField(NamedTuple):
    """What became of one field of a saved config: ``fate``, and ``note`` (the new name or why)."""

    name: str
    fate: Fate
    note: str


class ReadFields(NamedTuple):
    """A saved config in our fields, and the account of every field that it had."""

    fields: dict[str, SavedField]
    account: tuple[SourceField, ...]


def read_ours(context: Context, cls: type[TrainableModelConfig]) -> ReadFields:
    """The fields of ``cls`` from a context that bioinit itself wrote for such a config."""
    fields, unknown = read_fields(context.raw, cls, context.where)
    account = [SourceField(name, "mapped", name) for name in fields]
    account += [SourceField(name, "unknown", part) for name, part in unknown.items()]
    return ReadFields(fields, tuple(account))


def of_dialect(context: Context | None, dialect: str) -> Context | None:
    """The saved config of one dialect among those that lie side by side."""
    found = () if context is None else (context, *context.beside)
    return next((c for c in found if c.dialect == dialect), None)


@dataclass(frozen=True)
class Family:
    """One family of models. The name of its file is its name."""

    config: type[TrainableModelConfig] | None
    """The config class; None where the checkpoint decides it (see ``config_for``)."""

    recognizes: Callable[[Context], bool]
    """Whether the saved config describes a model of this family; must not raise."""

    config_for: Callable[[Context | None], type[TrainableModelConfig]]
    """The config class, with the fields that this checkpoint's kind of model has."""

    read_fields: Callable[[Context], ReadFields]

    build: Callable[[TrainableModelConfig], nn.Module]
    """Constructs the module; always called inside ``backend(config).build``."""

    backend: Callable[[TrainableModelConfig], Backend]

    names: Callable[[TrainableModelConfig, nn.Module, str, Mapping[str, Dims]], Names]
    """Tables for a config, its model (on meta), a dialect, and stored names with their shapes."""

    dialect_of: Callable[[Iterable[str]], str | None]
    """Whose spelling these stored names are, or None if nobody's that this family knows."""
