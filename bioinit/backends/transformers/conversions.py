"""transformers' tables of renamed and converted weights, as rules of ours.

transformers renames one key at a time with regular expressions and collects tensors for an
operation while it loads. Here every *template* of stored keys (numbers as wildcards) is renamed
once, with transformers' own function, and the outcome is checked on real keys; operations that
only move elements become views (:mod:`~bioinit.backends.transformers.operations`), the others are
handed over to be run.

The canonical space is the finer side: stored names where several tensors become one, live names
everywhere else. Its tables are stateful and internal to transformers, so fresh ones are asked for
each time and its version is capped.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import core_model_loading as library
from transformers.conversion_mapping import get_model_conversion_mapping

from bioinit.backends.transformers.operations import Held, Many, run
from bioinit.backends.transformers.symbols import Inexpressible, Symbol, Tile, live_ops, stored_ops
from bioinit.keys import Pattern, escape, numbers, template
from bioinit.layout import Dims
from bioinit.mapping import Conversion, Names
from bioinit.mapping import Mapping as Table
from bioinit.rules import Part, Rule, rename

_MARK = 900_001
_STEP = 100  # wider than any shift of an index, so that a shifted marker is not another one
_DIGITS = re.compile(r"(?<!\\)\d")
_STATELESS = (
    library.WeightRenaming,
    library.PrefixChange,
    library.Inkling2IndexOffsetWeightRename,
    library.WeightConverter,
)


@dataclass(frozen=True)
class Renamed:
    """What became of the stored names of one template: ``live`` and the converter pattern, if any.

    ``captures`` says which wildcard of the stored template each wildcard of ``live`` is.
    """

    live: str
    converts: str | None
    captures: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Stored keys that are renamed alike: their pattern, the keys, the shape."""

    pattern: str
    keys: tuple[str, ...]
    shape: Dims
    renamed: Renamed


_fresh: Callable[[Any], list[Any]] = get_model_conversion_mapping


