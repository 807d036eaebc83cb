"""What a plan says of its checkpoint: for people in notes, for programs in its header."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bioinit import families
from bioinit.contexts import Checkpoint
from bioinit.families.protocol import ReadFields
from bioinit.prefixes import Spelling

_LEFTOVERS = "extra"
"""The field for what no field means: nobody misses it."""


def about(checkpoint: Checkpoint | None, family: str | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "dialect": checkpoint.dialect,
        "family": family or families.find(checkpoint.context, checkpoint.tensors),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.bytes,
        "digest": checkpoint.digest,
    }


def notes_on(
    checkpoint: Checkpoint | None,
    spelling: Spelling,
    saved: ReadFields | None = None,
    missing: Sequence[str] = (),
) -> list[str]:
    notes = [spelling.note] if spelling.note else []
    told = [name for name in missing if name != _LEFTOVERS]
    if told:
        notes.append(f"fields that the saved config lacks: {', '.join(told)}")
    unknown = [] if saved is None else [f.name for f in saved.account if f.fate == "unknown"]
    if unknown:
        notes.append(f"fields of the saved config that nobody knows: {', '.join(unknown)}")
    refused = _left_out(checkpoint, "refused")
    if refused:
        notes.append(f"entries left out, since reading them would run code: {refused}")
    notes.extend([] if checkpoint is None else _of_the_readers(checkpoint))
    ignored = _left_out(checkpoint, "ignored")
    if ignored:
        notes.append(f"files left out: {ignored}")
    return notes


def _of_the_readers(checkpoint: Checkpoint) -> Iterator[str]:
    """What is not simply a copy of what is stored, and what nobody can be sure of."""
    yield from _made(checkpoint)
    missing = checkpoint.metadata.get("missing_chunks")
    if missing:
        yield (
            f"{sum(missing.values())} chunks are not stored and have the fill value, in "
            f"{_shown(missing)}"
        )
    deduced = checkpoint.metadata.get("divided_by_shape")
    if deduced:
        yield f"how ranks divided these follows from their shapes alone: {_shown(deduced)}"
    if checkpoint.metadata.get("doubt"):
        yield str(checkpoint.metadata["doubt"])


def _shown(names: Iterable[str], most: int = 5) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _made(checkpoint: Checkpoint) -> Iterator[str]:
    """What is not copied as it lies: how many stored tensors, and what is done for them."""
    ways = [file.how for file in checkpoint.files]
    if not any(ways):
        return
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.kind == "weight":
            for way in {way for piece in tensor.pieces if (way := ways[piece.file])}:
                counts[way] = counts.get(way, 0) + 1
    for way, count in counts.items():
        yield f"made while they are read ({way}): {count} stored tensor{'s' * (count != 1)}"


def _left_out(checkpoint: Checkpoint | None, what: str) -> str:
    """Names and reasons that the readers noted under ``what``; one file or several said so."""
    said = None if checkpoint is None else checkpoint.metadata.get(what)
    parts = said if isinstance(said, tuple) else (said,)
    found = {n: why for part in parts if isinstance(part, Mapping) for n, why in part.items()}
    return ", ".join(f"{name} ({why})" for name, why in found.items())
