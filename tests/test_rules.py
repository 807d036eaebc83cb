"""Rules, held against torch's reshapes: what a view holds, and how shards are cut."""

import pytest
import torch

from bioinit.errors import MappingError
from bioinit.layout import Box, numel
from bioinit.mapping import Mapping
from bioinit.rules import (
    Each,
    Narrow,
    Part,
    Permute,
    Reinterpret,
    Rule,
    Unflatten,
    dropped,
    rename,
    stacked,
)

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
GROUPED = Rule(  # megatron-core's GroupedMLP: (H, E * 2F) in memory, meant as (E, H, 2F)
    "layers.*.weight1",
    tuple(
        Part(
            f"l.*.e.*.{name}",
            (Reinterpret((5, 24), (2, 5, 12)), Each(0, 1), Permute((1, 0)), Narrow(0, start, 6)),
        )
        for name, start in (("gate", 0), ("up", 6))
    ),
)


def reference(rule: Rule, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Canonical tensors by torch's own reshape, narrow and permute."""
    if rule is QKV:
        folded = tensor.reshape(GROUPS, HEADS + 2, WIDTH, HIDDEN)
        return {
            "l.7.q": folded[:, :HEADS],
            "l.7.k": folded[:, HEADS : HEADS + 1],
            "l.7.v": folded[:, HEADS + 1 :],
        }
    if rule is GROUPED:
        experts = tensor.reshape(2, 5, 12)
        return {
            f"l.7.e.{e}.{name}": experts[e].t()[rows]
            for e in range(2)
            for name, rows in (("gate", slice(0, 6)), ("up", slice(6, 12)))
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
    (GROUPED, "layers.7.weight1", (5, 24)),
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


@pytest.mark.parametrize(("rule", "key", "shape"), CASES)
def test_a_table_says_which_tensors_it_has_for_canonical_ones(rule, key, shape):
    canonical = {n: tuple(t.shape) for n, t in reference(rule, torch.zeros(shape)).items()}
    assert Mapping([rule]).spelled_out(canonical) == {key: shape}


def test_what_is_written_is_the_first_spelling():
    table = Mapping([rename("new.*", "c.*"), rename("old.*", "c.*")])
    assert table.spelled_out({"c.0": (2,), "c.5": (2,), "unknown": (1,)}) == {
        "new.0": (2,),
        "new.5": (2,),
    }


def test_layers_on_a_dim_of_their_own_are_the_same_boxes():
    shape = (3, *FUSED)
    tensor = torch.arange(numel(shape)).reshape(shape)
    table = Mapping([stacked(QKV), QKV])
    assert stacked(QKV).pattern_text == "layers.qkv"
    names = ("l.{}.q", "l.{}.k", "l.{}.v")
    found = table.place("layers.qkv", (Box.contiguous(shape),))
    assert sorted(p.key for p in found) == sorted(n.format(i) for i in range(3) for n in names)
    for key, box, _ in found:
        number = int(key.split(".")[1])
        wanted = reference(QKV, tensor[number])[f"l.7.{key[-1]}"]
        assert torch.equal(tensor.as_strided(box.sizes, box.strides, box.start), wanted)
    canonical = {p.key: p.box.sizes for p in found}
    assert table.spelled_out(canonical) == {"layers.qkv": shape}


def test_stacked_layers_and_experts_keep_their_own_numbers():
    shape = (2, 4, 12, 5)
    found = Mapping([stacked(EXPERTS)]).place("layers.gate_up", (Box.contiguous(shape),))
    assert {p.key for p in found} == {
        f"l.{i}.e.{e}.{name}" for i in range(2) for e in range(4) for name in ("gate", "up")
    }
    canonical = {p.key: p.box.sizes for p in found}
    assert Mapping([stacked(EXPERTS)]).spelled_out(canonical) == {"layers.gate_up": shape}


def test_layers_that_are_missing_in_a_stack_are_an_error():
    canonical = {"l.0.e.0.gate": (6, 5), "l.0.e.1.gate": (6, 5), "l.1.e.0.gate": (6, 5)}
    with pytest.raises(MappingError, match="missing, or differ"):
        Mapping([stacked(EXPERTS)]).spelled_out(canonical)


def test_padding_is_narrowed_away_and_put_back():
    rule = Rule("emb", (Part("words", (Narrow(0, 0, 33, 40),)),), fill=True)
    ((key, box, _),) = Mapping([rule]).place("emb", (Box.contiguous((40, 8)),))
    assert (key, box) == ("words", Box((0, 0), (33, 8), 0, (8, 1)))
    assert Mapping([rule]).spelled_out({"words": (33, 8)}) == {"emb": (40, 8)}
    inside_the_padding = Box((36, 0), (4, 8), 0, (8, 1))
    assert Mapping([rule]).place("emb", (inside_the_padding,)) == []


def test_a_dialect_may_count_its_layers_from_another_number():
    rule = Rule("*.norm", (Part("layers.*.norm"),), shift=-2)
    table = Mapping([rename("0.words", "words"), rule])
    assert table.place("1.norm", (Box.contiguous((4,)),)) is None, "there is no layer -1"
    assert [p.key for p in table.place("2.norm", (Box.contiguous((4,)),))] == ["layers.0.norm"]
    assert [p.key for p in table.place("13.norm", (Box.contiguous((4,)),))] == ["layers.11.norm"]
    assert table.spelled_out({"layers.11.norm": (4,), "words": (9, 4)}) == {
        "13.norm": (4,),
        "0.words": (9, 4),
    }


def test_a_tensor_that_nobody_needs_is_known_and_has_no_place():
    rule = dropped("layers.*.inv_freq", "computed")
    assert Mapping([rule]).place("layers.3.inv_freq", (Box.contiguous((4,)),)) == []
    assert Mapping([rule]).spelled_out({"layers.3.inv_freq": (4,)}) == {}


@pytest.mark.parametrize(
    "op", [Permute((0,)), Permute((0, 2)), Permute((1, 1)), Narrow(5, 0, 2), Each(3, 0)]
)
def test_an_operation_on_dims_that_a_tensor_does_not_have_is_refused(op):
    to = "v.*" if isinstance(op, Each) else "v"
    with pytest.raises(MappingError, match="dims"):
        Mapping([Rule("w", (Part(to, (op,)),))]).place("w", (Box.contiguous((4, 4)),))


def test_reading_as_another_shape_needs_as_many_elements():
    op = Reinterpret((4, 6), (3, 9))
    with pytest.raises(MappingError, match=r"\(3, 9\)"):
        list(op.apply(Box.contiguous((4, 6))))
    with pytest.raises(MappingError, match="larger than"):
        list(Reinterpret((4, 6), (3, 8)).apply(Box.contiguous((5, 6))))
