"""Where the parameters of a divided model belong in the whole one.

A pipeline stage counts its layers from 0, a process of an expert-parallel group its experts, and
the chunks of an interleaved pipeline are a list: names of the whole model take that back. Which
region a parameter is, its module says in ``sharded_state_dict()``, as far as what it hands out lies
in the parameter's own memory; where it is a copy, the marks that Megatron leaves on parameters say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bioinit.backends.megatron.world import imported
from bioinit.errors import ConfigError
from bioinit.layout import Box, Dims
from bioinit.targets import Located, Slot, held_strides, slots

_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_DIVIDE = ("tp", "pp", "ep", "expt_tp")
_BY_EXPERT = re.compile(r"(weight|bias)(\d+)")


def located(module: nn.Module) -> dict[str, Located]:
    """What ``module`` holds of the whole model, by its names here.

    Args:
        module: a model or a stage of one, wrapped or not, or the list of a pipeline's chunks.

    Raises:
        ConfigError: a parameter is divided in a way that nothing tells.
    """
    found: dict[str, Located] = {}
    for front, stage in stages(module):
        groups = _Groups.of(stage)
        named = _names(stage, groups)
        places = _places(stage, groups)
        for slot in slots(stage):
            key = named[slot.key]
            is_copy = _is_copied_embedding(stage, slot.key)
            key = _EMBEDDING if is_copy else key
            is_expert = _is_expert(key)
            shape, boxes = places[slot.key]
            replicas = groups.replicas(
                boxes[0].sizes != shape, is_expert, is_tied=_is_in_both(stage, key)
            )
            found[front + slot.key] = Located(key, shape, boxes, replicas)
    return found


def global_names(module: nn.Module) -> dict[str, str]:
    """What the whole model calls every parameter and buffer, by its name here."""
    found: dict[str, str] = {}
    for front, stage in stages(module):
        for live, key in _names(stage, _Groups.of(stage)).items():
            found[front + live] = _EMBEDDING if _is_copied_embedding(stage, live) else key
    return found


def stages(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The models in ``module`` without what wraps them, and what stands before their names."""
    if isinstance(module, nn.ModuleList):
        for number, chunk in enumerate(module):
            yield from ((f"{number}.{front}", stage) for front, stage in stages(chunk))
        return
    front = ""
    while list(module._modules) == ["module"] and not module._parameters:
        front, module = f"{front}module.", module.get_submodule("module")
    yield front, module


