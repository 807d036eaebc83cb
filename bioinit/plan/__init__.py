"""Decide, then do: which bytes go where, complete before one weight byte is read.

Stored tensors and live targets are both placed in the canonical space; where their boxes overlap
there is a copy. Every target ends with one claim. What cannot be claimed is a problem with its
cure, and nothing is read while there are problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from bioinit.config import InitPolicy
from bioinit.errors import Problem
from bioinit.formats.protocol import StoredTensor
from bioinit.keys import suggestion, template
from bioinit.layout import numel
from bioinit.mapping import Names
from bioinit.plan.cover import Skips, Sources
from bioinit.plan.decide import SKIP_LIST, Decisions, claim_of, dtype_name, shape_text
from bioinit.plan.evidence import Evidence, unite
from bioinit.plan.facts import (
    STAGING_BYTES,
    Copy,
    DtypeRule,
    LoadPlan,
    Model,
    TargetPlan,
)
from bioinit.plan.reading import bytes_by_file
from bioinit.report import Claim, Unused, human_bytes
from bioinit.storage import worker_count
from bioinit.targets import Target

__all__ = [
    "SKIP_LIST",
    "STAGING_BYTES",
    "Copy",
    "DtypeRule",
    "Evidence",
    "LoadPlan",
    "Model",
    "TargetPlan",
    "plan",
    "unite",
]


T = TypeVar("T")

_NOTHING: frozenset[str] = frozenset()


def plan(
    model: Model,
    stored: Mapping[str, StoredTensor],
    names: Names,
    *,
    init: InitPolicy,
    spelled: Callable[[str], str] = str,
    skip_prefixes: Iterable[str] = (),
    dtype: DtypeRule = "stored",
    notes: Sequence[str] = (),
    is_left: Callable[[str], bool] = _NOTHING.__contains__,
    share: Callable[[Evidence], Evidence] | None = None,
) -> LoadPlan:
    """Claim every target of ``model``.

    Args:
        model: the targets and what their architecture knows of them.
        stored: tensors of the checkpoint, by stored name.
        names: both mappings to the canonical space.
        init: the policies for missing, unused and mismatched tensors.
        spelled: a stored name as the disk dialect spells it, wrapper prefixes taken off.
        skip_prefixes: prefixes of target or stored keys that are left at their initial values.
        dtype: what floating parameters become; others keep their own.
        notes: sentences for people that the plan prints first.
        is_left: whether a canonical tensor is left out knowingly, so that nobody needs to hear of
            it.
        share: what all ranks know, of what this one does; what is concluded from all claims is
            concluded from theirs.
    """
    skips = Skips(skip_prefixes)
    sources = Sources(stored, names, spelled, skips, model.targets.values())
    of_stored = dict(skips.hits)
    decisions = Decisions(model, sources, names, skips, init, dtype)
    plans: dict[str, TargetPlan] = {}
    claims: list[Claim] = []
    spellings: dict[str, list[str]] = {}
    for target in model.targets.values():
        spellings.setdefault(target.tied_to or target.key, []).append(target.key)
    conversions = {target: each for each in names.conversions for target in each.targets}
    for target in model.targets.values():
        if not target.persistent:
            continue
        if target.tied_to is not None:
            skips.of(target.key, is_tied=True)
            claims.append(claim_of(target, "tied", f"tied to {target.tied_to}", target.dtype))
            continue
        planned = decisions.about(target, spellings[target.key], conversions.get(target.key))
        plans[target.key] = planned
        claims.append(planned.claim)
    # A tied name has the dtype of the parameter that owns the memory.
    claims = [
        c._replace(dtype=plans[model.targets[c.key].tied_to or ""].claim.dtype)
        if c.claim == "tied" and model.targets[c.key].tied_to in plans
        else c
        for c in claims
    ]
    said = Evidence(
        tuple(claims),
        sources.used,
        sources.unused_parts(is_left),
        () if share is None else sources.asked_of_many(),
        tuple(decisions.problems),
        tuple(decisions.lacking),
        sources.misfits,
        sources.padding,
    )
    if share is not None and (united := share(said)) is not said:
        said, skips = united, _hits(united.claims, of_stored)
        sources.used.update(said.used)
    sources.look_at_rest(sources.used)
    misfits = _as_stored({**said.misfits, **sources.misfits}, stored)
    padding = _as_stored({**said.padding, **sources.padding}, stored)
    unused = [*_unused(sources, said.parts)]
    if said.lacking:
        said = _with_suggestions(said, [tensor.key for tensor in unused if not tensor.parts])
        plans |= {c.key: plans[c.key]._replace(claim=c) for c in said.claims if c.key in plans}
    problems = [
        *said.problems,
        *_misfits(misfits, stored),
        *_idle(skips, said.claims, stored),
    ]
    if init.on_unused == "error":
        problems.extend(
            Problem(
                "unused",
                tensor.key,
                f"the checkpoint holds {tensor.key!r} {shape_text(tensor.shape)}, "
                f"{_which(tensor)} no parameter wants.",
                _CURE_OF_PARTS
                if tensor.parts
                else f"Skip its prefix in {SKIP_LIST}, or set init.on_unused=report.",
            )
            for tensor in unused
        )
    if sources.dropped:
        notes = (*notes, f"stored and not needed: {_by_kind(sources.dropped)}")
    if padding:
        rows = ", ".join(f"{count} of {name}" for name, count in padding.items())
        notes = (*notes, f"rows beyond the vocabulary are left out: {rows}")
    return _total(model.targets, plans, said.claims, unused, problems, skips, stored, notes)


_CURE_OF_PARTS = (
    "Correct the config field that says how many there are, choose layers with init.layers, or set "
    "init.on_unused=report."
)


def _as_stored(said: Mapping[str, T], stored: Mapping[str, StoredTensor]) -> Mapping[str, T]:
    """What is said of stored tensors, in their order; seldom anything."""
    return {name: said[name] for name in stored if name in said} if len(said) > 1 else said


def _which(tensor: Unused) -> str:
    return f"of which {', '.join(tensor.folded)}" if tensor.parts else "which"


def _hits(claims: Iterable[Claim], of_stored: Mapping[str, int]) -> Skips:
    """The skip prefixes, as they hit the stored names and the targets of ``claims``."""
    skips = Skips(of_stored)
    skips.hits.update(of_stored)
    for claim in claims:
        skips.of(claim.key, is_tied=claim.claim == "tied")
    return skips


def _unused(sources: Sources, parts: Mapping[str, Sequence[str]]) -> Iterator[Unused]:
    """Stored tensors that nobody wants, as a whole or in part."""
    for name in (*sources.unused(), *parts):
        tensor = sources.stored[name]
        yield Unused(name, tensor.shape, dtype_name(tensor.dtype), tuple(parts.get(name, ())))


def _with_suggestions(said: Evidence, unused: Sequence[str]) -> Evidence:
    """Name the stored tensors that those which lack any may have meant."""
    lacking = {key: suggestion(key, unused) for key in said.lacking}
    problems = [
        replace(p, message=f"{p.message} {lacking[p.key]}".strip()) if p.key in lacking else p
        for p in said.problems
    ]
    rules = {p.key: p.message for p in problems if p.key in lacking}
    claims = tuple(c._replace(rule=rules[c.key]) if c.key in rules else c for c in said.claims)
    return said._replace(problems=tuple(problems), claims=claims)


def _total(
    targets: Mapping[str, Target],
    plans: Mapping[str, TargetPlan],
    claims: Sequence[Claim],
    unused: Sequence[Unused],
    problems: Sequence[Problem],
    skips: Skips,
    stored: Mapping[str, StoredTensor],
    notes: Sequence[str],
) -> LoadPlan:
    """Add up bytes and memory."""
    by_file, along = bytes_by_file(c for each in plans.values() for c in each.all_copies())
    parameters = converting = 0
    counted: set[int] = set()
    is_staged = False
    for key, planned in plans.items():
        parameters += targets[key].held * planned.dtype.itemsize
        is_staged = is_staged or not all(c.is_run(planned.dtype) for c in planned.all_copies())
        if planned.conversion is not None and id(planned.conversion) not in counted:
            counted.add(id(planned.conversion))
            # The sources and what the conversion makes of them live side by side for a while.
            converting = max(converting, 2 * planned.claim.bytes)
            for name in planned.conversion.sources:
                for piece in stored[name].pieces:
                    size = numel(piece.box.sizes) * stored[name].dtype.itemsize
                    by_file[piece.file] = by_file.get(piece.file, 0) + size
    if along:
        notes = (*notes, f"{human_bytes(along)} between wanted columns are read along")
    # A buffer holds up to two blocks that overlap in the file.
    staging = worker_count() * 2 * STAGING_BYTES if is_staged else 0
    return LoadPlan(
        targets=plans,
        tensors=tuple(claims),
        unused=tuple(unused),
        problems=tuple(problems),
        hits=skips.hits,
        bytes_by_file=by_file,
        memory_parameters=parameters,
        memory_peak=parameters + converting + staging,
        notes=tuple(notes),
        described=targets,
    )


def _by_kind(dropped: Mapping[str, str]) -> str:
    """Names and reasons, those that differ in numbers alone once."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, why in dropped.items():
        kinds.setdefault((template(name), why), []).append(name)
    return ", ".join(
        f"{names[0] if len(names) == 1 else kind} ({why})" for (kind, why), names in kinds.items()
    )


