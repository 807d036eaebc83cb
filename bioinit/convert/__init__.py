"""The same weights in another dialect and format, streaming: no tensor is ever whole in memory.

Everything is decided first: the config in the family's words, what the other world calls each
tensor, and where each element of it lies in the source. Then a writer asks for the output a slab at
a time. The result appears under its name when it is whole; what a killed process left is taken up
again by the next one that wants the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bioinit import collector, families, formats
from bioinit.convert.models import check_model_id
from bioinit.convert.options import Options
from bioinit.convert.output import as_it_is, beside
from bioinit.convert.source import Source, describe, find_context, find_family
from bioinit.convert.tables import Planned, plan, plan_as_it_is
from bioinit.convert.work import digest_of
from bioinit.convert.zeros import require_zeros
from bioinit.families import open_checkpoint
from bioinit.families.protocol import SourceField, Written
from bioinit.formats.protocol import Outgoing, WriteOptions
from bioinit.load.stream import Stream
from bioinit.plan import LoadPlan
from bioinit.plan.spelled import common_dtype
from bioinit.report import human_bytes, printable, raise_for, render_claims
from bioinit.save import carry, with_receipt
from bioinit.save.beside import Beside, put
from bioinit.save.worlds import writers
from bioinit.storage import Journal, Words, require_free, resumable_folder

__all__ = ["Converted", "convert"]

Progress = Callable[[int, int], None]
"""Told how many bytes have been read, and how many there are."""


_WORDS = Words("destination", "--overwrite")


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    path: Path
    plan: LoadPlan
    account: tuple[SourceField, ...]
    """What became of every field of the source's saved config."""
    receipt: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Converted {str(self.path)!r}: {len(self.plan.targets)} tensors>"

    def to_json(self) -> dict[str, Any]:
        return dict(self.receipt)

    def render(self) -> str:
        """What became of every tensor, and of what of the config; a few figures."""
        said = self.receipt
        found = said["checkpoint"]
        output = said["output"]
        lines = [
            f"source       {found['path']} ({found['format']}, dialect {found['dialect']}, family "
            f"{found['family']}, {found['tensors']} tensors, {human_bytes(found['bytes'])})"
        ]
        lines += [f"note         {note}" for note in self.plan.notes]
        lines += [f"field        {d.render()}" for d in self.plan.fields if d.origin.is_person]
        for field in self.account:
            if field.fate in ("carried", "unknown"):
                lines.append(f"{field.fate:<12} {field.name}: {field.note}")
        lines += render_claims(self.plan.tensors)
        lines += [f"remark       {remark}" for remark in said["remarks"]]
        rate = human_bytes(int(said["bytes_read"] / max(said["seconds"], 1e-9)))
        lines.append(
            f"read         {human_bytes(said['bytes_read'])} in {said['seconds']:.2f} s ({rate}/s)"
        )
        lines.append(
            f"written      {self.path} ({output['format']}, dialect {output['dialect']}, "
            f"{len(self.plan.targets)} tensors, {human_bytes(self.plan.memory_parameters)})"
        )
        return "\n".join(map(printable, lines))


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "hf",
    *,
    format: str | None = None,
    dtype: str | torch.dtype | None = None,
    family: str | None = None,
    config: str | Path | None = None,
    set: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    tokenizer: str | Path | None = None,
    partitions: int | None = None,
    max_shard_size: int | str | None = None,
    model_id: str | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write the checkpoint at ``source`` in another dialect to the folder ``destination``.

    Args:
        source: a checkpoint's folder or file.
        destination: the folder to make.
        to: the dialect: ``hf``, ``nemo2`` or ``neox``, where the family has it.
        format: how bytes lie there; the dialect's usual one if None.
        dtype: what floating tensors become; each keeps its own if None.
        family: of which family the model is, where the source does not say.
        config: a saved config of any kind, where the source has none or another one counts.
        set: fields of our config, on top of what is saved.
        architecture: the class or task that the hf dialect names.
        tokenizer: a folder whose tokenizer goes along in place of the source's.
        partitions: over how many files tensors are divided, for formats that do that; one if None.
        max_shard_size: the most bytes of one file, for formats that have shards: ``"500MiB"``, or a
            number; 5 GB if None.
        model_id: a published model, whose preset the config must be equal to.
        drop: prefixes of stored names that are left behind.
        overwrite: replace a folder that is not empty.
        progress: is told the bytes read so far and the bytes to read.

    Raises:
        PlanError: the source lacks something, or holds what nobody has a place for.
        BioinitError: see its subclasses. Nothing is left under the final name.
    """
    started = time.perf_counter()
    options = Options.of(to, format, dtype, partitions, max_shard_size, tuple(drop))
    with open_checkpoint(source) as checkpoint:
        beside_it = [Path(given).expanduser() for given in (config, tokenizer) if given is not None]
        keep = (checkpoint.path, *(file.path for file in checkpoint.files), *beside_it)
        require_free(destination, overwrite=overwrite, keep=keep, words=_WORDS)
        context = find_context(checkpoint, config)
        name = find_family(checkpoint, context, family)
        given = dict(set or {})
        dialect = families.load(name).dialects.get(to)
        if dialect is not None and dialect.partitions:
            given.setdefault(dialect.partitions, options.partitions)
        with collector.paused():
            described = describe(checkpoint, name, context, given, architecture)
            said = () if model_id is None else check_model_id(model_id, described)
            planned, side = _decide(described, options, tokenizer)
            noted = replace(planned.plan, notes=(*planned.plan.notes, *said))
            planned = replace(planned, plan=noted)
        raise_for(planned.plan.problems, "the conversion has")
        require_zeros(checkpoint, planned.zeros)
        stream = Stream(
            planned.plan,
            checkpoint.files,
            checkpoint.tensors,
            _counted(progress, planned.plan.bytes_to_read),
        )
        account = () if described.saved is None else described.saved.account
        tensors = stream.outgoing(lambda key: side.written.front + key)
        work = digest_of(described, options, given, planned.plan, side, tensors)
        with resumable_folder(destination, work, overwrite=overwrite, keep=keep, words=_WORDS) as (
            at,
            journal,
        ):
            _write(tensors, options, side.written, at, journal)
            put(at, side.made)
            carry(at, side.homes, side.copied)
            receipt = with_receipt(
                at,
                {
                    **planned.plan.to_json(),
                    "bytes_read": stream.bytes_read,
                    "seconds": round(time.perf_counter() - started, 6),
                    "remarks": list(dict.fromkeys(r for f in checkpoint.files for r in f.remarks)),
                    "output": {"dialect": options.to, "format": options.format},
                    "source_fields": [field._asdict() for field in account],
                    "written_fields": [field._asdict() for field in side.written.account],
                },
                _digested(journal, side.written.weights),
            )
    return Converted(Path(destination), planned.plan, account, receipt)


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
