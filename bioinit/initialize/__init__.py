"""The conductor: open, merge, build, plan, load, save. Each verb lives in its own room."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fiddle as fdl
import torch
from torch import nn

from bioinit import collector
from bioinit.config import InitPolicy, Placement, Run, TrainableModelConfig
from bioinit.errors import ConfigError
from bioinit.families import open_checkpoint
from bioinit.initialize.division import Parallelize
from bioinit.initialize.prepare import Prepared, is_shared, prepare, prepare_module
from bioinit.load import execute
from bioinit.load.exchange import is_worth_it
from bioinit.plan import LoadPlan
from bioinit.ranks import ALONE, World, together
from bioinit.ranks.meeting import started
from bioinit.record import build, make_record
from bioinit.report import LoadReport, raise_for
from bioinit.save import save
from bioinit.sides.given import Given
from bioinit.storage import require_free
from bioinit.targets import mesh_device

Progress = Callable[[int, int], None]
"""Told how many bytes have been read, and how many there are."""


@dataclass
class Initialized:
    """A model that is ready to train, and how it came to be."""

    model: nn.Module
    config: TrainableModelConfig
    plan: LoadPlan
    report: LoadReport
    _prepared: Prepared = dataclasses.field(repr=False)
    receipt: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    """What the last :meth:`save` wrote as ``receipt.json``; None until one has ended well."""

    def __repr__(self) -> str:
        return f"<Initialized {type(self.model).__name__}: {self.report!r}>"

    def save(self, path: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the model, its context and the receipt to the folder ``path``, whole or not at all.

        Where several processes started the model, all of them call this, with a file system that
        they share.

        Returns:
            The receipt.

        Raises:
            StorageError: ``path`` holds something that may not be replaced, or touches the
                checkpoint, or cannot be written.
            PlanError: ``output.dialect`` has no place for something that the model holds.
            ConfigError: it has no word for a field of the config.
        """
        prepared = self._prepared
        with nullcontext(ALONE) if prepared.division.is_alone else together() as world:
            self.receipt = save(
                self.model,
                path,
                backend=prepared.backend,
                record=prepared.record,
                receipt=self.report.to_json(),
                origins={f"model.{d.field}": d.origin for d in self.plan.fields},
                across=prepared.across,
                keep=_lying(prepared),
                overwrite=overwrite,
                world=world,
            )
        return self.receipt


def plan(record: fdl.Config[Run], *, parallelize: Parallelize | None = None) -> LoadPlan:
    """Everything but reading weights. Problems are listed in the plan, not raised.

    Where several processes share the model, all of them call this; each is given its own copies
    and everybody's claims.

    Raises:
        BioinitError: the recipe, the checkpoint's headers or its config cannot be used at all.
    """
    with (
        _ranks_of(record) as world,
        prepare(record, world, parallelize, converts=False) as prepared,
    ):
        return prepared.plan


def initialize(
    record: fdl.Config[Run],
    progress: Progress | None = None,
    *,
    parallelize: Parallelize | None = None,
) -> Initialized:
    """Start a model: merge, build, load, initialize what is new, write ``output_dir`` if set.

    Where a launcher started several processes, all of them call this, and each is given its part of
    the model, as ``placement`` says; ``placement.strategy=single`` is a process by itself.

    Args:
        record: what :func:`bioinit.compose` gives.
        progress: is told the bytes read so far and the bytes to read.
        parallelize: divides the model in place of ``placement.strategy`` and ``placement.mesh``: it
            is given the whole model on meta, and divides it in place (``fully_shard``,
            ``parallelize_module``) or returns the module that takes its place.

    Raises:
        PlanError: the plan has problems (no weight byte was read), or loading found some.
        BioinitError: see its subclasses. Nothing is written under a final name. What fails in one
            process is raised in all of them.
    """
    with (
        _ranks_of(record) as world,
        prepare(record, world, parallelize, progress=progress) as prepared,
    ):
        run = prepared.run
        device = _present(run.placement.device, world)
        raise_for(prepared.plan.problems, "the plan has")
        if run.output_dir is not None and world.rank == 0:
            require_free(run.output_dir, overwrite=run.output.overwrite, keep=_lying(prepared))
        is_split = is_worth_it(run.placement.parallel_load, prepared.plan.described, world)
        report = execute(
            prepared.plan,
            prepared.module,
            prepared.files,
            prepared.tensors,
            backend=prepared.backend,
            make=prepared.make,
            init=run.init,
            device=device,
            progress=_counted(progress, _to_read(prepared.plan, is_split)),
            world=world,
            make_whole=prepared.whole,
            parallel=is_split,
        ).raise_for_problems()
        report = dataclasses.replace(report, ranks=_each(world, prepared.plan, report))
        prepared.backend.remember(prepared.module, prepared.spelled_names)
        done = Initialized(prepared.module, prepared.config, prepared.plan, report, prepared)
        if run.output_dir is not None:
            done.save(run.output_dir, overwrite=run.output.overwrite)
        return done


