"""What a live model offers as destinations: keys, global shapes, local boxes and ties.

A target is described, never touched: the module may be on the meta device. A parameter that several
names share (a tied embedding) is one memory; the first name in state-dict order owns it, the others
say whom they are tied to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from bioinit.errors import ConfigError
from bioinit.layout import Box, Dims


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


_NOWHERE: Mapping[str, Located] = {}


def describe(root: nn.Module, located: Mapping[str, Located] = _NOWHERE) -> dict[str, Target]:
    """The targets of ``root`` by state-dict key, non-persistent buffers included.

    Args:
        root: the module, or the part of a model that this process has.
        located: what whoever built it knows of tensors that are parts, by their names in ``root``.

    Raises:
        ConfigError: a parameter is a DTensor; its shards are not described yet.
    """
    owners: dict[object, str] = {}
    boxes: dict[tuple[Dims, Dims], tuple[Box, ...]] = {}
    found: dict[str, Target] = {}
    for slot in slots(root):
        tensor = slot.tensor
        if type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "device_mesh"):
            raise ConfigError(
                f"{slot.key} is a DTensor; loading into sharded parameters is not there yet. "
                "Load first, then shard."
            )
        shape = tuple(tensor.shape)
        layout = (shape, held_strides(tensor))
        if layout not in boxes:
            boxes[layout] = (Box((0,) * len(shape), shape, 0, layout[1]),)
        # Two parameters over one memory are one target; on meta only identity can tell.
        memory = id(tensor) if tensor.is_meta or not tensor.numel() else (tensor.data_ptr(), layout)
        owner = owners.setdefault(memory, slot.key)
        found[slot.key] = Target(
            slot.key,
            shape,
            tensor.dtype,
            boxes[layout],
            slot.is_buffer,
            slot.persistent,
            None if owner == slot.key else owner,
        )
    return found
