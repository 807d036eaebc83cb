"""transformers' conversion operations, carried out on symbols instead of tensors.

One function per operation class of ``transformers.core_model_loading``; an operation that has none
here is run on real tensors. Patterns are keys of the dictionaries, exactly as transformers passes
them from one operation to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import core_model_loading as library

from bioinit.backends.transformers.symbols import Inexpressible, Symbol, concatenate


@dataclass(frozen=True)
class Many:
    """``count`` tensors of one shape, one per value of wildcard ``wildcard`` of their name."""

    each: Symbol
    count: int
    wildcard: int

    def joined(self, dim: int) -> Symbol:
        return self.each.repeated(dim, self.count, self.wildcard).merge(dim, dim + 1)

    def stacked(self, dim: int) -> Symbol:
        return self.each.repeated(dim, self.count, self.wildcard)


Held = Symbol | Many | list[Symbol]
"""What a pattern has collected: one tensor, or several in order."""


@dataclass(frozen=True)
class Call:
    """What transformers passes to every operation besides the tensors."""

    sources: list[str]
    targets: list[str]
    layer: str
    model: Any


def run(converter: Any, collected: Mapping[str, Held], layer: str, model: Any) -> dict[str, Symbol]:
    """What the operations of ``converter`` make of ``collected``, by target pattern.

    Raises:
        Inexpressible: one of them is not a move of whole blocks.
    """
    call = Call(converter.source_patterns, converter.target_patterns, layer, model)
    held = dict(collected)
    for op in converter.operations:
        apply = _APPLY.get(type(op))
        if apply is None:
            raise Inexpressible(f"{type(op).__name__} computes new values")
        held = apply(op, held, call)
    return {pattern: _single(value) for pattern, value in held.items()}


def _single(value: Held) -> Symbol:
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    if not isinstance(value, Symbol):
        raise Inexpressible("several tensors are left where one is expected")
    return value


def _only(held: Mapping[str, Held]) -> Symbol:
    if len(held) != 1:
        raise Inexpressible("one tensor is expected where there are several")
    return _single(next(iter(held.values())))


def _dim(dim: int, symbol: Symbol) -> int:
    rank = len(symbol.shape)
    if not -rank <= dim < rank:
        raise Inexpressible(f"a tensor of {rank} dims has no dim {dim}")
    return dim % rank


def _chunk(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    if op.num_shards_attribute is not None:
        raise Inexpressible("the number of chunks is read from the config")
    symbol = _only(held)
    dim = _dim(op.dim, symbol)
    step = max(1, math.ceil(symbol.shape[dim] / len(call.targets)))
    starts = range(0, symbol.shape[dim], step)
    sizes = [min(step, symbol.shape[dim] - start) for start in starts]
    if len(sizes) != len(call.targets):
        raise Inexpressible("there are fewer chunks than names for them")
    return dict(zip(call.targets, symbol.split(dim, sizes), strict=True))


def _split(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    symbol = _only(held)
    dim = _dim(op.dim, symbol)
    sizes = [
        call.model.get_parameter(call.layer.replace(call.targets[0], target)).shape[dim]
        for target in call.targets
    ]
    if sum(sizes) != symbol.shape[dim]:
        raise Inexpressible(f"a dim of {symbol.shape[dim]} is split into {sizes}")
    return dict(zip(call.targets, symbol.split(dim, sizes), strict=True))


def _concatenate(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    symbols: list[Symbol] = []
    for pattern in call.sources:
        value = held.get(pattern)
        if isinstance(value, Many):
            symbols.append(value.joined(_dim(op.dim, value.each)))
        elif value is not None:
            symbols += value if isinstance(value, list) else [value]
    if not symbols:
        raise Inexpressible("nothing is left to concatenate")
    target = op.get_target_pattern(call.targets)
    return {target: concatenate(symbols, _dim(op.dim, symbols[0]))}


def _stack(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    made: dict[str, Held] = {}
    for pattern, value in held.items():
        target = op.get_target_pattern(len(held), pattern, call.targets)
        if isinstance(value, Many):
            made[target] = value.stacked(op.dim % (len(value.each.shape) + 1))
        elif isinstance(value, Symbol):
            made[target] = value
        else:
            dim = op.dim % (len(value[0].shape) + 1)
            made[target] = concatenate([symbol.unsqueezed(dim) for symbol in value], dim)
    return made


def _interleave(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    symbol = _only(held)
    dim = _dim(op.dim, symbol)
    if symbol.shape[dim] % 2:
        raise Inexpressible(f"a dim of {symbol.shape[dim]} is interleaved by twos")
    half = symbol.shape[dim] // 2
    sizes = (2, half) if op.inverse else (half, 2)
    return {call.targets[0]: symbol.swap(dim, sizes, (1, 0))}


def _transpose(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    symbol = _only(held)
    target = op.get_target_pattern(dict(held), call.sources, call.targets)
    if op.check_dims and symbol.shape == tuple(call.model.get_parameter(call.layer).shape):
        return {target: symbol}
    return {target: symbol.transpose(_dim(op.dim0, symbol), _dim(op.dim1, symbol))}


def _permute_for_rope(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    config = call.model.config
    if op.subconfig_key is not None:
        config = getattr(config, op.subconfig_key, config)
    heads = getattr(config, "num_attention_heads", 1)
    made: dict[str, Held] = {}
    for pattern, value in held.items():
        target = op.get_target_pattern(pattern, call.sources, call.targets)
        symbol = _single(value)
        only = op.permute_layer_names
        is_meant = only is None or any(name in pattern for name in only)
        if is_meant and len(symbol.shape) in (1, 2):
            half = symbol.shape[0] // heads // 2
            sizes = (heads, 2, half) if op.inverse else (heads, half, 2)
            symbol = symbol.swap(0, sizes, (0, 2, 1))
        made[target] = symbol
    return made


def _flatten_convolution(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    symbol = _only(held)
    target = op._get_target_pattern(dict(held), call.sources, call.targets)
    return {target: symbol.merge(1, 4) if len(symbol.shape) == 5 else symbol}


def _unflatten_convolution(op: Any, held: Mapping[str, Held], call: Call) -> dict[str, Held]:
    symbol = _only(held)
    inverse: Any = library.Conv3dToLinear
    target = inverse._get_target_pattern(dict(held), call.sources, call.targets)
    return {target: symbol.unmerge(1, (op.in_channels, *op.kernel_size))}


_APPLY: dict[type, Callable[[Any, Mapping[str, Held], Call], dict[str, Held]]] = {
    library.Chunk: _chunk,
    library.Split: _split,
    library.Concatenate: _concatenate,
    library.MergeModulelist: _stack,
    library.Interleave: _interleave,
    library.Transpose: _transpose,
    library.PermuteForRope: _permute_for_rope,
    library.Conv3dToLinear: _flatten_convolution,
    library.LinearToConv3d: _unflatten_convolution,
}
