"""Tensor parallelism of a ``transformers`` model on meta, in transformers' own words and code.

Its styles make parameters DTensors and put forwards in place that speak to the other ranks. What
is added here is what can go wrong before there is memory, and tied parameters: a style gives each
of them a tensor of its own, so they are untied before and tied again after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from bioinit.backends.protocol import built_class
from bioinit.backends.transformers import imported
from bioinit.errors import ConfigError
from bioinit.keys import Pattern, suggestion

_BY_HEADS = ("colwise", "packed_colwise")
"""Styles whose output stays divided: of a projection to queries, keys or values, by heads."""

_SAFE = "Choose a tp that does, pass initialize(..., parallelize=fn), or write strategy: fsdp2."


class _Tie(NamedTuple):
    """A parameter under several names, the first of which owns it."""

    owner: str
    others: tuple[str, ...]


def divide(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> None:
    """Divide ``model`` over ``mesh``, which has one axis.

    Args:
        model: on meta.
        mesh: the ranks among which tensors are divided.
        plan: styles by module of the body, a number in a name as ``*``; empty for the plan that the
            architecture has itself.

    Raises:
        ConfigError: there is no plan, or the model does not divide by it.
    """
    parallel = imported("transformers.distributed.tensor_parallel")
    whole: Any = model
    if not isinstance(model, imported().PreTrainedModel):
        raise ConfigError(
            f"{built_class(model).__name__} is not a model of transformers itself, so nobody says "
            f"how it is divided (tp: {mesh.size()}). Pass initialize(..., parallelize=fn) with a "
            "function that does it, or write strategy: fsdp2."
        )
    styles = _below_body(whole, plan) if plan else dict(whole.tp_plan or {})
    if not styles:
        raise ConfigError(
            f"transformers has no plan of tensor parallelism for {built_class(model).__name__} "
            f"(tp: {mesh.size()}), and its family brings none. Write strategy: fsdp2, or pass "
            "initialize(..., parallelize=fn) with a function that divides it."
        )
    _require_known(styles, parallel.ALL_PARALLEL_STYLES)
    expanded: dict[str, str] = whole._expand_parallel_plan(styles)
    if plan:
        _require_used(styles, expanded, built_class(model).__name__)
    ties = tuple(_ties(model))
    for tie in ties:
        _agree(tie, expanded)
    _require_divisible(whole, expanded, mesh.size())
    _untie(model, ties)
    parallel.apply_tensor_parallelism(model, mesh, expanded)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in expanded):
        _tell(model.get_submodule(path), mesh.size())
    for tie in ties:
        owner = _at(model, tie.owner)
        for other in tie.others:
            _put(model, other, owner)
    # What generate sizes its caches by.
    whole._tp_plan, whole._tp_size = styles, mesh.size()


def _below_body(model: Any, plan: Mapping[str, str]) -> dict[str, str]:
    has_head = model.base_model is not model
    front = f"{model.base_model_prefix}." if has_head else ""
    return {front + pattern: style for pattern, style in plan.items()}


def _require_known(plan: Mapping[str, str], known: Mapping[str, Any]) -> None:
    for pattern, style in plan.items():
        if style not in known:
            raise ConfigError(
                f"the plan of tensor parallelism says {style!r} for {pattern}, and transformers "
                f"{imported().__version__} has no such style. {suggestion(style, list(known))}"
            )


def _require_used(plan: Mapping[str, str], expanded: Mapping[str, str], kind: str) -> None:
    for pattern in plan:
        if not any(Pattern(pattern).match(name) is not None for name in expanded):
            raise ConfigError(
                f"the plan of tensor parallelism names {pattern}, which matches no module of "
                f"{kind}. Correct the family's tensor_parallel."
            )


def _ties(model: nn.Module) -> Iterator[_Tie]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from (_Tie(found[0], tuple(found[1:])) for found in names.values() if len(found) > 1)


def _agree(tie: _Tie, expanded: dict[str, str]) -> None:
    """Leave whole what is tied to a parameter that stays whole: one memory is divided one way."""
    if any(name not in expanded for name in (tie.owner, *tie.others)):
        for name in (tie.owner, *tie.others):
            expanded.pop(name, None)
            expanded.pop(name.rpartition(".")[0], None)


def _untie(model: nn.Module, ties: tuple[_Tie, ...]) -> None:
    for tie in ties:
        for name in tie.others:
            tied = _at(model, name)
            own = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)
            _put(model, name, own)


def _require_divisible(model: Any, expanded: Mapping[str, str], ranks: int) -> None:
    modules = dict(model.named_modules())
    for name, style in expanded.items():
        module = modules.get(name)
        if module is None:
            _require_rows(name, _at(model, name), style, ranks)
        elif style in _BY_HEADS and isinstance(module, nn.Linear):
            _require_heads(name, module, modules[name.rpartition(".")[0]], model.config, ranks)


def _require_rows(name: str, parameter: torch.Tensor, style: str, ranks: int) -> None:
    """Every rank has something; how much may differ."""
    if parameter.dim() < 2 or style in ("replicate", "local_params"):
        return
    dim = parameter.dim() - (1 if "rowwise" in style else 2)
    dim = {"embedding_rowwise": 0, "embedding_colwise": 1}.get(style, dim)
    if parameter.shape[dim] < ranks:
        raise ConfigError(
            f"{name} has {parameter.shape[dim]} along dim {dim}, which {style} divides among the "
            f"{ranks} ranks of tp: some would have nothing. {_SAFE}"
        )


def _require_heads(
    name: str, module: nn.Linear, attention: nn.Module, config: Any, ranks: int
) -> None:
    """A rank computes whole heads; the forward of an attention cannot tell that it lacks a part."""
    config = getattr(attention, "config", config)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = next((getattr(attention, word) for word in _HEADED if hasattr(attention, word)), None)
    heads = getattr(config, "num_attention_heads", None)
    if size is None or not isinstance(heads, int):
        return
    field = "num_attention_heads"
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int) and groups < heads and module.out_features == groups * size:
        field, heads = "num_key_value_heads", groups
    if heads % ranks:
        raise ConfigError(
            f"{name} has {module.out_features} rows of {heads} heads ({field}) along dim 0, which "
            f"the {ranks} ranks of tp cannot share: {ranks} does not divide {heads}. {_SAFE}"
        )


_HEADED = ("head_dim", "head_size", "attention_head_size")


def _tell(attention: Any, ranks: int) -> None:
    """Forwards of older architectures put the heads together by a size that they keep."""
    if hasattr(attention, "all_head_size"):
        attention.all_head_size //= ranks


def _at(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(name)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter
