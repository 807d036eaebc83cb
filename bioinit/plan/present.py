"""A plan for people and for programs: folded lines, and one JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bioinit.plan.facts import LoadPlan
from bioinit.report import human_bytes, problem_json, render_claims, summary


def document(plan: LoadPlan) -> dict[str, Any]:
    """The JSON that ``plan --json`` prints and that a receipt extends."""
    return {
        **plan.header(),
        "fields": [decision.to_json() for decision in plan.fields],
        "tensors": [claim.to_json() for claim in plan.tensors],
        "unused": [tensor.to_json() for tensor in plan.unused],
        "problems": [problem_json(problem) for problem in plan.problems],
        "files": [
            {"path": path, "bytes": plan.bytes_by_file.get(number, 0), "sha256": None}
            for number, path in enumerate(plan.files)
        ],
        "bytes_to_read": plan.bytes_to_read,
        "memory": {"parameters": plan.memory_parameters, "peak": plan.memory_peak},
        "seconds": plan.seconds,
        "skip_prefixes": dict(plan.hits),
        "notes": list(plan.notes),
    }


def lines(plan: LoadPlan) -> Iterator[str]:
    """What ``plan`` prints: where from, the fields that matter, the claims, the costs, problems."""
    checkpoint = plan.header().get("checkpoint")
    if checkpoint:
        yield (
            f"checkpoint   {checkpoint['path']} ({checkpoint['format']}, "
            f"dialect {checkpoint['dialect'] or 'unknown'}, family {checkpoint['family']}, "
            f"{checkpoint['tensors']} tensors, {human_bytes(checkpoint['bytes'])})"
        )
    else:
        yield "checkpoint   none: every parameter starts from its initializer"
    for note in plan.notes:
        yield f"note         {note}"
    for decision in plan.fields:
        if decision.is_remarkable:
            yield f"field        {decision.render()}"
    yield from render_claims(plan.tensors)
    for tensor in plan.unused:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        of = f"  of it: {', '.join(tensor.folded)}" if tensor.parts else ""
        yield f"unused       {tensor.key}  [{shape} {tensor.dtype}]{of}"
    for prefix, hits in plan.hits.items():
        yield f"skip prefix  {prefix}: {hits} hits"
    reading = sum(1 for size in plan.bytes_by_file.values() if size)
    whole = sum(1 for tensor in plan.unused if not tensor.parts)
    partly = f", {len(plan.unused) - whole} in part" if len(plan.unused) > whole else ""
    yield f"tensors      {summary(plan.tensors)}, {whole} stored but unused{partly}"
    yield (
        f"to read      {human_bytes(plan.bytes_to_read)} from {reading} of {len(plan.files)} files"
    )
    yield (
        f"memory       {human_bytes(plan.memory_parameters)} of weights (gradients and optimizer "
        "come on top), "
        f"{human_bytes(plan.memory_peak)} at peak"
    )
    for problem in plan.problems:
        yield f"PROBLEM      {problem}"
