"""A live model in a dialect that whoever built it does not write.

The same mechanism as a conversion: the model's tensors are stored tensors of files whose bytes are
its memory, the table of its names leads them to the canonical space, and the dialect's own table
spells them from there. Nothing is copied but what a writer asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bioinit import formats
from bioinit.config import InitPolicy, TrainableModelConfig
from bioinit.errors import Problem
from bioinit.families.protocol import Canonical, Family
from bioinit.formats.protocol import Piece, StoredTensor, WriteOptions
from bioinit.layout import Dims
from bioinit.load.stream import Stream
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.plan import LoadPlan, Model
from bioinit.plan import plan as plan_load
from bioinit.plan.spelled import Held, common_dtype, spelled_targets
from bioinit.report import raise_for
from bioinit.save.beside import Beside, beside, put
from bioinit.save.worlds import written_dialect
from bioinit.storage import File, Folder, Journal, Made, in_memory
from bioinit.targets import describe, slots


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

    def problems(self, model: nn.Module) -> tuple[Problem, ...]:
        """What of ``model``, which may be on meta, cannot be written.

        Raises:
            ConfigError: the dialect does not exist for the family, or cannot express a field.
        """
        decided = self._decided(model)
        if not decided.plan.problems:
            self.beside(decided.plan)
        return decided.plan.problems

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

    def write(self, model: nn.Module, folder: Path, max_bytes: int) -> Beside:
        """Write the weights of ``model`` and what is made beside them into ``folder``.

        Returns:
            What lies beside; its files that are copied are left to who calls.

        Raises:
            PlanError: the model holds what the dialect has no word for.
            ConfigError: the dialect cannot express a field of the config.
            StorageError: the file system refused.
        """
        decided = self._decided(model)
        raise_for(decided.plan.problems, "saving has")
        raise_for([*self._not_zero(model, decided)], "saving has")
        side = self.beside(decided.plan)
        live = {slot.key: slot.tensor for slot in slots(model)}
        files = [_memory(key, live[key]) for key in decided.stored]
        stream = Stream(decided.plan, files, decided.stored)
        weights = folder / side.written.weights
        weights.mkdir(parents=True, exist_ok=True)
        options = WriteOptions(
            max_shard_bytes=max_bytes, objects=side.written.objects, common=side.written.common
        )
        write = formats.load(self.format).write
        assert write is not None  # it was asked for by a name that was checked
        with Journal(folder, "") as journal:
            write(weights, stream.outgoing(lambda key: side.written.front + key), options, journal)
        (folder / Journal.NAME).unlink()
        put(folder, side.made)
        return side

    def _decided(self, model: nn.Module) -> _Decided:
        dialect = written_dialect(self.family, self.name, self.to)
        assert self.family.tensors is not None  # it is written
        space = self.family.tensors(self.config)
        source = self.family.names(self.config, model, "hf", {}).memory
        table = Table(dialect.rules(self.config, {}, self.family.body(self.config)))
        stored = _stored(model)
        held = Held(stored, source)
        spelled = table.spelled_out(held.chosen(space))
        planned = plan_load(
            Model(spelled_targets(spelled, table, held), lambda key: "nothing"),
            stored,
            Names(source, table),
            init=InitPolicy(),
        )
        problems = [self._in_words(problem) for problem in planned.problems]
        zeros = []
        for name, shape, dtype, _ in planned.unused:
            kind = held.kind_of(name, space)
            if kind == "zero":
                zeros.append(name)
            elif kind != "computed":
                problems.append(self._homeless(name, shape, dtype, held, space))
        plan = dataclasses.replace(planned, problems=tuple(problems))
        return _Decided(plan, stored, tuple(zeros))

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

    def _not_zero(self, model: nn.Module, decided: _Decided) -> Iterator[Problem]:
        """A world without such a tensor means zeros, and only zeros can be left out for it."""
        live = {slot.key: slot.tensor for slot in slots(model)}
        for name in decided.zeros:
            if torch.count_nonzero(live[name].detach()):
                text = f"{name!r} is not zero, and {self.to} has no such tensor: it would be there."
                yield Problem("unused", name, text, self._cure())


@dataclass(frozen=True)
class _Decided:
    """Which element goes where, out of ``stored``, the model's own tensors; file by file."""

    plan: LoadPlan
    stored: Mapping[str, StoredTensor]
    zeros: tuple[str, ...]


def _stored(model: nn.Module) -> dict[str, StoredTensor]:
    """The tensors of a model as those of files, one file for each that owns memory."""
    found: dict[str, StoredTensor] = {}
    for target in describe(model).values():
        if target.persistent and target.tied_to is None:
            pieces = tuple(Piece(len(found), 0, box) for box in target.boxes)
            found[target.key] = StoredTensor(target.shape, target.dtype, pieces)
    return found


def _memory(key: str, tensor: torch.Tensor) -> Made:
    """The memory of ``tensor``, from its first element to its last, as a file."""
    held = tensor.detach()
    steps = zip(held.shape, held.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in steps) if held.numel() else 0
    flat = torch.as_strided(held, (reach,), (1,)).view(torch.uint8)

    def make(offset: int, size: int) -> memoryview:
        return flat[offset : offset + size].cpu().numpy().data

    return in_memory(key, flat.numel(), make)
