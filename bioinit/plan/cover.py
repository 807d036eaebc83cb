"""The checkpoint's side: stored tensors in the canonical space, and what they cover of a target."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch

from bioinit.errors import MappingError
from bioinit.formats.protocol import StoredTensor
from bioinit.keys import SkipPrefix
from bioinit.layout import Box, Dims, Overlap, intersect, numel
from bioinit.mapping import Names, Placed
from bioinit.plan.facts import Copy
from bioinit.plan.wanted import wanted, without_use
from bioinit.targets import Target


class Source(NamedTuple):
    """A box of a canonical tensor in a file, as the stored tensor ``name`` holds it."""

    name: str
    file: int
    offset: int
    box: Box
    dtype: torch.dtype
    add: float = 0.0


class Mismatch(NamedTuple):
    """The shapes of one canonical tensor that disagree, or a rule that does not fit the dims.

    ``name`` is a stored tensor that is a part of it.
    """

    stored: Dims
    wanted: Dims
    reason: str = ""
    name: str = ""


class Cover(NamedTuple):
    """What one spelling of a target finds in the checkpoint.

    ``covered`` counts the target's elements that ``copies`` fill, ``padding`` those that are zero
    by rule; ``others`` are further stored tensors that hold the same elements; ``skipped`` is the
    prefix that took sources away. All of it is about the whole target, into a row-major tensor of
    its shape; ``here`` is the same of the boxes in local memory, where those are not all of it.
    """

    copies: tuple[Copy, ...]
    names: tuple[str, ...]
    covered: int
    others: Mapping[str, tuple[Copy, ...]]
    mismatch: Mismatch | None = None
    skipped: str | None = None
    padding: int = 0
    here: Cover | None = None

    @property
    def local(self) -> Cover:
        """What is found of the elements that lie in local memory."""
        return self.here or self

    def fills(self, target: Target) -> bool:
        """Whether every element of ``target`` gets a value, and shapes agree."""
        done = self.covered + self.padding
        found = bool(self.names) or self.is_zero
        return found and self.mismatch is None and done == numel(target.shape)

    @property
    def is_zero(self) -> bool:
        """Whether all of the target is zero, since the checkpoint's world has no such tensor."""
        return bool(self.padding) and not self.names and not self.covered


_NO_OTHERS: Mapping[str, tuple[Copy, ...]] = {}
_NO_COVER = Cover((), (), 0, _NO_OTHERS)


