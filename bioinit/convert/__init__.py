"""The same weights in another dialect and format, streaming: no tensor is ever whole in memory.

Everything is decided first: the config in the family's words, what the other world calls each
tensor, and where each element of it lies in the source. Then a writer asks for the output a slab at
a time. The result appears under its name when it is whole; what a killed process left is taken up
again by the next one that wants the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bioinit.convert.decided import Decided, Progress, decide
from bioinit.convert.options import Options
from bioinit.families import open_checkpoint
from bioinit.families.protocol import SourceField
from bioinit.plan import LoadPlan
from bioinit.report import human_bytes, printable, render_claims
from bioinit.storage import Words, require_free, resumable_folder

__all__ = ["Converted", "Decided", "Options", "Progress", "convert", "decide"]

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
        decided = decide(
            checkpoint,
            options,
            family=family,
            config=config,
            set=set,
            architecture=architecture,
            tokenizer=tokenizer,
            model_id=model_id,
        )
        writing = decided.begin(progress, started)
        with resumable_folder(
            destination, writing.work, overwrite=overwrite, keep=keep, words=_WORDS
        ) as (at, journal):
            receipt = writing.into(at, journal)
    return Converted(Path(destination), decided.plan, decided.account, receipt)
