"""A model of megatron-core as one process of several builds it: its stage, its parts, its sizes.

Megatron's process groups exist before a model is built, and say all of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bioinit.backends.megatron.world import imported, sizes
from bioinit.errors import ConfigError

Stage = Callable[[bool, bool, int | None], nn.Module]
"""Builds a stage: whether it is the first, whether it is the last, and which chunk of several."""


def parallel_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that the process groups decide.

    Args:
        given: the other fields.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    ways = sizes()
    _check(given, ways)
    found: dict[str, Any] = {
        "tensor_model_parallel_size": ways["tp"],
        "pipeline_model_parallel_size": ways["pp"],
        "context_parallel_size": ways["cp"],
        "expert_model_parallel_size": ways["ep"],
        "expert_tensor_parallel_size": ways["etp"],
    }
    if ways["pp"] > 1:
        found["virtual_pipeline_model_parallel_size"] = ways["vpp"] if ways["vpp"] > 1 else None
        found["pipeline_dtype"] = given.get("params_dtype", torch.float32)
    if ways["tp"] > 1 and given.get("num_moe_experts") is not None:
        # Megatron trains experts beside tensor parallelism in no other way.
        found["sequence_parallel"] = given.get("sequence_parallel", True)
    return found


def padded(rows: int, divisor: int) -> int:
    """Rows of an embedding that every process can have an equal part of.

    Args:
        rows: those that one process would have.
        divisor: what every part is made a multiple of.
    """
    each = divisor * sizes()["tp"]
    return math.ceil(rows / each) * each


def stages(build: Stage) -> nn.Module:
    """What this process has of the model: a stage, or the list of its chunks."""
    state = imported("megatron.core.parallel_state")
    chunks = sizes()["vpp"]
    if chunks == 1:
        return build(*_ends(state.is_pipeline_first_stage(), state.is_pipeline_last_stage()), None)
    return nn.ModuleList(
        build(
            *_ends(
                state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            ),
            chunk,
        )
        for chunk in range(chunks)
    )


def _ends(first: Any, last: Any) -> tuple[bool, bool]:
    return bool(first), bool(last)


def _check(given: Mapping[str, Any], ways: Mapping[str, int]) -> None:
    """Raise where a size does not divide as an axis asks.

    Raises:
        ConfigError: it does not.
    """
    experts = given.get("num_moe_experts")
    if ways["ep"] > 1 and experts is None:
        raise ConfigError(
            f"placement.mesh has ep: {ways['ep']}, and this model has no experts. Leave ep out."
        )
    if ways["cp"] > 1:
        raise ConfigError(
            f"placement.mesh has cp: {ways['cp']}, and only Transformer Engine's attention divides "
            "a sequence; models that are built here have Megatron's own. Leave cp out, or build "
            "the model yourself and pass it to bioinit.load_weights."
        )
    stages = ways["pp"] * ways["vpp"]
    for field, axis, into in (
        ("num_layers", "pp * vpp" if ways["vpp"] > 1 else "pp", stages),
        ("num_attention_heads", "tp", ways["tp"]),
        ("ffn_hidden_size", "tp", ways["tp"] if experts is None else 1),
        ("moe_ffn_hidden_size", "tp", ways["etp"] if experts is not None else 1),
        ("num_moe_experts", "ep", ways["ep"] if experts is not None else 1),
    ):
        value = given.get(field)
        if isinstance(value, int) and value % into:
            raise ConfigError(
                f"{field}={value} is no multiple of {into}, which placement.mesh has for {axis}. "
                f"Choose {axis} so that it divides {field}."
            )
    groups, tensor = given.get("num_query_groups"), ways["tp"]
    if isinstance(groups, int) and groups % tensor and tensor % groups:
        raise ConfigError(
            f"num_query_groups={groups}, and placement.mesh has tp: {tensor}: neither divides the "
            "other. Choose tp so that it divides num_query_groups."
        )
