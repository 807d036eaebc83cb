"""Rules, held against torch's reshapes: what a view holds, and how shards are cut."""

import pytest
import torch

from bioinit.errors import MappingError
from bioinit.layout import Box, numel
from bioinit.mapping import Mapping
from bioinit.rules import Each, Narrow, Part, Permute, Rule, Unflatten, rename

GROUPS, HEADS, WIDTH, HIDDEN = 3, 2, 4, 5
FUSED = (GROUPS * (HEADS + 2) * WIDTH, HIDDEN)
QKV = Rule(
    "layers.*.qkv",
    (
        Part("l.*.q", (Unflatten(0, (GROUPS, HEADS + 2, WIDTH)), Narrow(1, 0, HEADS))),
        Part("l.*.k", (Unflatten(0, (GROUPS, HEADS + 2, WIDTH)), Narrow(1, HEADS, 1))),
        Part("l.*.v", (Unflatten(0, (GROUPS, HEADS + 2, WIDTH)), Narrow(1, HEADS + 1, 1))),
    ),
)
EXPERTS = Rule(
    "layers.*.gate_up",
    (
        Part("l.*.e.*.gate", (Each(0, 1), Narrow(0, 0, 6))),
        Part("l.*.e.*.up", (Each(0, 1), Narrow(0, 6, 6))),
    ),
)
TURNED = Rule("*.weight", (Part("*.w", (Permute((1, 0)),)),))


def reference(rule: Rule, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Canonical tensors by torch's own reshape, narrow and permute."""
    if rule is QKV:
        folded = tensor.reshape(GROUPS, HEADS + 2, WIDTH, HIDDEN)
        return {
            "l.7.q": folded[:, :HEADS],
            "l.7.k": folded[:, HEADS : HEADS + 1],
            "l.7.v": folded[:, HEADS + 1 :],
        }
    if rule is EXPERTS:
        return {
            f"l.7.e.{e}.{name}": tensor[e, rows]
            for e in range(tensor.shape[0])
            for name, rows in (("gate", slice(0, 6)), ("up", slice(6, 12)))
        }
    return {"proj.w": tensor.t()}


CASES = [
    (QKV, "layers.7.qkv", FUSED),
    (EXPERTS, "layers.7.gate_up", (4, 12, 5)),
    (TURNED, "proj.weight", (6, 9)),
]


@pytest.mark.parametrize(("rule", "key", "shape"), CASES)
def test_a_placement_is_the_view_that_torch_would_make(rule, key, shape):
    tensor = torch.arange(numel(shape)).reshape(shape)
    expected = reference(rule, tensor)
    found = dict.fromkeys(expected)
    for canonical, box, _ in Mapping([rule]).place(key, (Box.contiguous(shape),)):
        found[canonical] = tensor.as_strided(box.sizes, box.strides, box.start)
    for canonical, wanted in expected.items():
        assert torch.equal(found[canonical], wanted)


@pytest.mark.parametrize(("rule", "key", "shape"), CASES)
def test_the_same_list_writes_back_what_it_reads(rule, key, shape):
    tensor = torch.arange(numel(shape)).reshape(shape)
    canonical = reference(rule, tensor)
    back = torch.full_like(tensor, -1)
    for name, box, _ in Mapping([rule]).place(key, (Box.contiguous(shape),)):
        into = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        back.as_strided(box.sizes, box.strides, box.start).copy_(canonical[name][into])
    assert torch.equal(back, tensor)


@pytest.mark.parametrize(("rule", "key", "shape"), CASES)
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_any_cut_cover_the_whole_exactly_once(rule, key, shape, dim):
    tensor = torch.arange(numel(shape)).reshape(shape)
    for cut in range(1, shape[dim]):
        seen = {name: torch.zeros_like(t) for name, t in reference(rule, tensor).items()}
        for low, high in ((0, cut), (cut, shape[dim])):
            local = tensor.narrow(dim, low, high - low).contiguous().clone()
            offsets = tuple(low if d == dim else 0 for d in range(len(shape)))
            shard = Box(offsets, tuple(local.shape), 0, local.stride())
            for name, box, _ in Mapping([rule]).place(key, (shard,)):
                part = local.as_strided(box.sizes, box.strides, box.start)
                into = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                assert torch.equal(part, reference(rule, tensor)[name][into])
                seen[name][into] += 1
        assert all(bool((count == 1).all()) for count in seen.values())


def test_an_interval_of_k_factors_is_at_most_2k_minus_1_boxes():
    op = Unflatten(0, (4, 3, 5))
    for low in range(60):
        for high in range(low + 1, 61):
            boxes = [box for _, box in op.apply(Box((low,), (high - low,), 0, (1,)))]
            assert len(boxes) <= 5
            assert sum(numel(box.sizes) for box in boxes) == high - low


def test_missing_layers_do_not_shift_the_ones_that_exist():
    rule = rename("enc.layers.*.w", "dec.layers.*.w")
    table = Mapping([rule])
    placed = [table.place(f"enc.layers.{i}.w", (Box.contiguous((1,)),)) for i in (0, 2, 5)]
    names = [entries[0][0] for entries in placed if entries]
    assert names == ["dec.layers.0.w", "dec.layers.2.w", "dec.layers.5.w"]


def test_a_key_of_another_name_is_not_ours():
    assert Mapping([QKV]).place("layers.7.out", (Box.contiguous(FUSED),)) is None


def test_a_rule_whose_wildcards_do_not_add_up_is_refused():
    with pytest.raises(MappingError, match="wildcards"):
        rename("a.*.b", "a.b")
    with pytest.raises(MappingError, match="wildcards"):
        Rule("a.*", (Part("b.*.c.*"),))


def test_a_dim_that_does_not_fit_its_factors_is_refused():
    with pytest.raises(MappingError, match=r"17 cannot be unflattened"):
        list(Unflatten(0, (4, 4)).apply(Box.contiguous((17,))))
