"""Conversions of transformers as views: held against the operations themselves, on real tensors."""

import pytest
import torch
from torch import nn

library = pytest.importorskip("transformers.core_model_loading")

from bioinit.backends.transformers.operations import Many, run  # noqa: E402
from bioinit.backends.transformers.symbols import (  # noqa: E402
    Inexpressible,
    Symbol,
    live_ops,
    stored_ops,
)
from bioinit.mapping import Mapping, Names  # noqa: E402
from bioinit.rules import Part, Rule  # noqa: E402
from tests.simulate import execute  # noqa: E402

FUSED = ["attn.q.weight", "attn.k.weight", "attn.v.weight"]


class Config:
    num_attention_heads = 2

    class vision_config:
        num_attention_heads = 3


class Live(nn.Module):
    """A model that has the parameters a conversion asks about."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.config = Config()
        self.shapes = shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], device="meta")


def filled(shape: tuple[int, ...], first: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(first, first + count, dtype=torch.float64).view(shape)


CASES = {
    "chunk": (["qkv.weight"], FUSED, [library.Chunk(0)], {"qkv.weight": [(12, 5)]}),
    "chunk of columns": (["qkv.weight"], FUSED, [library.Chunk(1)], {"qkv.weight": [(5, 12)]}),
    "chunk from the back": (["qkv.weight"], FUSED, [library.Chunk(-1)], {"qkv.weight": [(4, 6)]}),
    "split": (
        ["qkv.weight"],
        FUSED,
        [library.Split(0)],
        {"qkv.weight": [(8, 5)]},
    ),
    "concatenate": (FUSED, ["qkv.weight"], [library.Concatenate(0)], {k: [(4, 5)] for k in FUSED}),
    "concatenate many": (
        ["parts.*.w"],
        ["whole.w"],
        [library.Concatenate(0)],
        {"parts.*.w": [(4, 5)] * 3},
    ),
    "stack": (["e.*.w"], ["e.w"], [library.MergeModulelist(0)], {"e.*.w": [(4, 5)] * 3}),
    "stack and concatenate": (
        ["e.*.gate", "e.*.up"],
        ["e.gate_up"],
        [library.MergeModulelist(0), library.Concatenate(1)],
        {"e.*.gate": [(4, 5)] * 3, "e.*.up": [(4, 5)] * 3},
    ),
    "stack, concatenate, transpose": (
        ["e.*.gate", "e.*.up"],
        ["e.gate_up"],
        [library.MergeModulelist(0), library.Concatenate(1), library.Transpose(1, 2)],
        {"e.*.gate": [(4, 5)] * 3, "e.*.up": [(4, 5)] * 3},
    ),
    "transpose": (["a"], ["b"], [library.Transpose(1, 2)], {"a": [(2, 3, 4)]}),
    "interleave": (["a"], ["b"], [library.Interleave(1)], {"a": [(3, 8)]}),
    "interleave back": (["a"], ["b"], [library.Interleave(0, inverse=True)], {"a": [(8, 3)]}),
    "interleave and chunk": (
        ["gate_up"],
        ["gate", "up"],
        [library.Interleave(0, inverse=True), library.Chunk(0)],
        {"gate_up": [(8, 3)]},
    ),
    "rope": (["a"], ["b"], [library.PermuteForRope()], {"a": [(8, 3)]}),
    "rope of a bias": (["a"], ["b"], [library.PermuteForRope()], {"a": [(8,)]}),
    "rope of a part": (["a"], ["b"], [library.PermuteForRope("vision_config")], {"a": [(12, 3)]}),
    "chunk, then rope of two": (
        ["qkv.weight"],
        FUSED,
        [library.Chunk(0), library.PermuteForRope(permute_layer_names=["attn.q", "attn.k"])],
        {"qkv.weight": [(24, 5)]},
    ),
    "convolution to linear": (
        ["a"],
        ["b"],
        [library.Conv3dToLinear(3, (1, 2, 2))],
        {"a": [(4, 3, 1, 2, 2)]},
    ),
    "linear to convolution": (
        ["a"],
        ["b"],
        [library.LinearToConv3d(3, (1, 2, 2))],
        {"a": [(4, 12)]},
    ),
}
SPLIT = dict(zip(FUSED, [(4, 5), (2, 5), (2, 5)], strict=True))


def as_views(converter, collected, layer, model):
    """The rules that symbols give, applied to the stored tensors."""
    held, stored = {}, {}
    for pattern, tensors in collected.items():
        names = [pattern.replace("*", str(i)) for i in range(len(tensors))]
        stored |= dict(zip(names, tensors, strict=True))
        symbol = Symbol.stored(pattern, tuple(tensors[0].shape))
        held[pattern] = Many(symbol, len(tensors), 0) if "*" in pattern else symbol
    disk, memory, live = {}, [], {}
    for target, symbol in run(converter, held, layer, model).items():
        parts = []
        for number, tile in enumerate(symbol.tiles):
            name = f"{target}.{number}"
            name = f"{name}.*" if "*" in tile.source else name
            disk.setdefault(tile.source, []).append(Part(name, stored_ops(tile)))
            parts.append(Part(name, live_ops(tile, symbol.shape, symbol.shape)))
        memory.append(Rule(target, tuple(parts)))
        live[target] = torch.empty(symbol.shape, dtype=torch.float64)
    rules = [Rule(source, tuple(parts)) for source, parts in disk.items()]
    return execute(Names(Mapping(rules), Mapping(memory)), stored, live)


@pytest.mark.parametrize("case", CASES)
def test_a_view_moves_every_element_where_the_operation_does(case):
    sources, targets, operations, shapes = CASES[case]
    model = Live(SPLIT)
    collected = {
        pattern: [filled(shape, 1000 * (n + 10 * m)) for n, shape in enumerate(each)]
        for m, (pattern, each) in enumerate(shapes.items())
    }
    converter = library.WeightConverter(list(sources), list(targets), operations)
    layer = converter.target_patterns[0]
    for pattern, tensors in collected.items():
        for tensor in tensors:
            converter.add_tensor(layer, pattern, pattern, tensor)
    expected = converter.convert(layer, model=model, config=model.config)
    found = as_views(converter, collected, layer, model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = value[0] if isinstance(value, list) else value
        assert torch.equal(found[name], value), name


def test_an_operation_that_computes_is_never_taken_for_a_view():
    class Halve(library.ConversionOps):
        def convert(self, input_dict, **kwargs):
            return input_dict

    converter = library.WeightConverter(["a"], ["b"], [Halve()])
    with pytest.raises(Inexpressible, match="Halve"):
        run(converter, {"a": Symbol.stored("a", (2,))}, "b", Live({}))


def test_a_cut_through_the_rows_of_a_block_is_no_view():
    swapped = Symbol.stored("a", (8,)).swap(0, (4, 2), (1, 0))
    with pytest.raises(Inexpressible, match="middle of its rows"):
        swapped.narrow(0, 0, 3)


def test_a_model_of_another_size_shows_as_another_canonical_shape():
    symbol = Symbol.stored("gate", (4, 5))
    (tile,) = symbol.tiles
    (part,) = (Part("gate", live_ops(tile, (4, 5), (6, 5))),)
    from bioinit.layout import Box

    ((_, box),) = part.views((Box.contiguous((6, 5)),))
    assert box.sizes == (6, 5)