def load_weights(
    module: nn.Module | Sequence[nn.Module],
    path: str | Path,
    *,
    skip_prefixes: Iterable[str] = (),
    mapping: Given | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **policy: Any,
) -> LoadReport:
    """Load a checkpoint into any module, in place.

    A module on meta gets memory; one that has memory keeps it, and its dtypes. Parameters that the
    checkpoint lacks are an error unless a prefix skips them or a policy says otherwise; those of a
    module with memory then keep their values. Where the module is this process's part of a model
    (its parameters are DTensors, or Megatron divided it), all processes that share it call this.

    Args:
        module: a ``transformers`` model, one of megatron-core (or the list of its chunks, where a
            pipeline is interleaved), or a module of your own.
        path: a checkpoint's folder or file.
        skip_prefixes: keys that begin with one of these whole dotted prefixes are left alone.
        mapping: stored names to the module's, as patterns: ``{"body.**": "encoder.**"}``; a name
            that matches none of them stays as it is. Or a :class:`bioinit.Mapping` of rules and
            transforms, or a YAML file of rules.
        device: where what is on meta will live; if None, where the mesh is that it is divided over,
            or else the CPU.
        progress: is told the bytes read so far and the bytes to read.
        **policy: fields of :class:`bioinit.InitPolicy`: ``on_missing="init"``, ``seed=1``, ...

    Raises:
        PlanError: the plan has problems, and nothing was touched; or loading found some.
        BioinitError: see its subclasses; the error says whether the module is as it was.
    """
    if isinstance(skip_prefixes, str):
        raise ConfigError(
            f"skip_prefixes={skip_prefixes!r} is one text, and each of its letters would be a "
            f"prefix. Write a tuple: ({skip_prefixes!r},)."
        )
    init: InitPolicy = build(make_record(InitPolicy, policy, at="load_weights"), at="load_weights")
    root = module if isinstance(module, nn.Module) else nn.ModuleList(module)
    asked = mesh_device(root) if device is None else str(device)
    meeting = together(asked) if is_shared(root) else nullcontext(ALONE)
    with meeting as world, open_checkpoint(path) as checkpoint:
        place = _present(asked, world)
        with collector.paused():
            prepared = prepare_module(root, checkpoint, init, tuple(skip_prefixes), mapping, world)
        raise_for(prepared.plan.problems, "the plan has")
        return execute(
            prepared.plan,
            root,
            prepared.files,
            prepared.tensors,
            backend=prepared.backend,
            make=prepared.make,
            init=init,
            device=place,
            progress=_counted(progress, prepared.plan.bytes_to_read),
            world=world,
        ).raise_for_problems()


def _ranks_of(record: fdl.Config[Run]) -> AbstractContextManager[World]:
    """The ranks that start the model of ``record``, of which this process is one.

    Raises:
        ConfigError: each of several processes would write one folder by itself.
    """
    placement = record.placement
    if getattr(placement, "strategy", None) != "single":
        return together(getattr(placement, "device", None))
    if record.output_dir is not None and (processes := started()) > 1:
        raise ConfigError(
            f"placement.strategy=single is a process by itself, and {processes} were started: all "
            f"of them would write {record.output_dir}. Leave the strategy out, or write ddp for a "
            "whole model on each of them."
        )
    return nullcontext(ALONE)


def _each(world: World, planned: LoadPlan, report: LoadReport) -> tuple[dict[str, Any], ...]:
    """What each rank read, for how long, and into how much memory; nothing for one process."""
    if world.size == 1:
        return ()
    mine = {
        "rank": world.rank,
        "bytes_read": report.bytes_read,
        "seconds": round(report.seconds, 6),
        "memory": {"parameters": planned.memory_parameters, "peak": planned.memory_peak},
    }
    return tuple(world.gathered(mine))


def _present(device: str | None, world: World) -> torch.device:
    """The device called so, of this rank if there are several; the CPU if None.

    Raises:
        ConfigError: this machine has none of that name.
    """
    found = torch.device(Placement(device=device).device or "cpu")
    if found.type == "cpu":
        return found
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "was built without CUDA" if built is None else f"is built for CUDA {built}"
        raise ConfigError(
            f"device={device!r}, but torch sees no GPU here: torch {torch.__version__} {why}. Use "
            "placement.device=cpu, or a machine with a GPU, its driver and a torch for CUDA."
        )
    count = torch.cuda.device_count()
    if found.index is not None and found.index >= count:
        raise ConfigError(
            f"device={device!r}, but torch sees {count} GPU{'s' if count > 1 else ''} here, and "
            f"they are counted from 0. Use cuda:{count - 1} or less."
        )
    if world.size > 1 and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _lying(prepared: Prepared) -> tuple[Path, ...]:
    """Where the checkpoint lies, which no output may touch."""
    checkpoint = prepared.checkpoint
    if checkpoint is None:
        return ()
    return (checkpoint.path, *(file.path for file in checkpoint.files), *prepared.named)


def _to_read(planned: LoadPlan, is_split: bool) -> int:
    """Bytes that this rank reads, about, where replicas share the reading."""
    if not is_split:
        return planned.bytes_to_read
    copies = (
        (len(planned.described[key].replicas) or 1, each.copies)
        for key, each in planned.targets.items()
    )
    return sum(sum(copy.bytes for copy in held) // ways for ways, held in copies)


def _counted(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """Adds up what arrives, for those who want to know how far it is."""
    if progress is None:
        return None
    done = 0

    def arrived(size: int) -> None:
        nonlocal done
        done += size
        progress(done, max(done, total))

    return arrived
