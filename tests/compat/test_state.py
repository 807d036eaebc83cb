"""State transforms. Values in the tables are those of NeMo 8cfedd720, which was run for them."""

import logging
import types

import numpy
import pytest
import torch
from torch import nn

from bioinit.compat.nemo import io
from bioinit.compat.nemo.io.state import (
    StateDictTransform,
    TransformCTX,
    TransformError,
    TransformFns,
    UnpairedNames,
    state_transform,
)
from bioinit.errors import MappingError

MANY = tuple(range(11))


def names(pattern, *captures):
    """Each name, with what it stands for as its value."""
    return {pattern.format(*each): "".join(map(str, each)) for each in captures}


def each(*values):
    return [(value,) for value in values]


def grid(some, more):
    return [(one, other) for one in some for other in more]


def made(source, target, source_key, target_key, *function):
    ctx = TransformCTX(nn.Module(), source, nn.Module(), dict.fromkeys(target))
    assert StateDictTransform(source_key, target_key, *function)(ctx) is ctx
    return ctx.target_state


JOINED = names("a.{}.{}_proj.w", *grid((0, 1), "qkv"))
PAIRED = [
    pytest.param(
        names("a.{}.w", *each(*MANY)),
        ("a.*.w", "b.*.w"),
        names("b.{}.w", *each(*MANY)),
        id="ten comes after nine",
    ),
    pytest.param(
        names("m.layers.{}.w", *each(*MANY)),
        ("**.w", "**.v"),
        names("d.blocks.{}.v", *each(*MANY)),
        id="another way to the same layer",
    ),
    pytest.param(
        names("m.{}.e.{}.g", *grid((1, 2), MANY)),
        ("m.*.e.*.g", "d.*.e.w*"),
        names("d.{}.e.w{}", *grid((1, 2), MANY)),
        id="two wildcards",
    ),
    pytest.param(
        JOINED,
        ("a.*.*_proj.w", "b.*.w", lambda *parts: "".join(parts)),
        {"b.0.w": "0k0q0v", "b.1.w": "1k1q1v"},
        id="gathered in order",
    ),
    pytest.param(
        JOINED,
        ("a.*.*_proj.w", "b.*.w", lambda k, q, v: q + k + v),
        {"b.0.w": "0q0k0v", "b.1.w": "1q1k1v"},
        id="gathered by position",
    ),
    pytest.param(
        names("a.{}.{}.w", *grid((0,), "qkv")),
        ("a.*.*.w", "b", lambda *parts: "".join(parts)),
        {"b": "0k0q0v"},
        id="gathered into one name",
    ),
    pytest.param(
        names("m.{}.up", *each(0, 1)),
        ("m.*.up", "d.*.e.w*", lambda x: [x + letter for letter in "abc"]),
        {f"d.{i}.e.w{j}": f"{i}{letter}" for i in (0, 1) for j, letter in enumerate("abc")},
        id="one stack for all experts",
    ),
    pytest.param(
        names("a.{}.w", *each(0, 1)),
        ("a.*.w", ("b.*.g", "b.*.u"), lambda x: (x + "g", x + "u")),
        {"b.0.g": "0g", "b.1.g": "1g", "b.0.u": "0u", "b.1.u": "1u"},
        id="several targets",
    ),
    pytest.param(
        {"a": "1"},
        ("a", ("b", "c"), lambda x: (x + "b", x + "c")),
        {"b": "1b", "c": "1c"},
        id="several targets without wildcards",
    ),
    pytest.param(
        names("a.{}.w", *each(*"qkv")),
        ("a.*.w", ("b.*.w",), lambda *parts: parts),
        names("b.{}.w", *each(*"qkv")),
        id="a tuple of one target",
    ),
    pytest.param(
        names("m.l.{}.{}", *grid(MANY, "gu")),
        (("**.g", "**.u"), "**.w", lambda ctx, g, u: g + u),
        {f"d.b.{i}.w": f"{i}g{i}u" for i in MANY},
        id="several sources",
    ),
    pytest.param(
        names("m.{}.e.{}.{}", *((i, j, p) for i in (1, 2) for j in (0, 1, 10) for p in "gu")),
        (("m.*.e.*.g", "m.*.e.*.u"), "d.*.e.w*", lambda g, u: g + u),
        {f"d.{i}.e.w{j}": f"{i}{j}g{i}{j}u" for i in (1, 2) for j in (0, 1, 10)},
        id="several sources with two wildcards",
    ),
    pytest.param(
        names("a.{}.{}", *grid((0, 1), "qk")),
        ({"k": "a.*.k", "q": "a.*.q"}, "b.*.w", lambda q, k: f"{q}/{k}"),
        {"b.0.w": "0q/0k", "b.1.w": "1q/1k"},
        id="sources by parameter",
    ),
    pytest.param(
        names("a.{}.{}", *grid((0, 1), "qk")),
        (("a.*.q", "a.*.k"), "b.*.w", lambda ctx, *, q, k: q + k),
        {"b.0.w": "0q0k", "b.1.w": "1q1k"},
        id="keyword-only parameters",
    ),
    pytest.param({"a.1.w": "1"}, ("a.*.w", "b"), {"b": "1"}, id="a wildcard that caught one name"),
    pytest.param({"a": "1"}, ("a", "b.*.w"), {"b.1.w": "1"}, id="one name for a wildcard"),
]
BEYOND = [  # where the original fails
    pytest.param(
        names("a.{}.w", *each(0, "final")),
        ("a.*.w", "b.*.w"),
        names("b.{}.w", *each(0, "final")),
        id="numbers beside words",
    ),
    pytest.param({"a+b[0]": "1"}, ("a+b[0]", "c"), {"c": "1"}, id="signs of regular expressions"),
    pytest.param(
        names("a.{}.{}", *grid((0, 1), "qk")),
        (("a.*.q", "a.*.k"), "b.*.w", lambda q, k, ctx: q + k),
        {"b.0.w": "0q0k", "b.1.w": "1q1k"},
        id="the context last",
    ),
    pytest.param(
        names("a.{}.{}", *grid((0, 1), "qk")),
        (("a.*.q", "a.*.k"), "b.*.w", lambda *parts: "".join(parts)),
        {"b.0.w": "0q0k", "b.1.w": "1q1k"},
        id="any number of sources",
    ),
    pytest.param(
        {"a.0.w": "0"}, ("a.*.w", "b.*.w", lambda x, y="y": x + y), {"b.0.w": "0y"}, id="a default"
    ),
    pytest.param({"a": [1, 2]}, ("a", "b", len), {"b": 2}, id="a builtin"),
]


