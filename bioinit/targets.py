"""What a live model offers as destinations: keys, global shapes, local boxes and ties.

A target is described and its values are never touched: the module may be on the meta device. Only
what ``fully_shard`` keeps gathered is given back first (:func:`given_back`). A parameter that
several names share (a tied embedding) is one memory; the first name in state-dict order owns it,
the others say whom they are tied to. Of a tensor divided among processes, the boxes say what lies
here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from bioinit import shards
from bioinit.errors import ConfigError
from bioinit.layout import Box, Dims, numel


class Target(NamedTuple):
    """A parameter or buffer of the live model.

    ``key`` and ``shape`` are those of the whole model, wherever it is divided; ``boxes`` say which
    regions lie in local memory and how (strides of the tensor itself, so a non-contiguous parameter
    is described as it is). ``tied_to`` is the key that owns the memory, or None. ``persistent`` is
    False for a buffer outside the state dict. ``live`` is what this process calls it, where that
    is not ``key``; ``replicas`` are the ranks that hold the very same boxes, this one among them,
    ascending; empty where nobody is known to.
    """

    key: str
    shape: Dims
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    is_buffer: bool
    persistent: bool
    tied_to: str | None
    live: str = ""
    replicas: tuple[int, ...] = ()

    @property
    def slot(self) -> str:
        """What the module of this process calls it."""
        return self.live or self.key

    @property
    def held(self) -> int:
        """How many of its elements lie in local memory."""
        return sum(numel(box.sizes) for box in self.boxes)

    @property
    def is_whole(self) -> bool:
        """Whether all of it lies in local memory, as one box."""
        return len(self.boxes) == 1 and self.boxes[0].sizes == self.shape


class Located(NamedTuple):
    """Where a tensor of this process belongs in the whole model: a part of a :class:`Target`."""

    key: str
    shape: Dims
    boxes: tuple[Box, ...]
    replicas: tuple[int, ...] = ()


class Slot(NamedTuple):
    """Where a tensor is registered: the module, the attribute name, and the tensor now there."""

    key: str
    module: nn.Module
    name: str
    tensor: torch.Tensor
    is_buffer: bool
    persistent: bool


def slots(root: nn.Module) -> Iterator[Slot]:
    """Every registered parameter and buffer, in state-dict order, shared modules once per name."""
    pending: list[tuple[str, nn.Module]] = [("", root)]
    while pending:
        prefix, module = pending.pop()
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(prefix + name, module, name, parameter, False, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                yield Slot(prefix + name, module, name, buffer, True, persistent)
        children = [(f"{prefix}{name}.", m) for name, m in module._modules.items() if m is not None]
        pending.extend(reversed(children))


def held_strides(tensor: torch.Tensor) -> Dims:
    """The strides of ``tensor``, or those that it will have once it gets memory.

    A dense layout is kept (a transposed weight, channels last); one with holes or overlaps becomes
    row-major.
    """
    if tensor.is_meta and not tensor.is_contiguous():
        return tuple(torch.empty_like(tensor).stride())
    return tuple(tensor.stride())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of ``tensor``: the local memory of a DTensor, without autograd."""
    return tensor._local_tensor if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def is_divided(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    kind = type(tensor)
    return kind not in (torch.Tensor, nn.Parameter) and hasattr(kind, "placements")


def mesh_device(root: nn.Module) -> str | None:
    """The kind of device that the tensors of ``root`` are divided over; None if none is."""
    divided = (slot.tensor for slot in slots(root) if is_divided(slot.tensor))
    return next((tensor.device_mesh.device_type for tensor in divided), None)  # type: ignore[attr-defined]


_NOWHERE: Mapping[str, Located] = {}


def describe(root: nn.Module, located: Mapping[str, Located] = _NOWHERE) -> dict[str, Target]:
    """The targets of ``root`` by key, non-persistent buffers included, in state-dict order.

    Parameters that ``fully_shard`` keeps gathered after a forward are given back first, as they
    are for its state dict: whatever is written into them would be thrown away.

    Args:
        root: the module, or the part of a model that this process has.
        located: what whoever built it knows of tensors that are parts, by their names in ``root``.

    Raises:
        ConfigError: what a DTensor holds cannot be told, or two tensors are said to be one.
    """
    owners: dict[object, str] = {}
    boxes: dict[tuple[Dims, Dims], tuple[Box, ...]] = {}
    divided = _Divided(given_back(root))
    found: dict[str, Target] = {}
    for slot in slots(root):
        tensor = slot.tensor
        key = slot.key
        replicas: tuple[int, ...] = ()
        shape = tuple(tensor.shape)
        if is_divided(tensor):
            tensor = local(tensor)
            layout = (tuple(tensor.shape), held_strides(tensor))
            held, replicas = divided.place(key, slot.tensor)
        else:
            layout = (shape, held_strides(tensor))
            if layout not in boxes:
                boxes[layout] = (Box((0,) * len(shape), shape, 0, layout[1]),)
            held = boxes[layout]
            if key in located:
                key, shape, held, replicas = located[key]
        # Two parameters over one memory are one target; without memory only identity can tell.
        memory = (
            id(slot.tensor)
            if tensor.is_meta or not tensor.numel()
            else (tensor.data_ptr(), layout, shape)
        )
        owner = owners.setdefault(memory, key)
        if key in found:
            raise ConfigError(
                f"{found[key].slot} and {slot.key} are both said to be {key} of the whole model. "
                "Each tensor that a process holds needs a name of its own there."
            )
        found[key] = Target(
            key,
            shape,
            tensor.dtype,
            held,
            slot.is_buffer,
            slot.persistent,
            None if owner == key else owner,
            "" if key == slot.key else slot.key,
            replicas,
        )
    return found


def given_back(root: nn.Module) -> list[Any]:
    """The modules of ``root`` that ``fully_shard`` divides, each with its shards in place again."""
    found: list[Any] = [module for module in root.modules() if _is_fully_sharded(module)]
    for module in found:
        module.reshard()
    return found


class _Divided:
    """Where the local memory of DTensors lies; equal ones are worked out once."""

    def __init__(self, fully_sharded: list[Any]) -> None:
        self._last = {id(p) for module in fully_sharded for p in module.parameters()}
        self._meshes: dict[Any, shards.Mesh | None] = {}
        self._known: dict[Any, tuple[tuple[Box, ...], tuple[int, ...]]] = {}

    def place(self, key: str, tensor: Any) -> tuple[tuple[Box, ...], tuple[int, ...]]:
        """The boxes and the replicas of a DTensor."""
        held = local(tensor)
        shape, spec = tuple(tensor.shape), tensor._spec
        last = id(tensor) in self._last
        strides = held_strides(held)
        shard_order = getattr(spec, "shard_order", None)
        kind = (shape, spec.mesh, spec.placements, shard_order, held.shape, strides, last)
        if kind not in self._known:
            mesh = self._mesh(spec.mesh)
            if mesh is None:
                return (), ()
            placements = tuple(_plain(key, tensor, each) for each in spec.placements)
            order = None
            if shard_order is not None:
                order = tuple((axis, placements[axis]) for _, axes in shard_order for axis in axes)
            elif last:
                order = shards.after_others(placements, mesh.sizes)
            self._known[kind] = (
                shards.boxes(key, shape, mesh, placements, tuple(held.shape), strides, order),
                shards.replicas(mesh, placements),
            )
        return self._known[kind]

    def _mesh(self, mesh: Any) -> shards.Mesh | None:
        """``mesh`` in plain numbers; None where this process is not in it."""
        if mesh not in self._meshes:
            coordinate = mesh.get_coordinate()
            self._meshes[mesh] = None
            if coordinate is not None:
                ranks = tuple(mesh.mesh.flatten().tolist())
                self._meshes[mesh] = shards.Mesh(tuple(mesh.shape), tuple(coordinate), ranks)
        return self._meshes[mesh]


def _is_fully_sharded(module: nn.Module) -> bool:
    # Whoever called fully_shard has imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _plain(key: str, tensor: Any, placement: Any) -> shards.Placement:
    if placement.is_replicate():
        return None
    if placement.is_partial() or not hasattr(placement, "dim"):
        raise ConfigError(
            f"{key} {list(tensor.shape)} is a DTensor with the placements {tensor.placements} over "
            f"a mesh of {list(tensor.device_mesh.shape)}: {placement} says of no element where it "
            "lies. Give parameters that are replicated or divided (.redistribute())."
        )
    return shards.Split(placement.dim % tensor.ndim, getattr(placement, "split_factor", 0))
