"""What a model is: one sibling per family, imported only when it is asked for.

The folder is the list and a file's name is its name; other packages add siblings through the
entry-point group ``bioinit.families``. A person's own config class is a family of its own.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bioinit import backends, contexts
from bioinit.backends.protocol import Backend
from bioinit.config import TrainableModelConfig
from bioinit.contexts import Checkpoint
from bioinit.contexts.protocol import Context
from bioinit.families.protocol import Family, ReadFields, SourceField, read_ours
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.record import SavedField, label, specs
from bioinit.siblings import Siblings

__all__ = [
    "Family",
    "dialect_in",
    "dialect_of",
    "find",
    "is_megatron",
    "load",
    "names",
    "of_config",
    "of_module",
    "open_checkpoint",
]

SIBLINGS = Siblings(__name__, __path__, "FAMILY", Family, "family")
names, load = SIBLINGS.names, SIBLINGS.load
_ANYTHING = "auto"
_NO_SHAPES: Mapping[str, Dims] = {}


def find(context: Context | None, stored: Iterable[str]) -> str | None:
    """The family of a checkpoint: by its saved config, or by its names where it has none.

    A named family comes before ``auto``. Names alone decide only if they fit one family.
    """
    named = [(name, family) for name, family in SIBLINGS.usable() if name != _ANYTHING]
    if context is None:
        keys = tuple(stored)
        fitting = [name for name, family in named if family.dialect_of(keys) is not None]
        return fitting[0] if len(fitting) == 1 else None
    for name, family in (*named, (_ANYTHING, load(_ANYTHING))):
        if family.recognizes(context):
            return name
    return None


def dialect_of(context: Context | None, stored: Collection[str]) -> str | None:
    """Whose spelling the names of a checkpoint are, or None if no family knows it."""
    name = find(context, stored)
    if name is not None:
        return dialect_in(load(name), context, stored)
    if context is not None:
        return None if context.dialect == "bioinit" else context.dialect
    keys = tuple(stored)
    # Families that share their names leave open which it is, and still agree about the spelling.
    agreed = {family.dialect_of(keys) for key, family in SIBLINGS.usable() if key != _ANYTHING}
    agreed.discard(None)
    return agreed.pop() if len(agreed) == 1 else None


def dialect_in(family: Family, context: Context | None, stored: Collection[str]) -> str:
    """Whose spelling stored names are, of the dialects of ``family``.

    Several worlds write the same names, and the saved config says which of them it was. A saved
    config decides about the family even where no name has a mark of its own.
    """
    for said in () if context is None else (context, *context.beside):
        dialect = family.dialects.get(said.dialect)
        if dialect is not None and dialect.spells(stored):
            return said.dialect
    return family.dialect_of(stored) or "hf"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: its headers and its saved config, no weight byte.

    Args:
        path: a local folder or file.

    Raises:
        StorageError: there is nothing at ``path``, or it is not local.
        CheckpointError: what is there cannot be used; the message says why and what to do.
    """
    return contexts.open_checkpoint(path, whose=dialect_of)


def of_config(cls: type[TrainableModelConfig]) -> Family:
    """The family of a config class: the named one that it comes from, or one of its own."""
    for parent in cls.__mro__:
        corridor, _, name = parent.__module__.rpartition(".")
        if corridor == __name__ and name in names():
            family = load(name)
            if family.config is None or cls is family.config:
                return family
            return _subclassed(family, cls)
    return _own(cls)


def of_module(
    module: nn.Module,
) -> tuple[Backend, Callable[[nn.Module, Mapping[str, Dims]], Names] | None]:
    """The backend of a module that exists, and what names its stored tensors; None if they are its.

    A ``transformers`` model gets the naming of ``auto``; whether it is one is asked only where
    transformers is imported already.
    """
    library: Any = sys.modules.get("transformers")
    pretrained = getattr(library, "PreTrainedModel", None)
    if pretrained is not None and isinstance(module, pretrained):
        from bioinit.backends import transformers

        return transformers.BACKEND, transformers.names
    own = backends.load("module")
    if is_megatron(module):
        own = dataclasses.replace(own, located=backends.load("megatron").located)
    return own, None


def is_megatron(module: nn.Module) -> bool:
    """Whether ``module`` is megatron-core's: a model, a stage of one, or a list of such."""
    library: Any = sys.modules.get("megatron.core.transformer.module")
    if library is None:
        return False
    parts = list(module) if isinstance(module, nn.ModuleList) else [module]
    return bool(parts) and all(isinstance(part, library.MegatronModule) for part in parts)


def _subclassed(family: Family, cls: type[TrainableModelConfig]) -> Family:
    """A named family whose config a person extended."""

    def is_its_own(context: Context) -> bool:
        return context.dialect == "bioinit" and context.model == label(cls)

    return dataclasses.replace(
        family,
        config=cls,
        config_for=lambda context: cls,
        recognizes=lambda context: is_its_own(context) or family.recognizes(context),
        read_fields=lambda context, shapes=_NO_SHAPES: (
            read_ours(context, cls) if is_its_own(context) else family.read_fields(context, shapes)
        ),
    )


def _own(cls: type[TrainableModelConfig]) -> Family:
    """The family of a person's own config class: its names are the module's, as they are."""
    return Family(
        config=cls,
        recognizes=lambda context: True,
        config_for=lambda context: cls,
        read_fields=lambda context, shapes=_NO_SHAPES: _read_own(cls, context),
        build=lambda config: config.configure_model(),
        backend=lambda config: backends.load("module"),
        names=lambda config, model, dialect, stored, described=None, whole=None: Names(
            Table.identity(), Table.identity()
        ),
        dialect_of=lambda stored: None,
    )


def _read_own(cls: type[TrainableModelConfig], context: Context) -> ReadFields:
    """Our own saved context in full; of any other saved config, the fields of the same name."""
    if context.dialect == "bioinit":
        return read_ours(context, cls)
    known = specs(cls)
    found: dict[str, SavedField] = {}
    account: list[SourceField] = []
    for name, value in context.data.items():
        if name in known and not known[name].marks.own:
            found[name] = SavedField(value, True, f"{context.where}: {name}")
            account.append(SourceField(name, "mapped", name))
        else:
            account.append(SourceField(name, "ignored", f"{cls.__name__} has no such field"))
    return ReadFields(found, tuple(account))
