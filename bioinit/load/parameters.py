"""Parameters with memory in the place of those on meta: of the same kind, with the same attributes.

Of a DTensor only the local tensor gets memory. ``fully_shard`` keeps a flat view of that memory for
its collectives, padded where the shards of a parameter are uneven; it gets the padding from us, so
that it need not move the parameter into memory of its own at the first forward.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from bioinit.config import InitPolicy
from bioinit.errors import ConfigError
from bioinit.keys import Pattern
from bioinit.layout import numel
from bioinit.load.memory import allocate
from bioinit.ranks import World
from bioinit.targets import Slot, Target, describe, held_strides, is_divided, local, slots


class FullySharded:
    """What ``fully_shard`` keeps beside the parameters of a module, if it was called."""

    def __init__(self, root: nn.Module) -> None:
        self._kept = {id(each.sharded_param): each for each in _kept(root)}
        self._padded: list[tuple[Any, torch.Tensor]] = []

    def make(self, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """``tensor``, which is on meta, with memory."""
        held = local(tensor)
        kept = self._kept.get(id(tensor))
        shape = tuple(held.shape)
        if kept is None or tuple(kept.padded_sharded_param_size) == shape:
            return like(tensor, allocate(shape, dtype, device, held_strides(held)))
        memory = allocate(tuple(kept.padded_sharded_param_size), dtype, device)
        memory[shape[0] :].zero_()
        self._padded.append((kept, memory))
        return like(tensor, memory[: shape[0]])

    def adopt(self) -> None:
        """Tell it of the memory that its parameters have now."""
        for kept, memory in self._padded:
            kept._sharded_param_data = memory.view(-1)
        for kept in self._kept.values():
            registered = kept._module_info.module._parameters[kept._module_info.param_name]
            if registered is not kept.sharded_param:
                kept.reset_sharded_param()


_READ_OF_FSDP = (
    "sharded_param",
    "padded_sharded_param_size",
    "reset_sharded_param",
    "_sharded_param_data",
    "_module_info",
)


def _kept(root: nn.Module) -> Iterator[Any]:
    """What ``fully_shard`` keeps of each parameter; nothing of it is public.

    Raises:
        ConfigError: this torch keeps it in another way.
    """
    # Whoever called fully_shard has imported it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return
    for module in root.modules():
        if isinstance(module, kind):
            try:
                kept = [
                    each
                    for group in module._get_fsdp_state()._fsdp_param_groups
                    for each in group.fsdp_params
                ]
                for each in kept:
                    for name in _READ_OF_FSDP:
                        getattr(each, name)
            except AttributeError as error:
                raise ConfigError(
                    f"torch {torch.__version__} keeps what fully_shard divides in a way that "
                    f"bioinit does not know ({error}). Install the torch that constraints.txt "
                    "names, or set placement.strategy to ddp or tp."
                ) from error
            yield from kept


def put(slot: Slot, tensor: torch.Tensor) -> None:
    """Make ``tensor`` what the module of ``slot`` holds there."""
    registry: dict[str, Any] = slot.module._buffers if slot.is_buffer else slot.module._parameters
    registry[slot.name] = tensor


def like(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """``memory`` as the same kind of parameter or buffer as ``tensor``, attributes included.

    Of a DTensor it is the local memory.
    """
    is_parameter = isinstance(tensor, nn.Parameter)
    if is_divided(tensor):
        described: Any = (
            tensor if tensor.dtype == memory.dtype else tensor.detach().to(memory.dtype)
        )
        memory = type(described)(memory, described._spec, requires_grad=False)
    elif is_parameter and type(tensor) is not nn.Parameter:
        made = torch.Tensor._make_subclass(type(tensor), memory, tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)
        return made
    if not is_parameter:
        return memory
    new = nn.Parameter(memory, requires_grad=tensor.requires_grad)
    for name, value in tensor.__dict__.items():
        new.__dict__.setdefault(name, value)
    return new


def overwrite(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Put ``values`` into the memory that ``parameter`` has, in its dtype and on its device.

    Raises:
        ConfigError: it is divided, on meta, or of another shape.
    """
    if is_divided(parameter) or parameter.is_meta or parameter.shape != values.shape:
        kind = "a divided" if is_divided(parameter) else "a"
        raise ConfigError(
            f"cannot put values {list(values.shape)} into {kind} parameter {list(parameter.shape)} "
            f"on {parameter.device}: it should be whole, in memory, and of the same shape. Load "
            "the model with bioinit.load_weights, which knows parameters of every kind."
        )
    with torch.no_grad():
        parameter.copy_(values)


