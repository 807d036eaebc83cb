"""A divided model in the names that its backend gives the tensors when it writes them whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from bioinit.backends.protocol import Backend
from bioinit.config import InitPolicy
from bioinit.errors import ConfigError, Problem
from bioinit.families.protocol import Written
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.plan import LoadPlan, Model
from bioinit.plan import plan as plan_load
from bioinit.plan.spelled import whole_target
from bioinit.ranks import ALONE, World
from bioinit.save.beside import Beside
from bioinit.save.shares import Shares
from bioinit.save.writing import Decided, problems_of
from bioinit.storage import File, Folder
from bioinit.targets import Located

_NOWHERE: Mapping[str, Located] = {}


@dataclass(frozen=True)
class Plain:
    """How a model without tables of a family is written. ``files`` go along, out of ``homes``."""

    backend: Backend
    format: str = "safetensors"
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)
    homes: tuple[Folder, ...] = ()
    to: str = "hf"

    def problems(
        self,
        model: nn.Module,
        located: Mapping[str, Located] = _NOWHERE,
        world: World = ALONE,
    ) -> tuple[Problem, ...]:
        """What of ``model``, which may be on meta, cannot be written. Called by all ranks."""
        return problems_of(self, model, located, world)

    def decided(self, model: nn.Module, shares: Shares) -> Decided:
        """The plan of the model's own tensors, under the names that are written.

        Raises:
            ConfigError: the backend would convert them.
        """
        shapes = {key: tensor.shape for key, tensor in shares.stored.items()}
        names = names_for(self.backend, model, shapes)
        if names is None:
            raise ConfigError(
                f"{type(model).__name__} is divided among processes, and what transformers writes "
                "of it are not its tensors but what it computes of them, whole. Choose a recipe of "
                "a named family (`bioinit recipes`), or save on one process."
            )
        held = {names[key]: tensor for key, tensor in shares.stored.items() if key in names}
        targets = {k: whole_target(k, tensor.shape, tensor.dtype) for k, tensor in held.items()}
        same = Table.identity()
        model_of = Model(targets, lambda key: "nothing")
        return Decided(plan_load(model_of, held, Names(same, same), init=InitPolicy()))

    def beside(self, plan: LoadPlan) -> Beside:
        """What goes along unchanged; the backend writes the rest itself."""
        return Beside(Written({}), {}, self.files, self.homes)

    def not_zero(self, name: str) -> Problem:
        """Nothing is left out for being zero."""
        raise NotImplementedError


def names_for(
    backend: Backend, model: nn.Module, shapes: Mapping[str, Dims]
) -> Mapping[str, str] | None:
    """What ``backend`` calls tensors of ``shapes`` on disk; None where it writes others."""
    return None if backend.saved_names is None else backend.saved_names(model, shapes)