@dataclass(frozen=True)
class _Groups:
    """The process groups of one stage."""

    collection: Any

    @classmethod
    def of(cls, stage: nn.Module) -> _Groups:
        """Those that the stage was built with, or else the ones of the process."""
        known = getattr(stage, "pg_collection", None)
        if known is None:
            kind = imported("megatron.core.process_groups_config").ProcessGroupCollection
            known = kind.use_mpu_process_groups()
        return cls(known)

    @property
    def divide(self) -> bool:
        """Whether any of them makes a parameter a part of one."""
        return any(self.size(name) > 1 for name in _DIVIDE)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Of each that divides, how many it has and which this process is."""
        return tuple((self.size(name), self.rank(name)) for name in _DIVIDE)

    def size(self, name: str) -> int:
        group = getattr(self.collection, name, None)
        return 1 if group is None else int(group.size())

    def rank(self, name: str) -> int:
        group = getattr(self.collection, name, None)
        return 0 if group is None else int(group.rank())

    def members(self, name: str) -> tuple[int, ...]:
        """Their ranks in the world, ascending; () where there is no such group."""
        group = getattr(self.collection, name, None)
        if group is None:
            return ()
        return tuple(sorted(torch.distributed.get_process_group_ranks(group)))

    def replicas(self, is_part: bool, is_expert: bool, *, is_tied: bool) -> tuple[int, ...]:
        """Who holds the very same boxes of a parameter."""
        if is_expert:
            return self.members("expt_dp")
        same = self.members("dp_cp" if is_part or self.size("tp") == 1 else "tp_dp_cp")
        pipeline = self.members("pp")
        if not is_tied or len(pipeline) < 2:
            return same
        # Stages lie equally far apart in every pipeline.
        here = pipeline[self.rank("pp")]
        ends = (pipeline[0], pipeline[-1])
        return tuple(sorted(rank - here + end for rank in same for end in ends))


def _names(stage: nn.Module, groups: _Groups) -> dict[str, str]:
    """Names of the whole model by those of ``stage``: layers and experts as the whole counts."""
    paths = {"": ""}
    first: dict[str, int] = {}
    found: dict[str, str] = {}
    expert = groups.rank("ep")
    for path, module in stage.named_modules(remove_duplicate=False):
        if path:
            parent, _, segment = path.rpartition(".")
            if parent in first:
                segment = str(int(segment) + first[parent])
            paths[path] = _joined(paths[parent], segment)
        for name, inner in module._modules.items():
            if not isinstance(inner, nn.ModuleList) or not len(inner):
                continue
            if name == "local_experts":
                first[_joined(path, name)] = expert * len(inner)
            elif isinstance(number := getattr(inner[0], "layer_number", None), int):
                first[_joined(path, name)] = number - 1
        experts = getattr(module, "num_gemms", None)
        for name in (*module._parameters, *module._buffers):
            numbered = _BY_EXPERT.fullmatch(name) if isinstance(experts, int) else None
            whole = name
            if numbered is not None and isinstance(experts, int):
                whole = f"{numbered[1]}{int(numbered[2]) + expert * experts}"
            found[_joined(path, name)] = _joined(paths[path], whole)
    return found


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_copied_embedding(stage: Any, live: str) -> bool:
    """Whether this is the last stage's copy of an embedding that the first stage has."""
    is_tied = getattr(stage, "share_embeddings_and_output_weights", False)
    return bool(is_tied and live == _OUTPUT and not getattr(stage, "pre_process", True))


def _is_expert(key: str) -> bool:
    return ".experts." in f".{key}"


def _is_in_both(stage: Any, key: str) -> bool:
    return key == _EMBEDDING and bool(getattr(stage, "share_embeddings_and_output_weights", False))


_Places = dict[str, tuple[Dims, tuple[Box, ...]]]
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, _Places]] = WeakKeyDictionary()
"""What was found of each stage, and how its tensors lay then.

A start asks several times, and every ``sharded_state_dict()`` makes views of every parameter."""


def _places(stage: nn.Module, groups: _Groups) -> _Places:
    """The shape of the whole tensor and the regions of it that are here, by names of ``stage``."""
    held = list(slots(stage))
    lie = groups.sizes, tuple(_lies(held))
    known = _KNOWN.get(stage)
    if known is not None and known[0] == lie:
        return known[1]
    pieces = _pieces(stage) if groups.divide else {}
    found = {slot.key: _place(slot, pieces, groups, _is_expert(slot.key)) for slot in held}
    _KNOWN[stage] = lie, found
    return found


def _lies(held: Sequence[Slot]) -> Iterator[tuple[Any, ...]]:
    """Of each tensor all that decides where it belongs, with memory or without."""
    first: dict[int, str] = {}
    for slot in held:
        tensor: Any = slot.tensor
        shares = first.setdefault(_memory(tensor), slot.key)
        marks = (getattr(tensor, mark, None) for mark in _MARKS)
        yield slot.key, shares, tensor.shape, tensor.stride(), tensor.storage_offset(), *marks


_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride")


def _pieces(stage: Any) -> Mapping[int, Sequence[Any]]:
    """What ``sharded_state_dict()`` hands out, by the memory that it lies in."""
    kinds = imported("megatron.core.dist_checkpointing.mapping")
    found: dict[int, list[Any]] = {}
    for part in stage.sharded_state_dict().values():
        if isinstance(part, kinds.ShardedTensorFactory):
            built = part.build()
            pieces = [*built.values()] if isinstance(built, Mapping) else built
        else:
            pieces = [part]
        for piece in pieces:
            if isinstance(piece, kinds.ShardedTensor) and piece.data is not None:
                found.setdefault(_memory(piece.data), []).append(piece)
    return found


def _memory(tensor: torch.Tensor) -> int:
    """The same for a tensor and its views, with or without memory."""
    return int(tensor.untyped_storage()._cdata)