def fill(
    root: nn.Module, values: MutableMapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> None:
    """Give parameters and buffers of ``root``, by any of their names, ``values`` of their shapes.

    What has memory of the right dtype is filled in place; else it gets memory of its own, and
    stays the same kind of parameter, tied as it was. Nothing shares memory with a value after that.

    Args:
        root: undivided; on meta, or with memory of its own.
        values: emptied on the way, so that each can be given back once it is in place.
        dtype: what everything floating in ``root`` has afterwards, whether it has a value or not.
    """
    tied: dict[str, list[Slot]] = {}
    owner: dict[str, str] = {}
    described = describe(root)
    for slot in slots(root):
        owner[slot.key] = described[slot.key].tied_to or slot.key
        tied.setdefault(owner[slot.key], []).append(slot)
    live = {_memory(slot.tensor) for held in tied.values() for slot in held} - {0}
    for key, value in values.items():
        own = tied[owner[key]][0].tensor
        is_own = value.data_ptr() == own.data_ptr() and value.stride() == own.stride()
        if _memory(value) in live and not is_own:
            # A view of another target, which would be read after that one is written.
            values[key] = value.clone()
    with torch.no_grad():
        while values:
            key, value = values.popitem()
            places = tied[owner[key]]
            held = places[0].tensor
            floating = dtype is not None and value.is_floating_point()
            final = dtype if dtype is not None and floating else held.dtype
            if held.dtype == final and not held.is_meta:
                held.detach().copy_(value)
                continue
            device = value.device if held.is_meta else held.device
            memory = allocate(tuple(held.shape), final, device, held_strides(held))
            memory.copy_(value)
            made: dict[int, torch.Tensor] = {}
            for place in places:
                new = made.setdefault(id(place.tensor), like(place.tensor, memory))
                put(place, new)
        if dtype is not None:
            root.to(dtype)


def _memory(tensor: torch.Tensor) -> int:
    """Where its storage lies; 0 without memory."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def is_finite(tensor: torch.Tensor, chunk: int = 2**22) -> bool:
    """Whether nothing in it is NaN or Inf."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    for part in tensor.reshape(-1).split(chunk):  # type: ignore[no-untyped-call]
        if part.dtype.itemsize == 1:
            part = part.float()
        low, high = torch.aminmax(part)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return False
    return True


def set_requires_grad(live: Mapping[str, torch.Tensor], init: InitPolicy) -> None:
    """A tied parameter is trained if one of its names is, and frozen if one of its names is.

    Without ``init.trainable`` a parameter stays as its architecture made it, unless it is frozen.
    """
    trainable = [Pattern(text) for text in init.trainable]
    frozen = [Pattern(text) for text in init.frozen]
    if not trainable and not frozen:
        return
    names: dict[int, list[str]] = {}
    parameters = {k: t for k, t in live.items() if isinstance(t, nn.Parameter)}
    for key, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(key)

    def match(patterns: list[Pattern], keys: list[str]) -> bool:
        return any(pattern.match(key) is not None for pattern in patterns for key in keys)

    for parameter in parameters.values():
        keys = names[id(parameter)]
        if trainable:
            parameter.requires_grad_(match(trainable, keys))
        if match(frozen, keys):
            parameter.requires_grad_(False)


def counted(
    live: Mapping[str, torch.Tensor], described: Mapping[str, Target], world: World
) -> tuple[int, int]:
    """How many elements of the whole model are trained, and how many there are, on every rank."""
    owned = [
        (described[key], tensor.requires_grad)
        for key, tensor in live.items()
        if isinstance(tensor, nn.Parameter) and described[key].tied_to is None
    ]
    sizes = [(numel(target.shape), is_trained) for target, is_trained in owned]
    names = "\n".join(f"{target.key} {target.shape} {trained}" for target, trained in owned)
    said = world.united(hashlib.sha256(names.encode()).hexdigest(), _agreed)
    if not said:
        # Some have parameters that others lack: each counts those that it is the first to have.
        sizes = [
            (
                target.held if world.rank in target.replicas[:1] or not target.replicas else 0,
                trained,
            )
            for target, trained in owned
        ]
    counts = [sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)]
    trained, total = counts if said else world.united(counts, _added)
    return trained, total


def _agreed(some: str, other: str) -> str:
    return some if some == other else ""


def _added(some: list[int], more: list[int]) -> list[int]:
    return [one + other for one, other in zip(some, more, strict=True)]