class Library:
    """transformers' fresh transforms for one model, and the names the model has."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.transforms: list[Any] = _fresh(self.model)
        self.converters = [t for t in self.transforms if isinstance(t, library.WeightConverter)]
        self.renamings = [t for t in self.transforms if isinstance(t, library.WeightRenaming)]
        self.live = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        self.alike: dict[str, list[str]] = defaultdict(list)
        for key in self.live:
            self.alike[template(key)].append(key)
        self.converter_of = {p: c for c in self.converters for p in c.source_patterns}
        self.prefix = f"{self.model.base_model_prefix}." if self.model.base_model_prefix else ""

    @property
    def reads_numbers(self) -> bool:
        """Whether some pattern tells one number in a key from another."""
        return any(_DIGITS.search(p) for t in self.transforms for p in t.source_patterns)

    @property
    def keeps_state(self) -> bool:
        """Whether renaming one key may depend on the keys before it."""
        return any(type(t) not in _STATELESS for t in self.transforms)

    def matching(self, pattern: str) -> list[str]:
        """The live keys that ``pattern`` matches."""
        wanted = Pattern(pattern)
        return [k for k in self.alike.get(_kind(pattern), ()) if wanted.match(k) is not None]

    def rename(self, key: str, known: Callable[[str], bool]) -> tuple[str, str | None]:
        """The live name and converter pattern of a stored ``key``, by transformers' own function.

        A name that leads nowhere is left as it is when the model knows it so. A renamed one is also
        tried with the base model's prefix on or off, as transformers does: whoever solves prefixes
        of stored names afterwards sees only the names that no rule changes.
        """
        renamed, pattern = library.rename_source_key(key, self.renamings, self.converters)
        if known(renamed):
            return renamed, pattern
        if self.prefix and key.startswith(self.prefix):  # renamings may be anchored at the start
            inner = key.removeprefix(self.prefix)
            again, converts = library.rename_source_key(inner, self.renamings, self.converters)
            if again != inner and known(self.prefix + again):
                return self.prefix + again, converts
        if self.prefix and renamed != key:
            for tried in (self.prefix + renamed, renamed.removeprefix(self.prefix)):
                if known(tried):
                    return tried, pattern
        if renamed != key and known(key):
            return key, None
        return renamed, pattern


def names(model: nn.Module, stored: Mapping[str, Dims]) -> Names:
    """Both tables for a transformers ``model`` and the stored names, wrapper prefixes removed."""
    table = Library(model)
    disk: list[Rule] = []
    memory: list[Rule] = []
    conversions: list[Conversion] = []
    converted: dict[tuple[int, str], list[Group]] = defaultdict(list)
    for group in _groups(table, stored):
        if group.renamed.converts is None:
            disk.append(rename(group.pattern, group.renamed.live))
        else:
            converter = table.converter_of[group.renamed.converts]
            converted[id(converter), group.renamed.live].append(group)
    for groups in converted.values():
        found = _views(table, groups) or _views_one_by_one(table, groups, stored, conversions)
        disk += found[0]
        memory += found[1]
    anything = rename("**", "**")
    return Names(Table([*disk, anything]), Table([*memory, anything]), tuple(conversions))


def used(model: nn.Module, stored: Collection[str]) -> list[Any]:
    """The transforms that ``stored`` names went through: what saving has to undo."""
    table = Library(model)
    seen: set[str] = set()
    for key in sorted(stored, key=library.dot_natural_key) if table.keeps_state else stored:
        kind = template(key)
        if kind not in seen or table.reads_numbers or table.keeps_state:
            seen.add(kind)
            table.rename(key, table.live.__contains__)
    return [transform for transform in table.transforms if transform.was_used()]


def _groups(table: Library, stored: Mapping[str, Dims]) -> Iterable[Group]:
    by_template: dict[str, list[str]] = defaultdict(list)
    for key in stored:
        by_template[template(key)].append(key)
    if table.keeps_state:
        yield from _one_by_one(table, stored, stored)
        return
    for kind, keys in by_template.items():
        renamed = _renamed(table, kind, keys)
        shapes = {stored[key] for key in keys}
        if renamed is None or (renamed.converts is not None and len(shapes) > 1):
            yield from _one_by_one(table, keys, stored)
        else:
            yield Group(kind, tuple(keys), next(iter(shapes)), renamed)


def _one_by_one(table: Library, keys: Iterable[str], stored: Mapping[str, Dims]) -> Iterable[Group]:
    for key in sorted(keys, key=library.dot_natural_key):
        live, converts = table.rename(key, table.live.__contains__)
        yield Group(escape(key), (key,), stored[key], Renamed(escape(live), converts, ()))


def _renamed(table: Library, kind: str, keys: list[str]) -> Renamed | None:
    """What all of ``keys`` become, or None if they are not renamed alike."""
    count = len(numbers(keys[0]))
    marks = [str(_MARK + _STEP * i) for i in range(count)]
    live, converts = table.rename(_spelled(kind, marks), lambda k: template(k) in table.alike)
    numbered = numbers(live)
    captures = tuple(marks.index(n) for n in numbered if n in marks)
    if converts is None and captures != tuple(range(count)):
        return None  # a wildcard is lost on the way: every key needs its own rule
    pattern = ".".join("*" if s in marks else escape(s) for s in live.split("."))
    renamed = Renamed(pattern, converts, captures)
    if template(live) != kind and kind in table.alike and template(live) in table.alike:
        return None  # both names exist in the model: which one depends on the number
    for key in _samples(keys, everything=table.reads_numbers):
        found = numbers(key)
        expected = _spelled(pattern, [found[i] for i in captures])
        if table.rename(key, lambda k: template(k) in table.alike) != (expected, converts):
            return None
    return renamed


def _samples(keys: list[str], everything: bool) -> Iterable[str]:
    """Keys that show every number at every place, or the first and the last one only."""
    if not everything:
        yield keys[0]
        yield keys[-1]
        return
    seen: set[tuple[int, str]] = set()
    for key in keys:
        places = set(enumerate(numbers(key)))
        if not places <= seen or not places:
            seen |= places
            yield key


def _spelled(pattern: str, captures: list[str]) -> str:
    remaining = iter(captures)
    return ".".join(
        next(remaining) if segment == "*" else segment.replace(r"\*", "*")
        for segment in pattern.split(".")
    )


def _kind(pattern: str) -> str:
    """The template that the keys of ``pattern`` have."""
    return ".".join("*" if segment.isdigit() else segment for segment in pattern.split("."))


def _views(table: Library, groups: list[Group]) -> tuple[list[Rule], list[Rule]] | None:
    """Rules for all layers at once, or None if the groups do not line up or do not move blocks."""
    converts = groups[0].renamed.converts
    assert converts is not None
    converter = table.converter_of[converts]
    collected: dict[str, Held] = {}
    for group in groups:
        pattern = group.renamed.converts
        held = _held(group)
        if held is None or pattern is None or pattern in collected:
            return None
        collected[pattern] = held
    live = groups[0].renamed.live
    sample = next(iter(table.matching(live)), None)
    if sample is None:
        return None
    try:
        return _rules(table, converter, collected, live, sample)
    except Inexpressible:
        return None


def _held(group: Group) -> Held | None:
    """The tensors of a group for one live tensor: one, or one per value of a wildcard."""
    places = [i for i, segment in enumerate(group.pattern.split(".")) if segment == "*"]
    wildcards = range(len(places))
    extra = [i for i in wildcards if i not in group.renamed.captures]
    if group.renamed.captures != tuple(i for i in wildcards if i not in extra):
        return None
    symbol = Symbol.stored(group.pattern, group.shape)
    if not extra:
        return symbol
    if len(extra) > 1:
        return None
    counted = {key.split(".")[places[extra[0]]] for key in group.keys}
    if "0" not in counted:
        return None  # transformers takes them in order, whatever they are numbered
    # A number that is absent leaves a gap for the plan to report; it moves no other.
    return Many(symbol, 1 + max(map(int, counted)), extra[0])


def _rules(
    table: Library, converter: Any, collected: Mapping[str, Held], live: str, sample: str
) -> tuple[list[Rule], list[Rule]]:
    """Rules on both sides for one converter and the live tensors like ``sample``."""
    made = run(converter, collected, sample, table.model)
    targets = _targets(live, sample, made)
    tiles: dict[str, int] = defaultdict(int)
    for symbol in targets.values():
        for tile in symbol.tiles:
            tiles[tile.source] += 1
    disk: dict[str, list[Part]] = defaultdict(list)
    memory: list[Rule] = []
    note = f"{', '.join(map(repr, converter.operations))} of transformers, as views"
    for target, symbol in targets.items():
        shapes = {table.live[key] for key in table.matching(target)}
        if len(shapes) != 1:
            raise Inexpressible(f"the model has {len(shapes)} shapes of {target}")
        shape = shapes.pop()
        parts = []
        for tile in symbol.tiles:
            to = _canonical(table, tile, target, symbol, tiles, disk)
            disk[tile.source].append(Part(to, stored_ops(tile)))
            parts.append(Part(to, live_ops(tile, symbol.shape, shape)))
        memory.append(Rule(target, tuple(parts), note))
    return [Rule(source, tuple(parts), note) for source, parts in disk.items()], memory


def _canonical(
    table: Library,
    tile: Tile,
    target: str,
    symbol: Symbol,
    tiles: Mapping[str, int],
    disk: Mapping[str, list[Part]],
) -> str:
    """The name on the finer side: the stored one, the live one, or a part of the stored one."""
    if tiles[tile.source] == 1 and _kind(tile.source) not in table.alike:
        return tile.source
    counts_keys = any(atom.wildcard is not None for axis in tile.axes for atom in axis.atoms)
    if len(symbol.tiles) == 1 and not counts_keys:
        return target
    return f"{tile.source}.part{len(disk[tile.source])}"


def _targets(live: str, sample: str, made: Mapping[str, Symbol]) -> dict[str, Symbol]:
    """Symbols by the pattern of the live tensor they make; a target pattern is a part of a name."""
    text = next((live.partition(p) for p in made if p in live), None)
    real = next((sample.partition(p) for p in made if p in sample), None)
    if text is None or real is None or any("*" in pattern for pattern in made):
        raise Inexpressible("the converter spells its targets in a way of its own")
    found: dict[str, Symbol] = {}
    for pattern, symbol in made.items():
        target = text[0] + pattern + text[2]
        captures = Pattern(live).match(sample)
        if captures is None or Pattern(target).match(real[0] + pattern + real[2]) != captures:
            raise Inexpressible("the converter numbers its targets in a way of its own")
        found[target] = symbol
    return found


def _views_one_by_one(
    table: Library,
    groups: list[Group],
    stored: Mapping[str, Dims],
    conversions: list[Conversion],
) -> tuple[list[Rule], list[Rule]]:
    """Rules for each live tensor alone; what is not a view is added to ``conversions``."""
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for group in groups:
        for key in group.keys:
            found = numbers(key)
            live = _spelled(group.renamed.live, [found[i] for i in group.renamed.captures])
            if group.renamed.converts is not None:
                sources[live][group.renamed.converts].append(key)
    disk: list[Rule] = []
    memory: list[Rule] = []
    for live, by_pattern in sources.items():
        if live not in table.live:
            continue
        for keys in by_pattern.values():
            keys.sort(key=library.dot_natural_key)
        converter = table.converter_of[next(iter(by_pattern))]
        collected: dict[str, Held] = {
            pattern: [Symbol.stored(escape(key), stored[key]) for key in keys]
            for pattern, keys in by_pattern.items()
        }
        try:
            rules = _rules(table, converter, collected, escape(live), live)
        except Inexpressible as reason:
            conversions.append(_run_on_tensors(table, converter, by_pattern, live, str(reason)))
        else:
            disk += rules[0]
            memory += rules[1]
    return disk, memory


def _run_on_tensors(
    table: Library, converter: Any, by_pattern: Mapping[str, list[str]], live: str, reason: str
) -> Conversion:
    """The conversion that lets transformers' own operations compute ``live`` and its siblings."""
    order = [(pattern, key) for pattern, keys in by_pattern.items() for key in keys]
    fresh = deepcopy(converter)

    def compute(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        running = deepcopy(fresh)
        for (pattern, key), tensor in zip(order, tensors, strict=True):
            running.add_tensor(live, key, pattern, tensor)
        made: dict[str, Any] = running.convert(live, model=table.model, config=table.model.config)
        return {k: value[0] if isinstance(value, list) else value for k, value in made.items()}

    around = next((live.partition(p) for p in converter.target_patterns if p in live), None)
    targets = (
        [live] if around is None else [around[0] + p + around[2] for p in converter.target_patterns]
    )
    text = f"{', '.join(map(repr, converter.operations))} of transformers ({reason})"
    return Conversion(tuple(targets), tuple(key for _, key in order), compute, text)


def saved_names(model: nn.Module, shapes: Mapping[str, Dims]) -> Mapping[str, str] | None:
    """What ``save_pretrained`` calls the tensors that it writes; None if it converts any."""
    whole: Any = model
    left = frozenset(whole._keys_to_ignore_on_save or ())
    live = {k: torch.empty(s, device="meta") for k, s in shapes.items() if k not in left}
    names = {id(tensor): key for key, tensor in live.items()}
    try:
        written = library.revert_weight_conversion(whole, dict(live))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return None  # an operation that looks at values
    found = {names[id(t)]: name for name, t in written.items() if id(t) in names}
    return found if len(found) == len(live) == len(written) else None