@pytest.mark.parametrize(("source", "line", "expected"), PAIRED + BEYOND)
def test_names_are_paired_by_what_wildcards_caught(source, line, expected):
    backwards = dict(reversed(source.items()))
    assert made(backwards, expected, *line) == expected


@pytest.mark.parametrize(("source", "line", "expected"), [PAIRED[0]])
def test_what_a_line_does_not_name_stays(source, line, expected):
    assert made({**source, "z": 1}, [*expected, "y"], *line) == {**expected, "y": None}


def test_a_decorated_function_is_a_transform():
    @state_transform(source_key="a.*.w", target_key="b.*.w")
    def twice(ctx, w):
        assert ctx.source is None
        return 2 * w

    ctx = TransformCTX(None, {"a.7.w": 3}, None, {"b.7.w": 0})
    assert twice(ctx).target_state == {"b.7.w": 6}
    assert (twice.source_key, twice.target_key) == ("a.*.w", "b.*.w")
    assert twice.call_transform(ctx, 4) == twice.call_transform(ctx, w=4) == 8
    direct = io.state_transform("a.*.w", "b.*.w", twice.transform)
    assert isinstance(direct, io.StateDictTransform[types.FunctionType].__origin__)
    assert direct(ctx).target_state == {"b.7.w": 6}


ALONE = [  # what the original made of it
    pytest.param((0, 2, 5), (0, 1, 2), ["a.5.w", "b.1.w"], id="layer 2 in layer 1"),
    pytest.param((0, 1, 2), (0, 1), ["a.2.w"], id="layer 2 dropped"),
    pytest.param((0, 1), (0, 1, 2), ["b.2.w"], id="IndexError"),
    pytest.param((), (0,), ["a.*.w", "b.0.w"], id="IndexError without sources"),
    pytest.param((0,), (), ["b.*.w", "a.0.w"], id="nothing at all"),
]


@pytest.mark.parametrize(("source", "target", "named"), ALONE)
def test_a_name_without_a_partner_is_an_error_that_names_it(source, target, named):
    have, want = names("a.{}.w", *each(*source)), names("b.{}.w", *each(*target))
    for key, function in (("a.*.w", lambda x: x), (("a.*.w",), lambda x: x)):
        with pytest.raises(UnpairedNames) as caught:
            made(have, want, key, "b.*.w", function)
        for kind in (ValueError, IndexError, MappingError):
            assert isinstance(caught.value, kind)
        said = str(caught.value)
        assert all(repr(name) in said or f" {name} " in said for name in named)


