"""A live model in a dialect that whoever built it does not write.

The same mechanism as a conversion: the model's tensors are stored tensors of files whose bytes are
its memory, the table of its names leads them to the canonical space, and the dialect's own table
spells them from there. Nothing is copied but what a writer asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bioinit.config import InitPolicy, TrainableModelConfig
from bioinit.errors import Problem
from bioinit.families.protocol import Canonical, Family
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.plan import LoadPlan, Model
from bioinit.plan import plan as plan_load
from bioinit.plan.spelled import Held, common_dtype, spelled_targets
from bioinit.ranks import World
from bioinit.save.beside import Beside, beside
from bioinit.save.shares import Shares
from bioinit.save.worlds import written_dialect
from bioinit.save.writing import Decided, problems_of
from bioinit.storage import File, Folder
from bioinit.targets import Located


@dataclass(frozen=True)
class Across:
    """How a model is written by the tables of its family.

    ``name`` is the family's, ``to`` the dialect and ``format`` how bytes will lie. ``fields`` are
    what only one world has a word for, by dialect; ``files`` go along, out of ``homes``.
    """

    family: Family
    name: str
    config: TrainableModelConfig
    to: str
    format: str
    fields: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, File]
    homes: tuple[Folder, ...]

    def problems(
        self,
        model: nn.Module,
        located: Mapping[str, Located],
        world: World,
    ) -> tuple[Problem, ...]:
        """What of ``model``, which may be on meta, cannot be written. Called by all ranks.

        Raises:
            ConfigError: the dialect does not exist for the family, or cannot express a field.
        """
        return problems_of(self, model, located, world)

    def beside(self, plan: LoadPlan) -> Beside:
        """Everything but weights, context and receipt.

        Raises:
            ConfigError: the dialect cannot express a field of the config.
        """
        return beside(
            written_dialect(self.family, self.name, self.to),
            self.to,
            self.config,
            common_dtype(plan),
            fields=self.fields,
            files=self.files,
            homes=self.homes,
        )

    def decided(self, model: nn.Module, shares: Shares) -> Decided:
        """The plan of the dialect's tensors out of ``shares``."""
        dialect = written_dialect(self.family, self.name, self.to)
        assert self.family.tensors is not None  # it is written
        space = self.family.tensors(self.config)
        stored = shares.stored
        # All ranks must have one table, whatever part of the model each of them has.
        whole = {key: tensor.shape for key, tensor in stored.items()}
        source = self.family.names(self.config, model, "hf", {}, None, whole).memory
        table = Table(dialect.rules(self.config, {}, self.family.body(self.config)))
        held = Held(stored, source)
        spelled = table.spelled_out(held.chosen(space))
        planned = plan_load(
            Model(spelled_targets(spelled, table, held), lambda key: "nothing"),
            stored,
            Names(source, table),
            init=InitPolicy(),
        )
        problems = [self._in_words(problem) for problem in planned.problems]
        zeros: dict[str, Problem] = {}
        for name, shape, dtype, _ in planned.unused:
            kind = held.kind_of(name, space)
            if kind == "zero":
                zeros[name] = self._not_zero(name)
            elif kind != "computed":
                problems.append(self._homeless(name, shape, dtype, held, space))
        plan = dataclasses.replace(planned, problems=tuple(problems))
        return Decided(plan, zeros)

    def _in_words(self, problem: Problem) -> Problem:
        """A problem with the model in place of a checkpoint."""
        message = problem.message
        if problem.kind == "unclaimed":
            message = f"{self.to} has {problem.key!r} in every model, and this one lacks it."
        return dataclasses.replace(problem, message=message, cure=self._cure())

    def _homeless(
        self, name: str, shape: Dims, dtype: str, held: Held, space: Mapping[str, Canonical]
    ) -> Problem:
        known = any(key in space for key in held.by_name.get(name, ()))
        why = f"{self.to} has no word for it" if known else f"it has no home in {self.to}"
        text = f"the model has {name!r} {list(shape)} {dtype}, and {why}."
        return Problem("unused", name, text, self._cure())

    def _cure(self) -> str:
        if self.to != "hf":
            return "Set output.dialect=hf, or choose a model.architecture that the other world has."
        return "Leave model.backend out: transformers builds the model and writes all of it."

    def _not_zero(self, name: str) -> Problem:
        text = f"{name!r} is not zero, and {self.to} has no such tensor: it would be there."
        return Problem("unused", name, text, self._cure())
