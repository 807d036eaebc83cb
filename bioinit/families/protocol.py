"""The seam for families: what a model is, how its config is spelled, what its tensors are called.

A family owns a config class (in the field's names), one account per saved config of where each of
its fields went, and one table of names per dialect. Tables lead to the family's canonical space
and never to one another, so a dialect is one table and a backend is one table.

A new family is one new file in this folder that defines ``FAMILY``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import nn

from bioinit.backends.protocol import Backend
from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.layout import Dims
from bioinit.mapping import Names
from bioinit.record import SavedField, read_fields
from bioinit.rules import Rule

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


class Canonical(NamedTuple):
    """One tensor of a family's canonical space.

    ``kind`` says what a checkpoint without it is worth: ``needed``, it is no model; ``optional``, a
    model without that part (a pooler); ``computed``, nothing, since every world computes it;
    ``zero``, a world that has no such tensor means zeros, and only zeros can be left out for it.
    """

    shape: Dims
    kind: Literal["needed", "optional", "computed", "zero"] = "needed"


class Written(NamedTuple):
    """What a dialect writes beside the weights, and where the weights go."""

    files: Mapping[str, bytes]
    """Contents by path relative to the output: ``config.json``, ``context/io.json``, ..."""
    weights: str = ""
    """The folder of the weights, relative to the output."""
    front: str = ""
    """What stands before every name: ``module.``"""
    objects: Mapping[str, bytes] = {}
    """Stored beside the tensors as bytes, by name: what Megatron calls extra states."""
    common: Mapping[str, Any] = {}
    """Plain data that goes with the tensors."""
    tokenizer: str = ""
    """The folder of the tokenizer's files, relative to the output."""
    account: tuple[SourceField, ...] = ()
    """What became of each field of ours, and of each that was carried along."""


class Read(Protocol):
    """Reads a saved config of one dialect into the fields of the family."""

    def __call__(self, context: Context, shapes: Mapping[str, Dims] = ...) -> ReadFields:
        """Account for every field of ``context``.

        Args:
            context: a saved config that the dialect recognizes.
            shapes: the stored tensors, for what only they can tell (a vocabulary's true size).

        Raises:
            ConfigError: a value that this family has no word for.
        """


class Write(Protocol):
    """Writes a config of the family as this dialect's own saved config."""

    def __call__(
        self, config: TrainableModelConfig, carried: Mapping[str, Any], tokenizer: Collection[str]
    ) -> Written:
        """What lies beside the weights.

        Args:
            config: of the family's class.
            carried: fields of this dialect that an earlier conversion carried along.
            tokenizer: names of the tokenizer's files that the output will hold.

        Raises:
            ConfigError: a field of ``config`` has a value that this world cannot express.
        """


class Rules(Protocol):
    """The table of one dialect: its names and layouts, to the canonical space and back."""

    def __call__(
        self, config: TrainableModelConfig, shapes: Mapping[str, Dims], body: str
    ) -> Sequence[Rule]:
        """The rules, the spelling that is written before its aliases.

        Args:
            config: as the tensors' own saved config has it.
            shapes: the tensors that there are, by key; empty when they are to be written.
            body: what stands before names of the body in the hf dialect, ``"model."`` or ``""``.
        """


@dataclass(frozen=True)
class Dialect:
    """One world's spelling of a family: names and layouts of tensors, and fields of a config.

    ``spells`` says whether stored names look like this dialect's, whatever stands in front of them.
    ``recognizes`` says whether a saved config of the dialect describes this family. ``write`` is
    None where nobody would read what was written.
    """

    rules: Rules
    spells: Callable[[Collection[str]], bool]
    recognizes: Callable[[Context], bool]
    read: Read
    write: Write | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Which field of ours each field of the saved config is, for people who read the tables."""
    says: frozenset[str] = frozenset()
    """Fields of ours that the saved config says; others are carried along beside it."""
    blurs: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Fields of ours of which it says less than we do, and what it says for a value of ours."""
    partitions: str = ""
    """Which field of ours says over how many files tensors are divided, where shapes follow."""


class NamesOf(Protocol):
    """Tables for a model (on meta) and stored names, wrapper prefixes taken off."""

    def __call__(
        self,
        config: TrainableModelConfig,
        model: nn.Module,
        dialect: str,
        stored: Mapping[str, Dims],
        described: TrainableModelConfig | None = ...,
        whole: Mapping[str, Dims] | None = ...,
        /,
    ) -> Names:
        """Both tables.

        Args:
            config: of the model.
            model: the live model, or one on meta.
            dialect: whose spelling the stored names are.
            stored: stored names and shapes.
            described: the config as the checkpoint alone describes it; None if it does not.
            whole: names and shapes of the whole model, where ``model`` is a part of it and who asks
                has them; None to ask ``model``.
        """


@dataclass(frozen=True)
class Family:
    """One family of models. The name of its file is its name."""

    config: type[TrainableModelConfig] | None
    """The config class; None where the checkpoint decides it (see ``config_for``)."""

    recognizes: Callable[[Context], bool]
    """Whether the saved config describes a model of this family; must not raise."""

    config_for: Callable[[Context | None], type[TrainableModelConfig]]
    """The config class, with the fields that this checkpoint's kind of model has."""

    read_fields: Read

    build: Callable[[TrainableModelConfig], nn.Module]
    """Constructs the module; always called inside ``backend(config).build``."""

    backend: Callable[[TrainableModelConfig], Backend]

    names: NamesOf

    dialect_of: Callable[[Iterable[str]], str | None]
    """Whose spelling these stored names are, or None if nobody's that this family knows."""

    dialects: Mapping[str, Dialect] = field(default_factory=dict)
    """The worlds between which this family converts, by name."""

    tensors: Callable[[TrainableModelConfig], Mapping[str, Canonical]] | None = None
    """Every tensor of the canonical space, for a config; None if there are no dialects."""

    apart: Mapping[str, str] = field(default_factory=dict)
    """Families that look like this one and are others, and why, as half a sentence."""

    absent: Mapping[str, str] = field(default_factory=dict)
    """Why there is no dialect of a name that others have: the reason for which it is refused."""

    body: Callable[[TrainableModelConfig], str] = lambda config: ""
    """What stands before names of the body in the hf dialect, for a config."""

    tensor_parallel: Mapping[str, str] = field(default_factory=dict)
    """Module patterns to styles (``colwise``, ``rowwise``), where the architecture has no plan of
    its own for tensor parallelism."""
