"""Outside tools, one sibling each; and what they share: a run as data that composes where it runs.

A job is a recipe's name and overrides, as text. Built objects do not travel: the record would be
lost on the way, and paths would be judged on the wrong machine.

>>> job = partial("auto/as_saved", ["model.initial_ckpt_path=/ckpt"])
>>> job.recipe, job.overrides
('auto/as_saved', ('model.initial_ckpt_path=/ckpt',))
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

import fiddle as fdl

from bioinit.initialize import Initialized, initialize
from bioinit.recipe import compose

__all__ = ["partial", "run_recipe"]


def __getattr__(name: str) -> ModuleType:
    """A sibling, imported when it is asked for: ``bioinit.integrations.nemo_run``."""
    if name not in {module.name for module in pkgutil.iter_modules(__path__)}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def run_recipe(recipe: str, overrides: Sequence[str] = ()) -> Initialized:
    """Compose a recipe here and now, and initialize its model.

    Raises:
        BioinitError: as :func:`bioinit.compose` and :func:`bioinit.initialize` do.
    """
    return initialize(compose(recipe, overrides))


def partial(recipe: str, overrides: Sequence[str] = ()) -> fdl.Partial[Initialized]:
    """A job for any tool that takes a ``fiddle.Partial``; build it and call it to run it."""
    return fdl.Partial(run_recipe, recipe=recipe, overrides=tuple(overrides))
