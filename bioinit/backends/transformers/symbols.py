"""Tensors without values: what reshapes, concatenations and stacks do to where elements lie.

A :class:`Symbol` stands for a tensor that was put together from stored ones. It is a list of
*tiles*; a tile is one stored tensor (or a window of it) and the place it takes. Dims are products
of *atoms*, so a reshape that splits a dim is a regrouping of atoms and a transpose a reordering.
Whatever happened on the way, a tile ends as two views of one canonical tensor, one from either
side, and that is a rule.

What cannot be said this way raises :class:`Inexpressible`; such a conversion is run, not viewed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from bioinit.layout import Dims, numel
from bioinit.rules import Each, Narrow, Operation, Permute, Unflatten


class Inexpressible(Exception):
    """The conversion is not a move of whole blocks; it has to be run on real tensors."""


@dataclass(eq=False, slots=True)
class Atom:
    """A factor of a dim, told apart by identity. ``wildcard`` is set where it counts keys."""

    size: int
    wildcard: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """``atom`` as a part of ``full`` indices, from ``start`` on."""

    atom: Atom
    start: int
    full: int


@dataclass(frozen=True, slots=True)
class Axis:
    """A dim of a symbol as one tile has it: ``atoms``, outermost first, from index ``start`` on."""

    atoms: tuple[Atom, ...]
    start: int = 0

    @property
    def size(self) -> int:
        return numel(tuple(atom.size for atom in self.atoms))


@dataclass(frozen=True, slots=True)
class Tile:
    """A stored tensor, or a window of it, and where it lies in the symbol."""

    source: str
    stored: tuple[tuple[Window, ...], ...]
    axes: tuple[Axis, ...]

    def cut(self, dim: int, low: int, high: int) -> Tile | None:
        """What of the tile lies in [low, high) of ``dim``, counted from ``low``."""
        axis = self.axes[dim]
        first, last = max(low, axis.start), min(high, axis.start + axis.size)
        if last <= first:
            return None
        tile = self
        if last - first != axis.size:
            outer, inner = axis.atoms[0], numel(tuple(a.size for a in axis.atoms[1:]))
            if (first - axis.start) % inner or (last - first) % inner or outer.wildcard is not None:
                raise Inexpressible("a block is cut in the middle of its rows")
            part = Atom((last - first) // inner)
            tile = tile._windowed(outer, part, (first - axis.start) // inner)
            axis = Axis((part, *axis.atoms[1:]))
        return tile.with_axis(dim, Axis(axis.atoms, first - low))

    def with_axis(self, dim: int, *axes: Axis) -> Tile:
        return replace(self, axes=(*self.axes[:dim], *axes, *self.axes[dim + 1 :]))

    def _windowed(self, old: Atom, new: Atom, start: int) -> Tile:
        stored = tuple(
            tuple(Window(new, w.start + start, w.full) if w.atom is old else w for w in windows)
            for windows in self.stored
        )
        return replace(self, stored=stored)

    def split(self, dim: int, sizes: Dims) -> tuple[Tile, list[list[Atom]]]:
        """Group the atoms of ``dim`` into runs of ``sizes``, splitting atoms where a run ends.

        The run of a size 1 may be empty.
        """
        tile, left, runs = self, list(self.axes[dim].atoms), list[list[Atom]]()
        for size in reversed(sizes):
            run: list[Atom] = []
            while (have := numel(tuple(a.size for a in run))) < size:
                if not left or size % have:
                    raise Inexpressible("a dim does not divide into the factors asked for")
                atom, want = left.pop(), size // have
                if atom.size > want:
                    tile, outer, atom = tile._refined(atom, want)
                    left.append(outer)
                run.insert(0, atom)
            if have != size:
                raise Inexpressible("a dim does not divide into the factors asked for")
            runs.insert(0, run)
        if any(atom.size != 1 for atom in left):
            raise Inexpressible("a dim does not divide into the factors asked for")
        runs[0] = left + runs[0]
        return tile, runs

    def _refined(self, old: Atom, inner_size: int) -> tuple[Tile, Atom, Atom]:
        """With ``old`` as an outer atom and an inner one of ``inner_size``."""
        if old.wildcard is not None or old.size % inner_size:
            raise Inexpressible("a dim does not divide into the factors asked for")
        outer, inner = Atom(old.size // inner_size), Atom(inner_size)
        stored: list[tuple[Window, ...]] = []
        for windows in self.stored:
            new: list[Window] = []
            for w in windows:
                if w.atom is not old:
                    new.append(w)
                    continue
                if w.start % inner_size or w.full % inner_size:
                    raise Inexpressible("a window of a stored tensor is cut through its rows")
                new.append(Window(outer, w.start // inner_size, w.full // inner_size))
                new.append(Window(inner, 0, inner_size))
            stored.append(tuple(new))
        return replace(self, stored=tuple(stored)), outer, inner


@dataclass(frozen=True)
class Symbol:
    """A tensor of ``shape`` that consists of ``tiles``."""

    shape: Dims
    tiles: tuple[Tile, ...] = field(default=())

    @classmethod
    def stored(cls, source: str, shape: Dims) -> Symbol:
        """The whole of a stored tensor."""
        atoms = tuple(Atom(size) for size in shape)
        windows = tuple((Window(atom, 0, atom.size),) for atom in atoms)
        return cls(shape, (Tile(source, windows, tuple(Axis((atom,)) for atom in atoms)),))

    def narrow(self, dim: int, start: int, length: int) -> Symbol:
        cut = [tile.cut(dim, start, start + length) for tile in self.tiles]
        return Symbol(_replaced(self.shape, dim, length), tuple(t for t in cut if t is not None))

    def split(self, dim: int, sizes: Sequence[int]) -> list[Symbol]:
        parts, start = [], 0
        for size in sizes:
            parts.append(self.narrow(dim, start, size))
            start += size
        return parts

    def transpose(self, one: int, other: int) -> Symbol:
        order = list(range(len(self.shape)))
        order[one], order[other] = order[other], order[one]
        return Symbol(
            tuple(self.shape[d] for d in order),
            tuple(replace(t, axes=tuple(t.axes[d] for d in order)) for t in self.tiles),
        )

    def swap(self, dim: int, sizes: Dims, order: Dims) -> Symbol:
        """View ``dim`` as factors of ``sizes``, reorder them, and view it as one dim again."""
        tiles = []
        for tile in self.tiles:
            self._needs_whole(tile, dim)
            tile, runs = tile.split(dim, sizes)
            tiles.append(tile.with_axis(dim, Axis(tuple(a for i in order for a in runs[i]))))
        return Symbol(self.shape, tuple(tiles))

    def merge(self, first: int, last: int) -> Symbol:
        """View the dims from ``first`` to ``last`` as one."""
        size = numel(self.shape[first : last + 1])
        tiles = []
        for tile in self.tiles:
            for dim in range(first, last + 1):
                self._needs_whole(tile, dim)
            atoms = tuple(a for axis in tile.axes[first : last + 1] for a in axis.atoms)
            axes = (*tile.axes[:first], Axis(atoms), *tile.axes[last + 1 :])
            tiles.append(replace(tile, axes=axes))
        return Symbol((*self.shape[:first], size, *self.shape[last + 1 :]), tuple(tiles))

    def unmerge(self, dim: int, sizes: Dims) -> Symbol:
        """View ``dim`` as several."""
        tiles = []
        for tile in self.tiles:
            self._needs_whole(tile, dim)
            tile, runs = tile.split(dim, sizes)
            for run in runs:
                if not run:  # a new dim of size 1: the stored tensor gets one as well
                    donor = next((r for r in runs if r), None)
                    if donor is None:
                        raise Inexpressible("a scalar is unflattened")
                    tile, one, donor[0] = tile._refined(donor[0], donor[0].size)
                    run.append(one)
            tiles.append(tile.with_axis(dim, *(Axis(tuple(run)) for run in runs)))
        return Symbol((*self.shape[:dim], *sizes, *self.shape[dim + 1 :]), tuple(tiles))

    def repeated(self, dim: int, count: int, wildcard: int) -> Symbol:
        """``count`` such symbols stacked along a new ``dim``: one per value of a wildcard."""
        each = Atom(count, wildcard)
        return Symbol(
            (*self.shape[:dim], count, *self.shape[dim:]),
            tuple(
                replace(t, axes=(*t.axes[:dim], Axis((each,)), *t.axes[dim:])) for t in self.tiles
            ),
        )

    def unsqueezed(self, dim: int) -> Symbol:
        """With a new ``dim`` of size 1, which the stored tensor gets as well."""
        tiles = []
        for tile in self.tiles:
            if not tile.stored:
                raise Inexpressible("scalars are stacked")
            one = Atom(1)
            stored = ((Window(one, 0, 1), *tile.stored[0]), *tile.stored[1:])
            axes = (*tile.axes[:dim], Axis((one,)), *tile.axes[dim:])
            tiles.append(replace(tile, stored=stored, axes=axes))
        return Symbol((*self.shape[:dim], 1, *self.shape[dim:]), tuple(tiles))

    def _needs_whole(self, tile: Tile, dim: int) -> None:
        if tile.axes[dim].start or tile.axes[dim].size != self.shape[dim]:
            raise Inexpressible("a dim that was put together is reshaped")


def concatenate(symbols: Sequence[Symbol], dim: int) -> Symbol:
    """Symbols one after the other along ``dim``."""
    rank = len(symbols[0].shape)
    if any(len(s.shape) != rank for s in symbols) or not 0 <= dim < rank:
        raise Inexpressible("tensors of different rank are concatenated")
    tiles, start = [], 0
    for symbol in symbols:
        for tile in symbol.tiles:
            axis = tile.axes[dim]
            tiles.append(tile.with_axis(dim, Axis(axis.atoms, axis.start + start)))
        start += symbol.shape[dim]
    return Symbol(_replaced(symbols[0].shape, dim, start), tuple(tiles))


def stored_ops(tile: Tile) -> tuple[Operation, ...]:
    """From the stored tensor to the canonical one: its own atoms, in its own order."""
    ops: list[Operation] = []
    dim = 0
    for windows in tile.stored:
        if len(windows) > 1:
            ops.append(Unflatten(dim, tuple(w.full for w in windows)))
        for window in windows:
            if window.start or window.full != window.atom.size:
                ops.append(Narrow(dim, window.start, window.atom.size))
            dim += 1
    return tuple(ops)


def live_ops(tile: Tile, symbol: Dims, live: Dims) -> tuple[Operation, ...]:
    """From the live tensor to the canonical one.

    ``live`` may have other sizes than the ``symbol`` that the stored tensors make: then the
    windows grow or shrink in proportion, so that the difference shows as one of canonical shapes.
    """
    if len(symbol) != len(live):
        raise Inexpressible(f"the stored tensors make {symbol}, the model has {live}")
    ops: list[Operation] = []
    atoms: list[Atom] = []
    dim = 0
    for axis, made, size in zip(tile.axes, symbol, live, strict=True):
        start, length, factors = _scaled(axis, made, size)
        if length != size:
            ops.append(Narrow(dim, start, length))
        if len(factors) > 1:
            ops.append(Unflatten(dim, factors))
        atoms += axis.atoms
        dim += len(axis.atoms)
    for dim in reversed(range(len(atoms))):
        wildcard = atoms[dim].wildcard
        if wildcard is not None:
            ops.append(Each(dim, wildcard))
            del atoms[dim]
    order = [window.atom for windows in tile.stored for window in windows]
    if {id(a) for a in atoms} != {id(a) for a in order}:
        raise Inexpressible("a dim of the stored tensor went astray")
    dims = tuple(_position(atoms, atom) for atom in order)
    if dims != tuple(range(len(dims))):
        ops.append(Permute(dims))
    return tuple(ops)


def _scaled(axis: Axis, made: int, size: int) -> tuple[int, int, Dims]:
    factors = tuple(atom.size for atom in axis.atoms)
    if made == size:
        return axis.start, axis.size, factors
    scaled = [axis.start * size, axis.size * size]
    if not made or len(factors) > 1 or any(number % made for number in scaled):
        raise Inexpressible(f"the stored tensors make a dim of {made}, the model has {size}")
    return scaled[0] // made, scaled[1] // made, (scaled[1] // made,)


def _position(atoms: Iterable[Atom], wanted: Atom) -> int:
    return next(i for i, atom in enumerate(atoms) if atom is wanted)


def _replaced(shape: Dims, dim: int, size: int) -> Dims:
    return (*shape[:dim], size, *shape[dim + 1 :])
