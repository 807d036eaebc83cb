"""First values of divided tensors: made whole, a few modules at a time, and cut into the shards.

What an initializer gives to a tensor depends on all of its shape, and what it draws on all of its
elements. So it runs over a second model, undivided and on meta, in which a few modules at a time
have memory: every rank makes the same whole tensors that one process would make, keeps its boxes of
them and gives the memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from bioinit.backends.protocol import Backend
from bioinit.layout import Dims, numel
from bioinit.load.initial import Watching, own_random_state
from bioinit.load.memory import allocate
from bioinit.load.parameters import like, put
from bioinit.targets import Slot, held_strides, is_divided, slots

WHOLE_BYTES = 64 * 2**20
"""Whole tensors that lie side by side; more only if one module has more."""


class New(NamedTuple):
    """The whole of a divided tensor that needs a first value."""

    shape: Dims
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return numel(self.shape) * self.dtype.itemsize


def initialize_divided(
    new: Mapping[str, New],
    others: Collection[str],
    twin: nn.Module,
    put: Callable[[str, torch.Tensor], None],
    *,
    backend: Backend,
    make: Callable[[], nn.Module],
    seed: int,
    device: torch.device,
) -> set[str]:
    """Make the first values that the tensors of ``new`` have in one process.

    Args:
        new: by key.
        others: keys whose values are loaded, or were there before.
        twin: the whole model on meta; it is on meta again afterwards.
        put: takes a key and the whole tensor, which goes away after the call.
        backend: whose initializer it is.
        make: the constructor of the model, as ``backend`` wants it.
        seed: of the values.
        device: where values are made; those of a GPU are not those of a CPU.

    Returns:
        The keys that got a value.
    """
    model = _Twin(twin)
    given: set[str] = set()
    for keys in _batches(new, WHOLE_BYTES):
        owners = {key: model.owner(key) for key in keys}
        before = model.materialize({owner: new[key].dtype for key, owner in owners.items()}, device)
        try:
            tensors = model.tensors()
            loaded = frozenset(model.keys) - set(owners.values())
            watch = Watching(tensors, set(others) - set(owners.values()), seed)
            with torch.no_grad(), own_random_state(device), watch:
                values = backend.initialize(twin, make, loaded, watch)
            written = {**{owner: tensors[owner] for owner in watch.written}, **values}
            for key, owner in owners.items():
                if owner in written:
                    put(key, written[owner].detach())
                    given.add(key)
        finally:
            model.put_back(before)
    return given


def knows(twin: nn.Module, new: Mapping[str, New]) -> bool:
    """Whether ``twin`` has every tensor of ``new``, and in the shape of the whole one."""
    shapes = {slot.key: tuple(slot.tensor.shape) for slot in slots(twin)}
    return all(shapes.get(key) == each.shape for key, each in new.items())


def undivided(module: nn.Module) -> nn.Module:
    """A module like ``module``, whose tensors are whole and on meta; all else is shared with it.

    Its constructor is not at hand, and what divided it may forbid to copy it.
    """
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, torch.Tensor] = {}

    def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            strides = held_strides(tensor)
            empty = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
            tensors[id(tensor)] = _whole(tensor, empty)
        return tensors[id(tensor)]

    def twin(inner: nn.Module) -> nn.Module:
        if id(inner) not in modules:
            made = modules[id(inner)] = object.__new__(type(inner))
            state = vars(made)
            state.update(vars(inner))
            state["_parameters"] = {name: whole(p) for name, p in inner._parameters.items()}
            state["_buffers"] = {name: whole(b) for name, b in inner._buffers.items()}
            state["_modules"] = {
                name: None if child is None else twin(child)
                for name, child in inner._modules.items()
            }
        return modules[id(inner)]

    return twin(module)


class _Twin:
    """The whole model, and which of its names own memory."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._owners: dict[int, str] = {}
        self._named: dict[str, str] = {}
        for slot in slots(module):
            owner = self._owners.setdefault(id(slot.tensor), slot.key)
            self._named[slot.key] = owner

    @property
    def keys(self) -> Collection[str]:
        return self._named.keys()

    def owner(self, key: str) -> str:
        """The first name of the tensor ``key``: the one that its values are drawn by."""
        return self._named[key]

    def tensors(self) -> dict[str, torch.Tensor]:
        """As they are now, by the names that own them."""
        found: dict[str, torch.Tensor] = {}
        for slot in slots(self._module):
            found.setdefault(self._named[slot.key], slot.tensor)
        return found

    def materialize(
        self, wanted: Mapping[str, torch.dtype], device: torch.device
    ) -> list[tuple[Slot, torch.Tensor]]:
        """Give memory to the tensors that own these names; what was there before is returned."""
        before: list[tuple[Slot, torch.Tensor]] = []
        made: dict[str, torch.Tensor] = {}
        for slot in slots(self._module):
            owner = self._named[slot.key]
            if owner not in wanted:
                continue
            if owner not in made:
                shape, strides = tuple(slot.tensor.shape), held_strides(slot.tensor)
                memory = allocate(shape, wanted[owner], device, strides)
                made[owner] = _whole(slot.tensor, memory)
            before.append((slot, slot.tensor))
            put(slot, made[owner])
        return before

    def put_back(self, before: Sequence[tuple[Slot, torch.Tensor]]) -> None:
        for slot, tensor in before:
            put(slot, tensor)


def _whole(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """``memory``, which holds the whole of it, as a parameter or a buffer, as ``tensor`` is."""
    if not is_divided(tensor):
        return like(tensor, memory)
    if not isinstance(tensor, nn.Parameter):
        return memory
    return nn.Parameter(memory, requires_grad=tensor.requires_grad)


def _batches(new: Mapping[str, New], limit: int) -> Iterator[list[str]]:
    """Keys in order, those of a module together, as many modules as ``limit`` whole bytes allow."""
    modules: dict[str, list[str]] = {}
    for key in new:
        modules.setdefault(key.rpartition(".")[0], []).append(key)
    batch: list[str] = []
    size = 0
    for keys in modules.values():
        more = sum(new[key].bytes for key in keys)
        if batch and size + more > limit:
            yield batch
            batch, size = [], 0
        batch.extend(keys)
        size += more
    if batch:
        yield batch