class Skips:
    """The skip prefixes, and how many keys each has hit."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._prefixes = [SkipPrefix(text) for text in dict.fromkeys(prefixes)]
        self.hits = {prefix.text: 0 for prefix in self._prefixes}
        self._tied: set[str] = set()
        self._untied: set[str] = set()

    def of(self, key: str, *, is_tied: bool = False, is_stored: bool = False) -> str | None:
        """The first prefix that skips ``key``; all that do are counted as hit."""
        first = None
        for prefix in self._prefixes:
            if prefix.matches(key):
                self.hits[prefix.text] += 1
                if not is_stored:
                    (self._tied if is_tied else self._untied).add(prefix.text)
                first = first or prefix.text
        return first

    def tied_only(self, prefix: str) -> bool:
        """Whether the only targets that ``prefix`` matched are tied names."""
        return prefix in self._tied - self._untied


class Sources:
    """Stored weights, placed in the canonical space once: all, or those that can be asked for."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        names: Names,
        spelled: Callable[[str], str],
        skips: Skips,
        targets: Collection[Target] | None = None,
    ) -> None:
        """``targets`` are all that will be asked for, if that is known."""
        self.stored = stored
        self.spelled = spelled
        self.memory = names.memory
        self.disk = names.disk
        self.skipped: dict[str, str] = {}
        self.used: set[str] = set()
        self._asked: set[str] = set()
        self.misfits: dict[str, str] = {}
        """Stored names whose rule does not fit their dims, and why."""
        self.dropped: dict[str, str] = {}
        """Stored names that are known and not needed, and why."""
        self.padding: dict[str, int] = {}
        """How many rows of stored names lie beyond the vocabulary."""
        self._sources: dict[str, list[Source]] = {}
        self._extents: dict[str, Dims] = {}
        self._runs: dict[Box, Overlap | None] = {}
        self._shared: dict[tuple[Box, Dims, Dims, Dims], Overlap | None] = {}
        self._skip_by_canonical: dict[str, str] = {}
        self._left: dict[str, str | None] = {}
        """Stored names that no target can ask for, not placed; the prefix that skips each."""
        converted = {name for c in names.conversions for name in c.sources}
        asked = None if targets is None else wanted(targets, stored, names)
        is_known = without_use(self.disk)
        for name, tensor in stored.items():
            if tensor.kind != "weight":
                continue
            skip = skips.of(name, is_stored=True) if skips.hits else None
            if skip is not None:
                self.skipped[name] = skip
            if name in converted:
                continue
            if asked is not None and spelled(name) not in asked:
                if is_known(spelled(name)):
                    self._note_dropped(name, spelled(name))
                else:
                    self._left[name] = skip
                continue
            self._place(name, tensor, skip)

    def look_at_rest(self, used: Collection[str]) -> None:
        """Note what is wrong with stored tensors that are not ``used`` by anybody.

        After all targets are covered: whoever owns little of a model does not place the rest, and
        has to say of it what a process that owns more would.
        """
        for name, skip in self._left.items():
            if name not in used:
                self._place(name, self.stored[name], skip)
        self._left.clear()

    def _place(self, name: str, tensor: StoredTensor, skip: str | None) -> None:
        spelled = self.spelled(name)
        for piece in tensor.pieces:
            try:
                placed = self.disk.place(spelled, (piece.box,))
            except MappingError as error:
                self.misfits[name] = str(error)
                return
            if not placed:
                self._note_dropped(name, spelled)
                continue
            if placed[0].box is not piece.box:
                self._note_padding(name, spelled, numel(piece.box.sizes), placed)
            for key, box, add in placed:
                _extend(self._extents, key, box)
                if skip is not None:
                    self._skip_by_canonical[key] = skip
                    continue
                source = Source(name, piece.file, piece.offset, box, tensor.dtype, add)
                known = self._sources.get(key)
                if known is None:
                    self._sources[key] = [source]
                else:
                    known.append(source)

    def _note_padding(self, name: str, spelled: str, held: int, placed: list[Placed]) -> None:
        left = held - sum(numel(each.box.sizes) for each in placed)
        rule = self.disk.rule_for(spelled) if left else None
        if rule is not None and rule.fill:
            rows = left // max(1, numel(self.stored[name].shape[1:]))
            self.padding[name] = self.padding.get(name, 0) + rows

    def _note_dropped(self, name: str, spelled: str) -> None:
        rule = self.disk.rule_for(spelled)
        if rule is not None and not rule.parts:
            self.dropped[name] = rule.note

    def cover(self, target: Target, key: str) -> Cover | None:
        """What the checkpoint holds of ``target`` under the name ``key``; None if nothing."""
        if target.is_whole:
            return self._cover(target, key)
        cover = self._cover(_whole(target), key)
        if cover is None or not cover.names:
            return cover
        return cover._replace(here=self._cover(target, key) or _NO_COVER)

    def _cover(self, target: Target, key: str) -> Cover | None:
        try:
            placed = self.memory.place(key, target.boxes)
        except MappingError as error:
            return Cover((), (), 0, {}, Mismatch((), target.shape, str(error)))
        if not placed:
            return None
        self._asked.update([canonical for canonical, _, _ in placed])
        if self._is_zero(key, [canonical for canonical, _, _ in placed]):
            return Cover((), (), 0, _NO_OTHERS, padding=target.held)
        padding = target.held - sum(numel(box.sizes) for _, box, _ in placed)
        if padding:
            rule = self.memory.rule_for(key)
            padding = padding if rule is not None and rule.fill else 0
        if len(placed) == 1 and (cover := self._at_once(*placed[0])) is not None:
            return cover._replace(padding=padding) if padding else cover
        wanted: dict[str, Dims] = {}
        for canonical, box, _ in placed:
            _extend(wanted, canonical, box)
        mismatch = skipped = None
        copies: list[Copy] = []
        others: dict[str, list[Copy]] = {}
        names: dict[str, None] = {}
        covered = 0
        for canonical, box, add in placed:
            extent = self._extents.get(canonical)
            if extent is None:
                continue
            skipped = skipped or self._skip_by_canonical.get(canonical)
            sources = self._sources.get(canonical, ())
            if sources and extent != wanted[canonical]:
                mismatch = mismatch or Mismatch(extent, wanted[canonical], name=sources[0].name)
                if len(extent) != len(wanted[canonical]):
                    continue
            first = sources[0].name if sources else ""
            for source in sources:
                overlap = self._overlap(source.box, box)
                if overlap is None and target.held:
                    continue
                names[source.name] = None
                if overlap is None:
                    continue
                added = source.add - add
                copy = Copy(source.file, source.offset, source.dtype, overlap, added)
                if source.name == first:
                    covered += numel(overlap.sizes)
                    copies.append(copy)
                else:
                    others.setdefault(source.name, []).append(copy)
        self.used.update(names)
        if not names and mismatch is None and skipped is None:
            return None
        return Cover(
            tuple(copies),
            tuple(n for n in names if n not in others),
            covered,
            {name: tuple(held) for name, held in others.items()},
            mismatch,
            skipped,
            padding,
        )

    def leave(self, target: Target) -> None:
        """Note that what ``target`` would be made of is left behind knowingly."""
        try:
            placed = self.memory.place(target.key, _whole(target).boxes)
        except MappingError:
            return
        self._asked.update([canonical for canonical, _, _ in placed or ()])

    def _is_zero(self, key: str, canonical: Iterable[str]) -> bool:
        rule = self.memory.rule_for(key)
        return rule is not None and rule.zero and not any(map(self.disk.spells, canonical))

    def _overlap(self, source: Box, target: Box) -> Overlap | None:
        """What two boxes share. The experts of a layer differ in where they start alone."""
        offsets, sizes, start, strides = target
        shape = (source, offsets, sizes, strides)
        if shape not in self._shared:
            self._shared[shape] = intersect(source, Box(offsets, sizes, 0, strides))
        found = self._shared[shape]
        if found is None or not start:
            return found
        return Overlap(found[0], found[1], found[2], found[3] + start, found[4])

    def _at_once(self, canonical: str, box: Box, add: float) -> Cover | None:
        """The usual case at a tenth of the cost: one source, and its box is the target's."""
        sources = self._sources.get(canonical)
        if sources is None or len(sources) != 1 or sources[0].box != box:
            return None
        name, file, offset, _, dtype, given = sources[0]
        if not any(box.offsets) and self._extents[canonical] != box.sizes:
            return None
        overlap = self._runs.get(box)
        if overlap is None:
            overlap = self._runs[box] = intersect(box, box)
        if overlap is None:
            return None
        self.used.add(name)
        copies = (Copy(file, offset, dtype, overlap, given - add),)
        return Cover(copies, (name,), numel(box.sizes), _NO_OTHERS)

    def unused(self) -> list[str]:
        """Stored weights that no target wanted and no prefix skipped."""
        used, skipped, dropped = self.used, self.skipped, self.dropped
        return [
            name
            for name, tensor in self.stored.items()
            if name not in used
            and tensor.kind == "weight"
            and name not in skipped
            and name not in dropped
        ]

    def unused_parts(self, is_left: Callable[[str], bool]) -> dict[str, list[str]]:
        """Canonical tensors that no target wanted inside of stored ones that are used.

        One tensor may hold all layers, or all experts, and the model have fewer.
        """
        found: dict[str, dict[str, None]] = {}
        for key, sources in self._sources.items():
            if key not in self._asked and not is_left(key):
                for source in sources:
                    if source.name in self.used:
                        found.setdefault(source.name, {})[key] = None
        return {name: list(keys) for name, keys in found.items()}

    def asked_of_many(self) -> set[str]:
        """Canonical tensors that targets wanted, of stored tensors that hold more than one."""
        counts: dict[str, int] = {}
        for sources in self._sources.values():
            for name in {source.name for source in sources}:
                counts[name] = counts.get(name, 0) + 1
        return {
            key
            for key, sources in self._sources.items()
            if key in self._asked and any(counts[source.name] > 1 for source in sources)
        }


def _whole(target: Target) -> Target:
    """``target`` as a process that has all of it describes it."""
    return target if target.is_whole else target._replace(boxes=(Box.contiguous(target.shape),))


def _extend(extents: dict[str, Dims], key: str, box: Box) -> None:
    """Grow the known shape of a canonical tensor so that it holds ``box``."""
    offsets, extent, _, _ = box
    if any(offsets):
        extent = tuple(map(int.__add__, offsets, extent))
    known = extents.get(key)
    if known is None:
        extents[key] = extent
    elif known != extent and len(known) == len(extent):
        extents[key] = tuple(map(max, known, extent))
