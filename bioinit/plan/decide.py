"""The claim of one target: loaded, skipped, initialized, or a problem with its cure."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch

from bioinit.config import InitPolicy
from bioinit.errors import MappingError, Problem
from bioinit.formats.protocol import StoredTensor
from bioinit.keys import Pattern
from bioinit.layout import Dims, numel
from bioinit.mapping import Conversion, Names
from bioinit.plan.cover import Cover, Mismatch, Skips, Sources
from bioinit.plan.facts import Copy, DtypeRule, Model, TargetPlan
from bioinit.report import Claim, ClaimKind
from bioinit.targets import Target

SKIP_LIST = "model.initial_ckpt_skip_keys_with_these_prefixes"


class Decisions:
    """One decision per target; collects the problems on the way."""

    def __init__(
        self,
        model: Model,
        sources: Sources,
        names: Names,
        skips: Skips,
        init: InitPolicy,
        dtype: DtypeRule,
    ) -> None:
        self.model, self.sources, self.names, self.skips = model, sources, names, skips
        self.init, self.dtype = init, dtype
        self.new = [Pattern(text) for text in init.new]
        self.problems: list[Problem] = []
        self.lacking: list[str] = []
        """Targets of which nothing is stored; similar names are suggested when all are known."""
        self._foreseen: dict[int, Mapping[str, torch.Tensor] | str | None] = {}
        self._common = _common_dtype(sources.stored)

    def about(
        self, target: Target, spellings: Sequence[str], conversion: Conversion | None
    ) -> TargetPlan:
        """The claim of one target; ``spellings`` are its key and the names tied to it."""
        skip = self.skips.of(target.key) if self.skips.hits else None
        if skip is not None:
            self.sources.leave(target)
            return self._unloaded(target, "skipped", f"skip prefix {skip!r}")
        if conversion is not None:
            return self._converted(target, conversion)
        if len(spellings) == 1:
            cover = self.sources.cover(target, target.key)
            if cover is None:
                return self._missing(target, None)
            if cover.fills(target):
                return self._loaded(target, (cover,))
        covers = [c for c in (self.sources.cover(target, key) for key in spellings) if c]
        whole = [c for c in covers if c.fills(target)]
        misfit = next((cover for cover in covers if cover.mismatch is not None), None)
        if misfit is not None and (not whole or self.init.on_mismatch == "error"):
            return self._mismatched(target, misfit)
        if whole:
            return self._loaded(target, whole)
        skip = next((cover.skipped for cover in covers if cover.skipped), None)
        part = next((cover for cover in covers if cover.covered), None)
        if skip is not None and part is not None:
            return self._loaded(target, [part], f"all but skip prefix {skip!r}", needs_init=True)
        if skip is not None:
            return self._unloaded(target, "skipped", f"skip prefix {skip!r}")
        return self._missing(target, part)

    def _loaded(
        self, target: Target, covers: Sequence[Cover], note: str = "", needs_init: bool = False
    ) -> TargetPlan:
        cover = covers[0]
        if cover.is_zero:
            return self._zero(target)
        copies = cover.copies
        stored = (
            (copies[0].dtype,)
            if len(copies) == 1
            else tuple(dict.fromkeys(copy.dtype for copy in copies))
        )
        for dtype in stored:
            if dtype != target.dtype and not _can_hold(target.dtype, dtype):
                return self._wrong_kind(target, cover.names[0], dtype)
        final = self._final_dtype(target, stored)
        rule = self._rule_text(target.key, cover)
        if cover.padding:
            note = "; ".join(filter(None, (note, f"{cover.padding} elements of padding are zero")))
        if note:
            rule = note if rule == "copy" else f"{rule}; {note}"
        claim = Claim(
            target.key,
            target.shape,
            dtype_name(final),
            "loaded",
            rule,
            cover.names,
            copies[0].bytes if len(copies) == 1 else sum(copy.bytes for copy in copies),
            None if stored == (final,) else _cast(stored, final),
            self.model.describe_init(target.key) if needs_init else None,
        )
        equal = () if len(covers) == 1 and not cover.others else _further_copies(covers)
        local = cover.local
        padded = bool(cover.padding) and local.covered < target.held
        return TargetPlan(claim, final, local.copies, equal, None, needs_init, padded)

    def _zero(self, target: Target) -> TargetPlan:
        final = self._final_dtype(target, (self._common or target.dtype,))
        rule = "zero: the checkpoint's world has no such tensor"
        return TargetPlan(claim_of(target, "loaded", rule, final), final, padded=True)

    def _rule_text(self, key: str, cover: Cover) -> str:
        """What happens between the stored names and the live key; ``copy`` if nothing does."""
        spelled = self.sources.spelled(cover.names[0])
        disk, memory = self.names.disk.rule_for(spelled), self.names.memory.rule_for(key)
        if disk is None or memory is None or disk is memory:
            return "copy" if disk is None else disk.text
        if disk.parts == memory.parts:  # the same view on both sides: only the names can differ
            same = disk.pattern_text == memory.pattern_text
            return "copy" if same else f"rename {disk.pattern_text} -> {memory.pattern_text}"
        if not disk.note and not memory.note and "copy" not in (disk.text, memory.text):
            verb = "rename" if disk.is_rename and memory.is_rename else "view"
            return f"{verb} {self._from(cover)} -> {memory.pattern_text}{disk.added}{memory.added}"
        texts = [rule.text for rule in (disk, memory) if rule.text != "copy"]
        return "; ".join(dict.fromkeys(texts)) or "copy"

    def _from(self, cover: Cover) -> str:
        """The patterns of all that is stored of a target, and whether it is more than that."""
        rules = (self.names.disk.rule_for(self.sources.spelled(name)) for name in cover.names)
        patterns = list(dict.fromkeys(rule.pattern_text for rule in rules if rule is not None))
        whole = sum(numel(self.sources.stored[name].shape) for name in cover.names)
        return ("part of " if cover.covered < whole else "") + _alternatives(patterns)

    def _wrong_kind(self, target: Target, name: str, dtype: torch.dtype) -> TargetPlan:
        return self._problem(
            target,
            "dtype",
            f"{target.key} is {dtype_name(target.dtype)}, but {name!r} is stored as "
            f"{dtype_name(dtype)}, and not every such value fits.",
            f"Mend the checkpoint, or skip the prefix in {SKIP_LIST}.",
        )

    def _converted(self, target: Target, conversion: Conversion) -> TargetPlan:
        stored = self.sources.stored
        if any(name not in stored for name in conversion.sources):
            return self._missing(target, None)
        skipped = self.sources.skipped
        skip = next((skipped[name] for name in conversion.sources if name in skipped), None)
        if skip is not None:
            return self._unloaded(target, "skipped", f"skip prefix {skip!r}")
        self.sources.used.update(conversion.sources)
        dtypes = {stored[name].dtype: None for name in conversion.sources}
        reason = self._misfit(target, conversion)
        if reason is not None and self.init.on_mismatch == "init":
            return self._unloaded(target, "initialized", f"init.on_mismatch=init: {reason}")
        if reason is not None:
            return self._problem(
                target,
                "mismatch",
                f"{target.key!r} {shape_text(target.shape)} cannot be converted: {reason}",
                f"Set the field that sizes it to the checkpoint's value, skip its prefix in "
                f"{SKIP_LIST} or set init.on_mismatch=init.",
            )
        final = self._final_dtype(target, tuple(dtypes))
        size = sum(numel(stored[n].shape) * stored[n].dtype.itemsize for n in conversion.sources)
        claim = claim_of(
            target,
            "loaded",
            f"run {conversion.text}",
            final,
            sources=conversion.sources,
            bytes=size,
            cast=_cast(dtypes, final),
        )
        return TargetPlan(claim, final, conversion=conversion)

    def _misfit(self, target: Target, conversion: Conversion) -> str | None:
        """Why what a conversion makes is not ``target``; None if it is, or only a run can tell."""
        if id(conversion) not in self._foreseen:
            stored = [self.sources.stored[name] for name in conversion.sources]
            like = [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in stored]
            try:
                self._foreseen[id(conversion)] = conversion.foresee(like)
            except MappingError as error:
                self._foreseen[id(conversion)] = str(error)
        made = self._foreseen[id(conversion)]
        if made is None or isinstance(made, str):
            return made
        if target.key not in made:
            return f"{conversion.text} does not make it."
        shape, dtype = tuple(made[target.key].shape), made[target.key].dtype
        if shape != target.shape or not _can_hold(target.dtype, dtype):
            return f"{conversion.text} makes {shape_text(shape)} of {dtype_name(dtype)}."
        return None

    def _missing(self, target: Target, part: Cover | None) -> TargetPlan:
        pattern = next((p.text for p in self.new if p.match(target.key) is not None), None)
        if pattern is not None:
            return self._unloaded(target, "initialized", f"init.new {pattern!r}")
        if target.is_buffer and self.model.computed(target.key):
            return self._unloaded(target, "initialized", "computed by the architecture")
        if self.init.on_missing == "init":
            return self._unloaded(target, "initialized", "init.on_missing=init")
        if part is not None:
            what = (
                f"the checkpoint holds {part.covered:,} of the {numel(target.shape):,} elements of "
                f"{target.key!r}, from {', '.join(map(repr, part.names[:3]))}."
            )
        else:
            what = f"the checkpoint lacks {target.key!r} {shape_text(target.shape)}."
            self.lacking.append(target.key)
        return self._problem(
            target,
            "unclaimed",
            what,
            f"If it is new, name it in init.new or skip its prefix in {SKIP_LIST}; "
            "init.on_missing=init accepts whatever is missing.",
        )

    def _mismatched(self, target: Target, cover: Cover) -> TargetPlan:
        mismatch = cover.mismatch
        assert mismatch is not None
        if mismatch.reason:
            return self._problem(
                target,
                "mismatch",
                f"{target.key} {shape_text(target.shape)} does not fit its rule: {mismatch.reason}",
                f"Correct the field that sizes it, or skip its prefix in {SKIP_LIST}.",
            )
        stored, wanted = mismatch.stored, mismatch.wanted
        text = self._unlike(target, mismatch)
        if self.init.on_mismatch == "init":
            return self._unloaded(target, "initialized", f"init.on_mismatch=init: {text}")
        rows_only = len(stored) == len(wanted) and stored[1:] == wanted[1:]
        is_vocab = target.key in self.model.vocab_keys
        if self.init.on_mismatch == "resize" and rows_only and is_vocab:
            grows = wanted[0] > stored[0]
            return self._loaded(target, [cover], f"resized: {text}", needs_init=grows)
        return self._problem(
            target,
            "mismatch",
            f"{target.key!r} {text}.",
            f"Set the field that sizes it to the checkpoint's value, skip its prefix in {SKIP_LIST}"
            + (", set init.on_mismatch=resize," if rows_only and is_vocab else "")
            + " or set init.on_mismatch=init.",
        )

    def _unlike(self, target: Target, mismatch: Mismatch) -> str:
        """The shapes that disagree, as people see them: of the stored tensor and of the target."""
        shape = self.sources.stored[mismatch.name].shape
        said = f"is {shape_text(target.shape)}, but {mismatch.name!r} is stored as "
        said += shape_text(shape)
        if shape != target.shape or mismatch.wanted == target.shape:
            return said
        divided = f"{shape_text(mismatch.wanted)} and {shape_text(mismatch.stored)}"
        return f"{said}, divided otherwise: {divided}"

    def _unloaded(self, target: Target, kind: ClaimKind, rule: str) -> TargetPlan:
        final = self._final_dtype(target, (self._common or target.dtype,))
        init = self.model.describe_init(target.key)
        return TargetPlan(claim_of(target, kind, rule, final, init=init), final, needs_init=True)

    def _problem(self, target: Target, kind: str, message: str, cure: str) -> TargetPlan:
        self.problems.append(Problem(kind, target.key, message, cure))
        return TargetPlan(claim_of(target, "problem", message, target.dtype), target.dtype)

    def _final_dtype(self, target: Target, stored: Sequence[torch.dtype]) -> torch.dtype:
        if not target.dtype.is_floating_point or self.dtype == "module":
            return target.dtype
        pinned = self.model.pinned_dtype(target.key)
        if pinned is not None:
            return pinned
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        final = stored[0] if stored else target.dtype
        for other in stored[1:]:
            final = torch.promote_types(final, other)
        return final


def claim_of(
    target: Target,
    kind: ClaimKind,
    rule: str,
    dtype: torch.dtype,
    *,
    sources: tuple[str, ...] = (),
    bytes: int = 0,
    cast: str | None = None,
    init: str | None = None,
) -> Claim:
    name = dtype_name(dtype)
    return Claim(target.key, target.shape, name, kind, rule, sources, bytes, cast, init)


def _alternatives(patterns: Sequence[str]) -> str:
    """Several patterns as one, ``a.{b,c}.weight``; in a row if they differ in length.

    >>> _alternatives(["l.*.q.weight", "l.*.k.weight"])
    'l.*.{q,k}.weight'
    """
    rows = [pattern.split(".") for pattern in patterns]
    if len({len(row) for row in rows}) != 1:
        return ", ".join(patterns)
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    if sum(len(column) > 1 for column in columns) > 1:
        return ", ".join(patterns)
    return ".".join(c[0] if len(c) == 1 else f"{{{','.join(c)}}}" for c in columns)


def _further_copies(covers: Sequence[Cover]) -> tuple[tuple[str, tuple[Copy, ...]], ...]:
    """Stored duplicates of what the first cover loads, but for those that are the same bytes."""
    whole = _duplicates(covers, covers)
    local = _duplicates(covers, [cover.local for cover in covers])
    kept = (name for name, copies in whole.items() if copies != covers[0].copies)
    return tuple((name, local[name]) for name in kept if local.get(name))


def _duplicates(covers: Sequence[Cover], parts: Sequence[Cover]) -> dict[str, tuple[Copy, ...]]:
    """By the names of ``covers``, the copies of ``parts`` of them."""
    found = dict(parts[0].others)
    for cover, part in zip(covers[1:], parts[1:], strict=True):
        found |= {", ".join(cover.names): part.copies, **part.others}
    return found


def _common_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The floating dtype that most stored elements have; new parameters get it too."""
    counts: dict[torch.dtype, int] = {}
    for tensor in stored.values():
        if tensor.kind == "weight" and tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + numel(tensor.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def _can_hold(wanted: torch.dtype, stored: torch.dtype) -> bool:
    """Floats are cast into floats; integers only where no value can change; nothing else is."""
    if stored.is_floating_point or wanted.is_floating_point:
        return stored.is_floating_point and wanted.is_floating_point
    if torch.bool in (stored, wanted):
        return stored == wanted
    return torch.promote_types(stored, wanted) == wanted


def _cast(stored: Iterable[torch.dtype], final: torch.dtype) -> str | None:
    names = [dtype_name(dtype) for dtype in stored if dtype != final]
    return f"{', '.join(names)} -> {dtype_name(final)}" if names else None


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Dims) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
