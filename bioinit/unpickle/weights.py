"""Which tensors of an unpickled object are the weights, under which names, and what else is there.

Weights are the object itself if it is a state dict, or what it keeps under ``state_dict``,
``model_state_dict``, ``model`` or ``module``; or, in Megatron's virtual pipelines, under
``model0``, ``model1`` and so on. Tensors anywhere else are state of the optimizer and the like,
named by the dotted way to them. Everything that is no tensor becomes plain metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch

from bioinit.errors import AmbiguousFormat, CorruptCheckpoint, RefusedCheckpoint
from bioinit.layout import Box, Dims, numel, row_major
from bioinit.unpickle.plain import plain
from bioinit.unpickle.values import CURE, Opaque, Refused, StorageRef, TensorRef

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_NOT_WEIGHTS = re.compile(
    r"(.*_)?optim(izer)?s?(_.*)?|(lr_|opt_param_)?schedulers?|.*rng_states?|scaler|callbacks|loops|amp"
)
_CHUNK = re.compile(r"model\d{1,6}")
_MEGATRON = frozenset(("args", "checkpoint_version", "iteration"))
DEEPEST = 64
MOST = 1 << 63
MOST_DIMS = 64
MOST_STEPS = 2_000_000
LETTERS_PER_STEP = 64
MOST_REPEATS = 1000
LARGEST_REPEATED = 64 << 20
"""Strides of 0 make a tensor of a few stored numbers; beyond this it was made to fill memory."""


@dataclass(frozen=True)
class Found:
    """The weights by name, the other tensors by name, and plain data about the rest."""

    weights: dict[str, TensorRef]
    others: dict[str, TensorRef]
    metadata: dict[str, Any] = field(default_factory=dict)


def find_weights(value: Any, where: str) -> Found:
    """The tensors of an unpickled ``value``; ``where`` is how messages call its file.

    Raises:
        RefusedCheckpoint: weights exist only inside an object that would have to be brought to
            life, or depend on a call that is not made.
        AmbiguousFormat: more than one entry could be the state dict.
        CorruptCheckpoint: it is nested without end.
    """
    return _Search(where).run(value)


class Place(NamedTuple):
    """A tensor in a file: its shape, dtype, the byte of element 0, and the view that holds it."""

    shape: Dims
    dtype: torch.dtype
    offset: int
    box: Box


class Placing:
    """Turns :class:`TensorRef` into :class:`Place`, given where each storage lies.

    ``storages`` says, by key, at which byte of the file a storage begins and how many it has.
    """

    def __init__(self, storages: dict[str, tuple[int, int]], where: str) -> None:
        self.storages = storages
        self.where = where
        # Many tensors have the same shape and strides: their box is worked out and checked once.
        self.known: dict[tuple[Any, Any], tuple[Box, int, int]] = {}

    def place(self, name: str, ref: TensorRef) -> Place:
        """Where the tensor called ``name`` lies.

        Raises:
            CorruptCheckpoint: its storage is missing, or too small for it.
        """
        storage, dtype, offset, size, stride = ref
        found = self.storages.get(storage.key)
        if found is None:
            self._corrupt(name, f"lies in the storage {storage.key!r}, which the file lacks")
        first, held = found
        try:
            known = self.known.get((size, stride))
            if known is None:
                known = self.known[size, stride] = self._measure(name, size, stride)
        except TypeError:
            self._corrupt(name, "has sizes and strides that cannot be")
        box, reach, elements = known
        item = dtype.itemsize
        if storage.view is not None:
            skipped, length = storage.view
            inside = (skipped + length) * storage.dtype.itemsize
            if inside > held:
                self._corrupt(name, f"lies in a view that ends at byte {inside} of {held}")
            first += skipped * storage.dtype.itemsize
            held = length * storage.dtype.itemsize
        if type(offset) is not int or not 0 <= offset < MOST:
            self._corrupt(name, "does not say where in its storage it begins")
        if reach and (offset + reach) * item > held:
            self._corrupt(
                name,
                f"takes {reach} elements of {item} bytes from element {offset} on, but its "
                f"storage {storage.key!r} has {held} bytes",
            )
        if reach * MOST_REPEATS < elements and elements * item > LARGEST_REPEATED:
            self._corrupt(name, f"repeats {reach} stored elements as {elements}")
        return Place(box.sizes, dtype, first + offset * item, box)

    def _measure(self, name: str, size: Any, stride: Any) -> tuple[Box, int, int]:
        """The box of these sizes and strides, how many elements it reaches over, and has."""
        whole = type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
        if not whole or not all(type(n) is int and 0 <= n < MOST for n in (*size, *stride)):
            raise TypeError("sizes and strides are not numbers")
        if len(size) > MOST_DIMS:
            raise TypeError("more dims than there can be")
        if numel(tuple(n for n in size if n)) >= MOST:
            raise TypeError("more elements than there can be")
        if 0 in size:
            return Box.contiguous(size), 0, 0
        reach = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # The stride of a dim of size 1 means nothing, and torch writes any number there.
        usual = row_major(size)
        steps = tuple(u if n == 1 else s for n, s, u in zip(size, stride, usual, strict=True))
        return Box((0,) * len(size), size, 0, steps), reach, numel(size)

    def _corrupt(self, name: str, what: str) -> NoReturn:
        raise CorruptCheckpoint(
            f"{self.where} is damaged: tensor {name!r} {what}. Fetch or write it again."
        )


class _Search:
    """One walk over an unpickled object. Counts its steps: a small pickle can mean a huge tree."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.steps = 0
        self.refused: dict[str, str] = {}
        self.inert: dict[str, str] = {}

    def run(self, value: Any) -> Found:
        root = _as_mapping(value)
        if root is None:
            return self._without_names(value)
        path, chosen = self._state_dict(root)
        weights: dict[str, TensorRef] = {}
        others: dict[str, TensorRef] = {}
        is_virtual = not path and "model0" in root and not _MEGATRON.isdisjoint(root)
        for key, entry in chosen.items():
            name = str(key)
            aside = not path and (
                _NOT_WEIGHTS.fullmatch(name) is not None
                or (is_virtual and _CHUNK.fullmatch(name) is None)
            )
            into = others if aside else weights
            if type(entry) is TensorRef:
                _add(into, name, entry, self.where)
            elif not aside and self._is_inert(entry, name):
                others.update(self._tensors(entry, name, aside=True))
            else:
                for inner, ref in self._tensors(entry, name, aside=aside):
                    _add(into, inner, ref, self.where)
        if self.inert and not weights:
            name, cls = next(iter(self.inert.items()))
            self._refuse(
                f"the tensors under {name!r} are inside an object of the class {cls}, which is not "
                "brought to life"
            )
        outer = root
        for key in path:
            for name, entry in outer.items():
                if name != key:
                    others.update(self._tensors(entry, str(name), aside=True))
            outer = _as_mapping(outer[key]) or {}
        for name in others.keys() & weights.keys():
            others[f"{name} (beside the state dict)"] = others.pop(name)
        return Found(weights, others, self._metadata(root, path))

    def _without_names(self, value: Any) -> Found:
        if isinstance(value, Refused):
            self._refuse(f"it is what a call of {value.module}.{value.name} would return")
        if isinstance(value, Opaque) and self._holds_tensor(value):
            self._refuse(
                f"it is a whole object of the class {value.module}.{value.name}, not a state dict"
            )
        if isinstance(value, TensorRef):
            self._refuse("it is a single tensor without a name, not a state dict")
        others = dict(self._tensors(value, "", aside=True))
        return Found({}, others, {"objects": plain(value)})

    def _state_dict(self, root: dict[Any, Any]) -> tuple[list[str], dict[Any, Any]]:
        """The keys that lead to the state dict, and the state dict."""
        path: list[str] = []
        found = root
        while True:
            inner = {key: _as_mapping(found.get(key)) for key in WRAPPERS}
            fitting = {k: m for k, m in inner.items() if m is not None and self._holds_tensor(m)}
            if not fitting:
                return path, found
            if len(fitting) > 1:
                raise AmbiguousFormat(
                    f"{self.where} holds tensors under {' and under '.join(map(repr, fitting))}, "
                    "and either could be the state dict. Save the one that is meant by itself, "
                    "best as safetensors."
                )
            ((key, mapping),) = fitting.items()
            if path and any(self._holds_tensor(v) for k, v in found.items() if k != key):
                return path, found
            path.append(key)
            found = mapping

    def _holds_tensor(self, value: Any) -> bool:
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            item = waiting.pop()
            if isinstance(item, TensorRef | StorageRef):
                return True
            inner = _inside(item)
            if inner and id(item) not in seen:
                seen.add(id(item))
                self._count(len(inner))
                waiting.extend(inner)
        return False

    def _is_inert(self, value: Any, name: str) -> bool:
        """Whether ``value`` has tensors that only its own class could name; they are noted."""
        inert = isinstance(value, Opaque) and _as_mapping(value) is None
        if inert and self._holds_tensor(value):
            self.inert[name] = f"{value.module}.{value.name}"
            return True
        return False

    def _tensors(
        self, value: Any, name: str, *, aside: bool, depth: int = 0
    ) -> Iterator[tuple[str, TensorRef]]:
        """Tensors in ``value`` and their dotted names, all of them weights unless ``aside``."""
        if type(value) is TensorRef:
            yield name, value
            return
        if isinstance(value, Refused):
            self.refused[name] = f"{value.module}.{value.name}"
            if not aside and self._holds_tensor(value):
                self._refuse(
                    f"the tensor {name!r} is what a call of {value.module}.{value.name} would "
                    "return, and nothing that a checkpoint brings along is called"
                )
            return
        if not aside and self._is_inert(value, name):
            return
        mapping = _as_mapping(value)
        inner = _inside(value)
        entries = mapping.items() if mapping is not None else enumerate(inner)
        self._count(1 + len(inner) if depth <= DEEPEST else MOST_STEPS)
        for key, entry in entries:
            inner_name = f"{name}.{key}" if name else str(key)
            self.steps += len(inner_name) // LETTERS_PER_STEP
            if type(entry) is TensorRef:
                yield inner_name, entry
            else:
                yield from self._tensors(entry, inner_name, aside=aside, depth=depth + 1)

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps >= MOST_STEPS:
            raise CorruptCheckpoint(
                f"{self.where} is damaged: what it holds is nested without end. Fetch or write it "
                "again."
            )

    def _metadata(self, root: dict[Any, Any], path: list[str]) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if path:
            metadata["state_dict"] = ".".join(path)
        objects = plain(root)
        if objects:
            metadata["objects"] = objects
        if self.refused:
            metadata["refused"] = self.refused
        if self.inert:
            metadata["inert"] = self.inert
        return metadata

    def _refuse(self, why: str) -> NoReturn:
        raise RefusedCheckpoint(f"{self.where} is refused: {why}. {CURE}")


def _as_mapping(value: Any) -> dict[Any, Any] | None:
    """``value`` if it is a mapping, or what was put into an inert one."""
    if isinstance(value, Opaque):
        value = value.items
    return value if isinstance(value, dict) else None


def _inside(value: Any) -> list[Any]:
    """What ``value`` holds, if it is a container or an inert object."""
    if isinstance(value, TensorRef | StorageRef):
        return []
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, Opaque):
        return [value.args, value.state, value.items]
    if isinstance(value, Refused):
        return [value.args]
    return []


def _add(found: dict[str, TensorRef], name: str, ref: TensorRef, where: str) -> None:
    if name in found:
        raise CorruptCheckpoint(
            f"{where} holds two tensors called {name!r}, one of them under nested names. Save a "
            "flat state dict."
        )
    found[name] = ref