def _place(
    slot: Slot, pieces: Mapping[int, Sequence[Any]], groups: _Groups, is_expert: bool
) -> tuple[Dims, tuple[Box, ...]]:
    """The shape of the whole tensor, and the regions of it that are here."""
    tensor = slot.tensor
    said = _said(tensor, pieces.get(_memory(tensor), ()))
    if said is not None:
        return said
    if not groups.divide:
        return _by_marks(slot, 1, 0)
    if type(slot.module).__name__ == "GroupedMLP":
        return _grouped(slot, groups)
    name = "expt_tp" if is_expert else "tp"
    return _by_marks(slot, groups.size(name), groups.rank(name))


def _said(tensor: torch.Tensor, pieces: Sequence[Any]) -> tuple[Dims, tuple[Box, ...]] | None:
    """What ``pieces`` say, if they are the parameter, whole, and parts of one tensor."""
    if not pieces or held_strides(tensor) != tuple(tensor.stride()):
        return None
    shapes = {(p.key, tuple(p.global_shape[p.prepend_axis_num :])) for p in pieces}
    if len(shapes) != 1 or sum(p.data.numel() for p in pieces) != tensor.numel():
        return None
    [(_, shape)] = shapes
    if len(shape) != tensor.dim():
        return None
    if shape == tuple(tensor.shape):  # parts of one factory, side by side
        return shape, (Box((0,) * len(shape), shape, 0, tuple(tensor.stride())),)
    return shape, tuple(
        Box(
            tuple(piece.global_offset[piece.prepend_axis_num :]),
            tuple(piece.data.shape),
            piece.data.storage_offset() - tensor.storage_offset(),
            tuple(piece.data.stride()),
        )
        for piece in pieces
    )


def _by_marks(slot: Slot, ways: int, rank: int) -> tuple[Dims, tuple[Box, ...]]:
    """By what Megatron notes at a parameter: the dim, and how many parts each process has of it."""
    tensor = slot.tensor
    shape, strides = tuple(tensor.shape), held_strides(tensor)
    if ways == 1 or not getattr(tensor, "tensor_model_parallel", False):
        return shape, (Box((0,) * len(shape), shape, 0, strides),)
    dim, parts = int(tensor.partition_dim), int(tensor.partition_stride)  # type: ignore[attr-defined]
    if not 0 <= dim < len(shape) or parts < 1 or shape[dim] % parts:
        raise ConfigError(
            f"{slot.key} is marked as divided along dim {dim} with stride {parts}, and its shape "
            f"here is {shape}. Megatron's marks do not fit the parameter: have its module's "
            "sharded_state_dict() hand out views of it."
        )
    each = shape[dim] // parts
    whole = (*shape[:dim], shape[dim] * ways, *shape[dim + 1 :])
    sizes = (*shape[:dim], each, *shape[dim + 1 :])
    return whole, tuple(
        Box(
            tuple((part * ways + rank) * each if d == dim else 0 for d in range(len(shape))),
            sizes,
            part * each * strides[dim],
            strides,
        )
        for part in range(parts)
    )


def _grouped(slot: Slot, groups: _Groups) -> tuple[Dims, tuple[Box, ...]]:
    """Experts that lie one after the other, in memory that is declared in another shape."""
    rows, columns = slot.tensor.shape
    ways, rank = groups.size("ep"), groups.rank("ep")
    if groups.size("expt_tp") > 1 or (slot.name == "weight1" and rows % ways):
        raise ConfigError(
            f"{slot.key} of a GroupedMLP is divided over {groups.size('expt_tp')} processes by "
            f"expert tensor parallelism and over {ways} by experts, which do not end at a row. "
            "Use expert_tensor_parallel_size=1, or experts of Transformer Engine "
            "(moe_use_legacy_grouped_gemm=False)."
        )
    if slot.name == "weight1":
        # Declared as rows of all experts' columns, and used as one matrix per expert.
        shape, held = (rows, columns * ways), (rows // ways, columns * ways)
    else:
        shape, held = (rows * ways, columns), (rows, columns)
    return shape, (Box((rank * held[0], 0), held, 0, (held[1], 1)),)
