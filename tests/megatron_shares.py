"""What a process of a divided Megatron model is expected to hold, sliced without our tables."""

from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch


def place() -> SimpleNamespace:
    """Where this process stands in Megatron's groups."""
    from megatron.core import parallel_state as state

    return SimpleNamespace(
        tp=state.get_tensor_model_parallel_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        pp=state.get_pipeline_model_parallel_world_size(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        vpp=state.get_virtual_pipeline_model_parallel_world_size() or 1,
        ep_rank=state.get_expert_model_parallel_rank(),
        ep=state.get_expert_model_parallel_world_size(),
    )


def whole_name(live: str, at: Any, layers: int, experts: int, tied: bool) -> str:
    """What one process calls the parameter that is ``live`` here."""
    parts = live.split(".")
    chunk = int(parts.pop(0)) if at.vpp > 1 else 0
    is_last = chunk == at.vpp - 1 and at.pp_rank == at.pp - 1
    if tied and at.pp > 1 and is_last and parts == ["output_layer", "weight"]:
        return "embedding.word_embeddings.weight"
    if "layers" in parts:
        number = parts.index("layers") + 1
        each = layers // (at.pp * at.vpp)
        parts[number] = str(int(parts[number]) + (chunk * at.pp + at.pp_rank) * each)
    if "local_experts" in parts:
        number = parts.index("local_experts") + 1
        parts[number] = str(int(parts[number]) + at.ep_rank * (experts // at.ep))
    return ".".join(parts)


def share(key: str, whole: torch.Tensor, at: Any, gated: bool, divisor: int) -> torch.Tensor:
    """The part of a whole parameter that belongs to a process of tensor parallelism."""
    ways, rank = at.tp, at.tp_rank
    if ways == 1:
        return whole
    owner, kind = key.rsplit(".", 2)[-2:]
    if owner in ("word_embeddings", "output_layer"):
        more = -whole.shape[0] % (ways * divisor)
        whole = torch.cat([whole, whole.new_zeros(more, *whole.shape[1:])])
        return whole.chunk(ways)[rank]
    if owner == "linear_qkv":
        return whole.chunk(ways)[rank]
    if owner == "linear_fc1":
        halves = whole.chunk(2) if gated else (whole,)
        return torch.cat([half.chunk(ways)[rank] for half in halves])
    if owner in ("linear_proj", "linear_fc2") and kind == "weight":
        return whole.chunk(ways, dim=1)[rank]
    return whole


def is_padding(key: str, live: torch.Tensor, at: Any, rows: int) -> torch.Tensor | None:
    """Which rows of ``live`` only make the parts of all processes equal."""
    if key.rsplit(".", 2)[-2] not in ("word_embeddings", "output_layer"):
        return None
    first = at.tp_rank * live.shape[0] if at.tp > 1 else 0
    return torch.arange(first, first + live.shape[0]) >= rows


def differing(
    live: Mapping[str, torch.Tensor],
    one: Mapping[str, torch.Tensor],
    *,
    tied: bool,
    gated: bool,
    divisor: int = 3,
    drawn: Collection[str] | None = None,
) -> list[str]:
    """Parameters here that are not what one process has there.

    Rows that only make the parts of all processes equal are zero where they were loaded; those of
    ``drawn`` were not (None: of any parameter), and do not count.
    """
    at, found = place(), []
    layers = len({k.split(".")[2] for k in one if ".layers." in k})
    experts = len({k.split(".local_experts.")[1].split(".")[0] for k in one if "local_exp" in k})
    for name, value in live.items():
        key = whole_name(name, at, layers, experts, tied)
        wanted = share(key, one[key], at, gated, divisor)
        rows = one[key].shape[0]
        padding = is_padding(key, value, at, rows)
        if value.shape != wanted.shape:
            found.append(f"{name} ({key}): {tuple(value.shape)}, not {tuple(wanted.shape)}")
        elif padding is not None and (drawn is None or key in drawn):
            if not torch.equal(value[~padding], wanted[~padding]):
                found.append(f"{name} ({key})")
        elif not torch.equal(value, wanted):
            found.append(f"{name} ({key})")
    return found