WRONG = [  # and what the original made of it
    pytest.param({"x": 1}, "y", ("z", "y"), "No matches found for source key: z", id="ValueError"),
    pytest.param({"x": 1}, "y", ("x", "z"), "No matches found for target key: z", id="ValueError "),
    pytest.param({"x": 1}, "y", ("[xy]", "y"), "regular expressions do not", id="a choice"),
    pytest.param({"q": 1}, "b", (("q", "k"), "b", max), "source key: k", id="KeyError: None"),
    pytest.param(
        {"q": 1, "k": 2}, "b", (("q", "k"), "c", max), "target key: c", id="made for None"
    ),
    pytest.param({"q": 1, "k": 2}, "bc", (("q", "k"), ("b", "c"), max), "several", id="lost"),
    pytest.param({"q": 1}, "b", ("q", {"a": "b"}), "must be a string or a tuple", id="a dict"),
    pytest.param(JOINED, ["b"], ("a.0.*_proj.w", "b"), "'b' is one name", id="the first one taken"),
    pytest.param({"a": 1}, ["b.0", "b.1"], ("a", "b.*"), "'a' is one name", id="bad index"),
    pytest.param(
        {k: v for k, v in JOINED.items() if k != "a.1.v_proj.w"},
        ["b.0.w", "b.1.w"],
        ("a.*.*_proj.w", "b.*.w", lambda *parts: parts),
        "'a.1.v_proj.w' is missing",
        id="a hole",
    ),
    pytest.param(
        names("a.{}.{}", *grid((0, 1), "qkv")),
        names("b.{}.{}", *grid((0, 1), "qkv")),
        ("a.*.*", ("b.*.q", "b.*.k", "b.*.v"), lambda x: x),
        "a wildcard more than the others",
        id="query and key swapped",
    ),
    pytest.param(
        names("l.{}.e.{}", *grid((0, 1), (0, 1))),
        names("e.{}.l.{}", *grid((0, 1), (0, 1))),
        ("l.*.e.*", "e.*.l.*"),
        "paired by position",
        id="experts for layers",
    ),
    pytest.param(
        names("a.{}.w", *each(*MANY)),
        names("d.b.{}.v", *each(*MANY)),
        ("a.*.w", "**.v"),
        "'a.2.w', .*same wildcards",
        id="layer 9 in layer 8",
    ),
    pytest.param(
        {"m.layers.0.w": 0, "m.layers.1.w": 1, "m.mtp.61.w": 61},
        ["d.layers.0.v", "d.layers.1.v", "mtp.layers.0.t.v"],
        ("**.w", "**.v"),
        "'m.mtp.61.w'",
        id="layer 61 by luck",
    ),
    pytest.param(
        {"a.0.w": 0, "b.0.w": 1},
        ["x.0.v", "y.0.v"],
        ("**.w", "**.v"),
        "'a.0.w', 'b.0.w'",
        id="in the order of the alphabet",
    ),
    pytest.param(
        names("x.{}.{}.{}", (0, 1, 2)), ["y.0"], ("x.*.*.*", "y.*", max), "3 wildcards", id="deep"
    ),
]


@pytest.mark.parametrize(("source", "target", "line", "message"), WRONG)
def test_a_line_that_does_not_fit_says_what_it_found(source, target, line, message):
    with pytest.raises(ValueError, match=message) as caught:
        made(source, target, *line)
    assert isinstance(caught.value, TransformError)


LAYERS = names("a.{}.w", *each(0, 1))
FUNCTIONS = [
    ("a.*.w", ["b.0.w", "b.1.w"], "b.*.w", lambda ctx: 0, "Expected 0 arguments.* but got 1"),
    ("a.*.w", ["b.0.w", "b.1.w"], "b.*.w", lambda x, y: 0, "Mismatch between source and target"),
    (("a.0.w", "a.1.w"), ["b"], "b", lambda x: 0, "Expected 1 arguments.* but got 2"),
    (("a.0.w",), ["b"], "b", lambda x, y: 0, "Expected 2 arguments.* but got 1"),
    ({"z": "a.0.w"}, ["b"], "b", lambda x: 0, "but got 1 .'z'."),
    ("a.*.w", ["b.0.w", "b.1.w"], "b.*.w", lambda x: None, "None for 'b.0.w'"),
    ("a.0.w", ["b", "c"], ("b", "c"), lambda x: (x,), "gives 1 where 2"),
    ("a.0.w", ["b", "c"], ("b", "c"), lambda x: (x, x, x), "gives 3 where 2"),
    ("a.0.w", ["b", "c"], ("b", "c"), lambda x: 7, "gives a int where 2"),
    ("a.*.w", ["b.0.e0", "b.1.e0"], "b.*.e*", lambda x: [x, x], "gives 2 where 1"),
]


@pytest.mark.parametrize(("source_key", "target", "target_key", "function", "message"), FUNCTIONS)
def test_what_a_function_takes_and_gives_is_counted(
    source_key, target, target_key, function, message
):
    with pytest.raises(TransformError, match=message):
        made(LAYERS, target, source_key, target_key, function)


def test_a_line_that_meets_nothing_on_either_side_is_only_said(caplog):
    with caplog.at_level(logging.WARNING, logger="bioinit"):
        assert made({"x": 1}, ["y"], "a.*.w", "b.*.w") == {"y": None}
    assert "No matches found" in caplog.text


