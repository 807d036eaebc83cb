"""Start a fine-tune from a checkpoint: one recipe, every parameter accounted for.

>>> import bioinit
>>> record = bioinit.compose("auto/as_saved", ["model.initial_ckpt_path=/ckpt", "init.seed=7"])
>>> record.init.seed
7

Public names are imported when they are first used, so ``import bioinit`` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bioinit.version import __version__

if TYPE_CHECKING:
    from bioinit.config import (
        InitPolicy,
        Output,
        Placement,
        Run,
        TrainableModelConfig,
        derived,
        own,
    )
    from bioinit.contexts import Checkpoint, load_context
    from bioinit.convert import Converted, convert
    from bioinit.errors import (
        AmbiguousFormat,
        BioinitError,
        CheckpointError,
        ConfigError,
        CorruptCheckpoint,
        MappingError,
        PlanError,
        RefusedCheckpoint,
        StorageError,
        UnfinishedCheckpoint,
        UnknownFormat,
    )
    from bioinit.families import open_checkpoint
    from bioinit.initialize import Initialized, initialize, load_weights, plan
    from bioinit.integrations import partial
    from bioinit.mapping import Mapping, Names
    from bioinit.plan import LoadPlan
    from bioinit.recipe import compose
    from bioinit.record import save_context
    from bioinit.report import LoadReport
    from bioinit.rules import Part, Rule, rename
    from bioinit.transforms import transform

__all__ = [
    "AmbiguousFormat",
    "BioinitError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Converted",
    "CorruptCheckpoint",
    "InitPolicy",
    "Initialized",
    "LoadPlan",
    "LoadReport",
    "Mapping",
    "MappingError",
    "Names",
    "Output",
    "Part",
    "Placement",
    "PlanError",
    "RefusedCheckpoint",
    "Rule",
    "Run",
    "StorageError",
    "TrainableModelConfig",
    "UnfinishedCheckpoint",
    "UnknownFormat",
    "__version__",
    "compose",
    "convert",
    "derived",
    "initialize",
    "load_context",
    "load_weights",
    "open_checkpoint",
    "own",
    "partial",
    "plan",
    "rename",
    "save_context",
    "transform",
]

_HOME = {
    name: f"bioinit.{room}"
    for room, names in {
        "config": "InitPolicy Output Placement Run TrainableModelConfig derived own",
        "contexts": "Checkpoint load_context",
        "convert": "Converted convert",
        "errors": "AmbiguousFormat BioinitError CheckpointError ConfigError CorruptCheckpoint "
        "MappingError PlanError RefusedCheckpoint StorageError UnfinishedCheckpoint UnknownFormat",
        "families": "open_checkpoint",
        "initialize": "Initialized initialize load_weights plan",
        "integrations": "partial",
        "mapping": "Mapping Names",
        "plan": "LoadPlan",
        "recipe": "compose",
        "record": "save_context",
        "report": "LoadReport",
        "rules": "Part Rule rename",
        "transforms": "transform",
    }.items()
    for name in names.split()
}


class _Package(ModuleType):
    """A package in which a public name is never hidden by the room of the same name.

    Importing ``bioinit.plan`` makes Python set the attribute ``plan`` to that module; the function
    that people call is in it, under the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "integrations":
        return importlib.import_module("bioinit.integrations")
    if name not in _HOME:
        raise AttributeError(f"module 'bioinit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
