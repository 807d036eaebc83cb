"""A conversion that is decided and not begun: what will be written, element by element."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bioinit import collector, families, formats
from bioinit.contexts import Checkpoint
from bioinit.convert.models import check_model_id
from bioinit.convert.options import Options
from bioinit.convert.output import as_it_is, beside
from bioinit.convert.source import Source, describe, find_context, find_family
from bioinit.convert.tables import Planned, plan, plan_as_it_is
from bioinit.convert.work import digest_of, rules_of
from bioinit.convert.zeros import require_zeros
from bioinit.families.protocol import SourceField, Written
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.load.stream import Stream
from bioinit.plan import LoadPlan
from bioinit.plan.spelled import common_dtype
from bioinit.report import raise_for
from bioinit.save import carry, with_receipt
from bioinit.save.beside import Beside, put
from bioinit.save.worlds import writers
from bioinit.storage import Journal

Progress = Callable[[int, int], None]
"""Told how many bytes have been read, and how many there are."""


@dataclass(frozen=True)
class Decided:
    """What will be written of an open checkpoint; no weight has been read for it."""

    source: Source
    options: Options
    given: Mapping[str, Any]
    planned: Planned
    side: Beside

    @property
    def plan(self) -> LoadPlan:
        return self.planned.plan

    @property
    def account(self) -> tuple[SourceField, ...]:
        """What became of every field of the source's saved config."""
        return () if self.source.saved is None else self.source.saved.account

    @property
    def rules(self) -> str | None:
        """A digest of what is done to the bytes of the source, whatever these are and wherever.

        None where nobody can know that it is the same again: functions of a mapping are no data.
        """
        return rules_of(self.source, self.options, self.given, self.plan, self.side)

    def begin(self, progress: Progress | None = None, started: float | None = None) -> Writing:
        """What writes it; the checkpoint stays open meanwhile.

        Raises:
            PlanError: something may be left behind only if it is zero, and is not.
        """
        checkpoint = self.source.checkpoint
        require_zeros(checkpoint, self.planned.zeros)
        stream = Stream(
            self.plan,
            checkpoint.files,
            checkpoint.tensors,
            _counted(progress, self.plan.bytes_to_read),
        )
        tensors = stream.outgoing(lambda key: self.side.written.front + key)
        work = digest_of(self.source, self.options, self.given, self.plan, self.side, tensors)
        return Writing(self, stream, tensors, work, started or time.perf_counter())


@dataclass(frozen=True)
class Writing:
    """A conversion that can be written. ``work`` is one digest of all that decides what it is."""

    decided: Decided
    stream: Stream
    tensors: Sequence[Outgoing]
    work: str
    started: float

    def into(self, folder: Path, journal: Journal) -> dict[str, Any]:
        """Write all of it into ``folder``, which is still hidden, and return the receipt."""
        decided, side = self.decided, self.decided.side
        checkpoint = decided.source.checkpoint
        _write(self.tensors, decided.options, side.written, folder, journal)
        put(folder, side.made)
        carry(folder, side.homes, side.copied)
        return with_receipt(
            folder,
            {
                **decided.plan.to_json(),
                "bytes_read": self.stream.bytes_read,
                "seconds": round(time.perf_counter() - self.started, 6),
                "remarks": list(dict.fromkeys(r for f in checkpoint.files for r in f.remarks)),
                "output": {"dialect": decided.options.to, "format": decided.options.format},
                "source_fields": [field._asdict() for field in decided.account],
                "written_fields": [field._asdict() for field in side.written.account],
            },
            _digested(journal, side.written.weights),
        )


def decide(
    checkpoint: Checkpoint,
    options: Options,
    *,
    family: str | None = None,
    config: str | Path | None = None,
    set: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    tokenizer: str | Path | None = None,
    model_id: str | None = None,
) -> Decided:
    """Decide what ``checkpoint`` becomes; the words are those of :func:`bioinit.convert`.

    Raises:
        PlanError: the source lacks something, or holds what nobody has a place for.
        BioinitError: see its subclasses.
    """
    context = find_context(checkpoint, config)
    name = find_family(checkpoint, context, family)
    given = dict(set or {})
    dialect = families.load(name).dialects.get(options.to)
    if dialect is not None and dialect.partitions:
        given.setdefault(dialect.partitions, options.partitions)
    with collector.paused():
        described = describe(checkpoint, name, context, given, architecture)
        said = () if model_id is None else check_model_id(model_id, described)
        planned, side = _decide(described, options, tokenizer)
        noted = replace(planned.plan, notes=(*planned.plan.notes, *said))
        planned = replace(planned, plan=noted)
    raise_for(planned.plan.problems, "the conversion has")
    return Decided(described, options, given, planned, side)


def _decide(
    source: Source, options: Options, tokenizer: str | Path | None
) -> tuple[Planned, Beside]:
    context = source.context
    is_saved_so = context is not None and options.to in (
        said.dialect for said in (context, *context.beside)
    )
    if is_saved_so and not writers(source.family) and options.to == "hf":
        planned = plan_as_it_is(source, options.dtype, options.drop)
        return planned, as_it_is(source, tokenizer, options.dtype)
    planned = plan(source, options.to, options.dtype, options.drop)
    # Names that do not fit are the better message than a field that the other world lacks.
    raise_for(planned.plan.problems, "the conversion has")
    return planned, beside(source, options.to, tokenizer, common_dtype(planned.plan))


def _write(
    tensors: Sequence[Outgoing], options: Options, written: Written, folder: Path, journal: Journal
) -> None:
    write = formats.load(options.format).write
    assert write is not None  # the options were checked
    weights = folder / written.weights
    weights.mkdir(parents=True, exist_ok=True)
    given = WriteOptions(
        max_shard_bytes=options.max_shard_bytes,
        partitions=options.partitions,
        objects=written.objects,
        common=written.common,
    )
    write(weights, tensors, given, journal)


def _digested(journal: Journal, weights: str) -> dict[str, str]:
    """The digests that a writer noted for its files, by their paths in the output."""
    return {
        f"{weights}/{name}".lstrip("/"): note["sha256"]
        for name, note in journal.notes.items()
        if isinstance(note, dict) and "sha256" in note
    }


def _counted(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def arrived(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return arrived