def test_an_error_of_a_function_says_for_which_names():
    with pytest.raises(ZeroDivisionError) as caught:
        made(LAYERS, ["b.0.w", "b.1.w"], "a.*.w", "b.*.w", lambda x: 1 / 0)
    assert "a.0.w" in caught.value.__notes__[0]


def test_printing_of_arrays_stays_as_it_was():
    before = numpy.get_printoptions()
    made(LAYERS, ["b.0.w", "b.1.w"], "a.*.w", "b.*.w")
    assert numpy.get_printoptions() == before


def heads(cols=3):
    """4 heads, 2 groups, 2 rows a head; as in the table of the specification."""
    config = types.SimpleNamespace(
        num_attention_heads=4, num_query_groups=2, kv_channels=2, hidden_size=3, vocab_size=4
    )
    model = types.SimpleNamespace(config=config)
    q, k, v = (torch.arange(rows) + start for rows, start in ((8, 0), (4, 1000), (4, 2000)))
    wide = [each[:, None] * 10 + torch.arange(cols) for each in (q, k, v)]
    return TransformCTX(model, {}, model, {}), (q, k, v), wide


JOINED_ROWS = [0, 1, 2, 3, 1000, 1001, 2000, 2001, 4, 5, 6, 7, 1002, 1003, 2002, 2003]


@pytest.mark.parametrize("cols", [3, 2])  # a LoRA has other columns than hidden_size
def test_queries_keys_and_values_are_joined_by_group(cols):
    ctx, thin, wide = heads(cols)
    weight = torch.tensor(JOINED_ROWS)[:, None] * 10 + torch.arange(cols)
    assert TransformFns.merge_qkv(ctx, *wide).equal(weight)
    assert TransformFns.merge_qkv_concat(ctx, torch.cat(wide)).equal(weight)
    assert TransformFns.merge_qkv_bias(ctx, *thin).tolist() == JOINED_ROWS
    assert TransformFns.merge_qkv_bias_concat(ctx, torch.cat(thin)).tolist() == JOINED_ROWS
    assert all(map(torch.equal, TransformFns.split_qkv(ctx, weight), wide))
    bias = torch.tensor(JOINED_ROWS, dtype=torch.bfloat16)
    back = TransformFns.split_qkv_bias(ctx, bias)
    assert torch.cat(back).dtype == torch.bfloat16
    assert all(map(torch.equal, back, (each.bfloat16() for each in thin)))


def test_split_parts_share_no_memory_with_the_source():
    ctx, _, _ = heads()
    ctx.source.config.num_query_groups = 1
    joined = torch.zeros(12, 3)
    for part in TransformFns.split_qkv(ctx, joined):
        part += 1
    assert not joined.any()


def test_the_two_parts_of_a_gated_mlp_and_copies_and_padding():
    ctx, _, _ = heads()
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    joined = TransformFns.merge_fc1(gate, up)
    assert joined.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert all(map(torch.equal, TransformFns.split_fc1(joined), (gate, up)))
    assert TransformFns.duplicate2(up) == (up, up)
    assert TransformFns.duplicate3(up) == (up, up, up)
    assert TransformFns.prune_padding(ctx, torch.zeros(6, 3)).shape == (4, 3)


def test_a_tensor_without_the_rows_of_the_heads_is_an_error():
    ctx, thin, wide = heads()
    few = torch.zeros(14, 3)
    for function, tensors in (
        (TransformFns.split_qkv, (few,)),
        (TransformFns.split_qkv_bias, (few[:, 0],)),
        (TransformFns.merge_qkv, (*wide[:2], wide[2][:2])),
        (TransformFns.merge_qkv_bias, (*thin[:2], thin[2][:2])),
        (TransformFns.merge_qkv_concat, (few,)),
        (TransformFns.prune_padding, (few[:3],)),
    ):
        with pytest.raises(ValueError, match="config"):
            function(ctx, *tensors)
    with pytest.raises(RuntimeError, match="two halves"):  # the original: 2 rows and 1 row
        TransformFns.split_fc1(torch.zeros(3, 3))
    ctx.source.config.num_query_groups = 3
    with pytest.raises(TransformError, match="num_query_groups=3"):
        TransformFns.split_qkv(ctx, few)


def test_a_config_that_is_not_finished_has_a_group_for_each_head():
    ctx, _, _ = heads()
    config = ctx.target.config
    config.num_query_groups = config.kv_channels = None
    config.hidden_size = 8
    parts = [torch.arange(8) + start for start in (0, 100, 200)]
    joined = TransformFns.merge_qkv_bias(ctx, *parts)
    assert joined.tolist()[:8] == [0, 1, 100, 101, 200, 201, 2, 3]