def _misfits(misfits: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> Iterable[Problem]:
    for name, reason in misfits.items():
        shape = shape_text(stored[name].shape)
        yield Problem(
            "mismatch",
            name,
            f"the stored tensor {name!r} {shape} does not fit its rule: {reason}",
            f"Correct the config field that sizes it, or skip its prefix in {SKIP_LIST}.",
        )


def _idle(
    skips: Skips, claims: Sequence[Claim], stored: Mapping[str, StoredTensor]
) -> Iterable[Problem]:
    """Prefixes that hit nothing, or nothing that can be skipped by itself."""
    for prefix, hits in skips.hits.items():
        if not hits:
            keys = (*(claim.key for claim in claims), *stored)
            heads = {".".join(k.split(".")[:n]) for k in keys for n in (1, 2)}
            yield Problem(
                "prefix",
                prefix,
                f"the skip prefix {prefix!r} matches no parameter and no stored tensor. "
                f"{suggestion(prefix, heads)}".strip(),
                f"Correct it in {SKIP_LIST} or remove it.",
            )
        elif skips.tied_only(prefix):
            yield Problem(
                "prefix",
                prefix,
                f"the skip prefix {prefix!r} matches nothing but tied names, which have no values "
                "of their own to leave out.",
                "Skip the parameter that they are tied to, or untie them in the config.",
            )
