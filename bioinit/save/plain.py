"""A model as its backend writes it: by the backend, or from many ranks in the same names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from bioinit.backends.protocol import Backend, built_class
from bioinit.config import InitPolicy
from bioinit.errors import ConfigError, Problem
from bioinit.families.protocol import Written
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.plan import LoadPlan, Model
from bioinit.plan import plan as plan_load
from bioinit.plan.spelled import whole_target
from bioinit.ranks import World
from bioinit.save.across import Across
from bioinit.save.beside import Beside
from bioinit.save.shares import Shares
from bioinit.save.writing import Decided, problems_of
from bioinit.storage import File, Folder
from bioinit.targets import Located, is_divided, slots

BY_BACKENDS = ("hf", "safetensors")
"""The dialect and the format that backends write themselves. Megatron's writes nothing."""


@dataclass(frozen=True)
class Plain:
    """How a model is written as its backend does it. ``files`` go along, out of ``homes``.

    A backend writes whole models: of one that lies on many ranks, the tensors are written under the
    names that it would give them, or, where it would not write them as they are, by ``tables``.
    """

    backend: Backend
    format: str = BY_BACKENDS[1]
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)
    homes: tuple[Folder, ...] = ()
    tables: Across | None = None

    @property
    def to(self) -> str:
        """The dialect: that of the backend."""
        return BY_BACKENDS[0]

    def is_by_backend(self, model: nn.Module, located: Mapping[str, Located], world: World) -> bool:
        """Whether the backend writes ``model`` itself: a rank has all of it."""
        if self.format != BY_BACKENDS[1]:
            return False
        is_part = bool(located) or any(is_divided(slot.tensor) for slot in slots(model))
        return world.size == 1 or not is_part

    def problems(
        self,
        model: nn.Module,
        located: Mapping[str, Located],
        world: World,
    ) -> tuple[Problem, ...]:
        """What of ``model``, which may be on meta, cannot be written. Called by all ranks."""
        if self.is_by_backend(model, located, world):
            return ()
        return problems_of(self, model, located, world)

    def decided(self, model: nn.Module, shares: Shares) -> Decided:
        """The plan of the model's own tensors, under the names that are written.

        Raises:
            ConfigError: the backend would convert them, and there are no tables.
        """
        shapes = {key: tensor.shape for key, tensor in shares.stored.items()}
        saved_names = self.backend.saved_names
        names = None if saved_names is None else saved_names(model, shapes)
        if names is None and self.tables is not None:
            return self.tables.decided(model, shares)
        if names is None:
            raise ConfigError(
                f"what transformers writes of {built_class(model).__name__} are not its tensors "
                "but what it computes of them, and that takes the whole model on one process, and "
                "output.format=safetensors. Choose a recipe of a named family (`bioinit recipes`)."
            )
        held = {names[key]: tensor for key, tensor in shares.stored.items() if key in names}
        targets = {k: whole_target(k, tensor.shape, tensor.dtype) for k, tensor in held.items()}
        same = Table.identity()
        model_of = Model(targets, lambda key: "nothing")
        return Decided(plan_load(model_of, held, Names(same, same), init=InitPolicy()))

    def beside(self, plan: LoadPlan) -> Beside:
        """What goes along unchanged; the backend writes the rest itself."""
        return Beside(Written({}), {}, self.files, self.homes)
