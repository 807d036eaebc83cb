"""Transforms: paired by what wildcards caught, checked before a byte is read, one call each."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import bioinit
from bioinit.errors import MappingError, PlanError
from bioinit.mapping import Mapping, Names
from bioinit.rules import Narrow, Part, Rule, rename
from bioinit.transforms import transform
from bioinit.transforms.claims import across, conversions, promised, way_back

KEEP = rename("**", "**")


@transform(sources=("old.*.q", "old.*.k"), target="new.*.qk", inverse=lambda qk: qk.chunk(2))
def fuse(q, k):
    return torch.cat([q, k])


@transform(sources="old.*.experts.*.w", target="new.*.experts", inverse=lambda all: all.unbind())
def stack(experts):
    return torch.stack(experts)


class Own(nn.Module):
    """Parameters of any names and shapes, all on meta."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for key, shape in shapes.items():
            owner: nn.Module = self
            *path, name = key.replace("__", ".").split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


def numbered(*shape, start=0):
    size = int(np.prod(shape))
    return torch.arange(start, start + size, dtype=torch.float32).reshape(shape)


@pytest.fixture
def load(tmp_path):
    """Store tensors, load them into a model with a mapping, give the model's state."""

    def run(stored, model, mapping, **policy):
        save_file(stored, tmp_path / "model.safetensors")
        report = bioinit.load_weights(model, tmp_path, mapping=mapping, **policy)
        return dict(model.state_dict()), report

    return run


def shapes(*names, shape=(2, 3)):
    return dict.fromkeys(names, shape)


def made(mapping, stored, keys):
    found = conversions(mapping, stored, {key: key for key in keys})
    return {c.targets: c.sources for c in found}


# ------------------------------------------------------------------ when it is declared


def test_a_transform_is_still_the_function():
    assert torch.equal(fuse(torch.zeros(1), torch.ones(1)), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    "function",
    [lambda a: a, lambda a, b, c: a, lambda a, *, b: a, lambda a, b, *, c: a, lambda: None],
)
def test_a_function_that_takes_another_number_is_refused_when_it_is_declared(function):
    with pytest.raises(MappingError, match=r"gets 2 tensors, from 'a\.\*', 'b\.\*'"):
        transform(sources=("a.*", "b.*"), target="c.*")(function)


@pytest.mark.parametrize(
    "function",
    [lambda x, y: x, lambda *rest: rest, lambda x, *rest: x, lambda x, y, z=1, *, dim=0: x],
)
def test_the_names_of_parameters_are_its_own_and_rest_takes_the_rest(function):
    assert transform(sources=("a.*", "b.*"), target="c.*")(function).function is function


def test_an_inverse_that_takes_another_number_is_refused_as_well():
    with pytest.raises(MappingError, match="the inverse of transform"):
        transform(sources="a", target=("b", "c"), inverse=lambda b: b)(lambda a: (a, a))


def test_a_function_that_does_not_say_what_it_takes_is_refused():
    with pytest.raises(MappingError, match="Write a function with def"):
        transform(sources="a.*", target="b.*")(dict)


@pytest.mark.parametrize(
    ("sources", "target", "match"),
    [
        ((), "a", "names nothing"),
        (("a", "a"), "b", "names a pattern twice"),
        ("a", ("b", "b"), "names a pattern twice"),
        (("a.*.*.w", "b.*"), "c.*.*", "has 1 wildcards, but 2 tell the calls apart"),
        ("a.**.w", "b.*.w", "differ"),
    ],
)
def test_patterns_that_cannot_be_paired_are_refused_when_they_are_declared(sources, target, match):
    with pytest.raises(MappingError, match=match):
        transform(sources=sources, target=target)(lambda *rest: rest)


# ------------------------------------------------------------------ who is paired with whom


def test_captures_are_compared_by_value_and_never_by_order():
    stored = shapes("old.11.k", "old.2.q", "old.2.k", "old.5.k", "old.11.q", "old.5.q")
    keys = ["new.11.qk", "new.5.qk", "new.2.qk"]
    assert made(Mapping([fuse]), stored, keys) == {
        (f"new.{n}.qk",): (f"old.{n}.q", f"old.{n}.k") for n in (2, 5, 11)
    }


def test_words_and_numbers_may_be_caught_by_one_wildcard():
    stored = shapes("old.0.q", "old.0.k", "old.final.q", "old.final.k")
    assert set(made(Mapping([fuse]), stored, ["new.0.qk", "new.final.qk"])) == {
        ("new.0.qk",),
        ("new.final.qk",),
    }


def test_other_signs_in_a_name_mean_themselves():
    plain = transform(sources="a+b[0].*", target="c.*")(lambda x: x)
    assert made(Mapping([plain]), shapes("a+b[0].1"), ["c.1"]) == {("c.1",): ("a+b[0].1",)}
    with pytest.raises(MappingError, match="catches none"):
        conversions(Mapping([plain]), shapes("aab0.1"), {})


def test_a_wildcard_that_the_target_lacks_is_gathered_in_numeric_order():
    names = [f"old.{layer}.experts.{n}.w" for layer in (0, 3) for n in (10, 2, 0, 1, *range(3, 10))]
    assert made(Mapping([stack]), shapes(*names), ["new.0.experts", "new.3.experts"]) == {
        (f"new.{layer}.experts",): tuple(f"old.{layer}.experts.{n}.w" for n in range(11))
        for layer in (0, 3)
    }


def test_the_gathered_wildcard_is_the_one_after_another_word():
    turned = transform(sources="experts.*.layers.*.w", target="layers.*.w")(
        lambda ws: torch.stack(ws)
    )
    names = [f"experts.{e}.layers.{layer}.w" for e in range(2) for layer in range(2)]
    assert made(Mapping([turned]), shapes(*names), ["layers.0.w", "layers.1.w"]) == {
        (f"layers.{n}.w",): (f"experts.0.layers.{n}.w", f"experts.1.layers.{n}.w") for n in (0, 1)
    }


def test_a_wildcard_that_only_targets_have_is_handed_out(load):
    split = transform(sources="old.*.w", target="new.*.experts.*")(lambda w: w.unbind())
    model = Own(**{f"new.0.experts.{n}": (4,) for n in range(11)})
    state, _ = load({"old.0.w": numbered(11, 4)}, model, Mapping([split]))
    assert [int(state[f"new.0.experts.{n}"][0]) for n in range(11)] == [4 * n for n in range(11)]


def test_a_source_without_wildcards_is_given_to_every_call(load):
    scaled = transform(sources=("old.*.w", "scale"), target="new.*.w")(lambda w, s: w * s)
    model = Own(**{"new.0.w": (2,), "new.1.w": (2,)})
    stored = {"old.0.w": numbered(2), "old.1.w": numbered(2, start=5), "scale": torch.tensor([3.0])}
    state, report = load(stored, model, Mapping([scaled]))
    assert state["new.0.w"].tolist() == [0, 3] and state["new.1.w"].tolist() == [15, 18]
    assert not report.unused


# ------------------------------------------------------------------ coverage, before a byte is read


def test_a_pattern_that_catches_nothing_is_an_error_with_the_closest_name():
    with pytest.raises(MappingError, match=r"'old\.\*\.k' catches none of the 1 names"):
        conversions(Mapping([fuse]), shapes("old.0.q"), {"new.0.qk": "new.0.qk"})


def test_a_layer_without_one_of_its_sources_is_named():
    stored = shapes("old.0.q", "old.0.k", "old.1.q", "old.2.q", "old.2.k")
    with pytest.raises(MappingError, match=r"'old\.1\.k' is missing"):
        conversions(Mapping([fuse]), stored, {f"new.{n}.qk": "" for n in range(3)})


def test_gathered_numbers_with_a_gap_are_an_error():
    stored = shapes(*(f"old.0.experts.{n}.w" for n in (0, 1, 3)))
    with pytest.raises(MappingError, match=r"'old\.0\.experts\.\*\.w' gathers 3 numbers .* 2 is m"):
        conversions(Mapping([stack]), stored, {"new.0.experts": "new.0.experts"})


def test_sources_that_gather_different_experts_are_an_error():
    both = transform(sources=("l.*.e.*.w1", "l.*.e.*.w3"), target="l.*.e.w")(lambda a, b: a)
    stored = shapes("l.0.e.0.w1", "l.0.e.1.w1", "l.0.e.0.w3")
    with pytest.raises(MappingError, match=r"'1' is gathered from one source and not .* at 0"):
        conversions(Mapping([both]), stored, {"l.0.e.w": "l.0.e.w"})


def test_a_target_that_the_model_lacks_is_an_error_with_the_closest_key():
    stored = shapes("old.0.q", "old.0.k")
    with pytest.raises(MappingError, match=r"'new\.0\.qk' for one\. Closest: 'new\.0\.kq'"):
        conversions(Mapping([fuse]), stored, {"new.0.kq": "new.0.kq"})


def test_half_of_several_targets_is_an_error():
    pair = transform(sources="a.*", target=("b.*", "c.*"))(lambda a: a.chunk(2))
    with pytest.raises(MappingError, match=r"makes 'c\.0' too, which the model does not have"):
        conversions(Mapping([pair]), shapes("a.0"), {"b.0": "b.0"})


def test_layers_beyond_the_model_are_left_unused_and_reported(load):
    stored = {f"old.{n}.{kind}": numbered(1, 2) for n in range(3) for kind in "qk"}
    _, report = load(stored, Own(**{"new.1.qk": (2, 2)}), Mapping([fuse]))
    assert {unused.key for unused in report.unused} == {
        f"old.{n}.{kind}" for n in (0, 2) for kind in "qk"
    }


def test_a_source_that_two_transforms_catch_is_an_error():
    other = transform(sources="old.*.q", target="other.*")(lambda q: q)
    stored = shapes("old.0.q", "old.0.k")
    with pytest.raises(MappingError, match=r"'old\.0\.q' is caught twice.*fuse.*lambda"):
        conversions(Mapping([fuse, other]), stored, {k: k for k in ("new.0.qk", "other.0")})


def test_a_source_that_one_call_catches_twice_is_an_error():
    both = transform(sources=("a.*", "a.0"), target="b.*")(lambda x, y: x)
    with pytest.raises(MappingError, match="catches a tensor twice at 0"):
        conversions(Mapping([both]), shapes("a.0"), {"b.0": "b.0"})


def test_a_target_that_two_transforms_make_is_an_error():
    other = transform(sources="other.*", target="new.*.qk")(lambda q: q)
    stored = shapes("old.0.q", "old.0.k", "other.0")
    with pytest.raises(MappingError, match=r"'new\.0\.qk' is claimed twice"):
        conversions(Mapping([fuse, other]), stored, {"new.0.qk": "new.0.qk"})


def test_a_target_that_a_rule_leads_another_tensor_to_is_an_error():
    stored = shapes("old.0.q", "old.0.k", "new.0.qk")
    with pytest.raises(MappingError, match=r"'new\.0\.qk' is claimed twice: transform fuse"):
        conversions(Mapping([fuse, KEEP]), stored, {"new.0.qk": "new.0.qk"})


def test_rules_say_nothing_of_what_a_transform_takes(load):
    taken = transform(sources="a.*", target="b.*")(lambda a: a + 1)
    rules = [rename("a.*", "c.*"), rename("x.*", "c.*")]
    model = Own(**{"b.0": (2,), "c.0": (2,)})
    state, _ = load({"a.0": numbered(2), "x.0": numbered(2)}, model, Mapping([*rules, taken]))
    assert state["b.0"].tolist() == [1, 2] and state["c.0"].tolist() == [0, 1]


def test_a_tied_target_goes_to_the_key_that_owns_the_memory(load):
    model = Own(**{"embed.w": (2, 2), "head.w": (2, 2)})
    model.head.w = model.embed.w
    grown = transform(sources="old", target="head.w")(lambda old: old + 1)
    state, report = load({"old": numbered(2, 2)}, model, Mapping([grown]))
    assert torch.equal(state["embed.w"], numbered(2, 2, start=1))
    assert {claim.key: claim.claim for claim in report.claims} == {
        "embed.w": "loaded",
        "head.w": "tied",
    }


@pytest.mark.parametrize("line", [lambda q, k: q, "old.* -> new.*", ("old.*", "new.*")])
def test_a_line_that_is_neither_rule_nor_transform_is_an_error(load, line):
    with pytest.raises(MappingError, match="neither a rule nor a transform"):
        load({"same": numbered(2)}, Own(same=(2,)), Mapping([KEEP, line]))


def test_two_rules_for_one_place_are_an_error_that_names_both(load):
    rules = Mapping([rename("a.*", "c.*"), rename("b.*", "c.*")])
    with pytest.raises(MappingError, match=r"'c\.0' is claimed twice: by 'a\.0'.* and by 'b\.0'"):
        load({"a.0": numbered(2), "b.0": numbered(2)}, Own(**{"c.0": (2,)}), rules)


def test_two_rules_for_two_halves_of_one_tensor_are_none(load):
    low, high = Part("c", (Narrow(0, 0, 2),)), Part("d", (Narrow(0, 2, 2),))
    model = Own(c=(2,), d=(2,))
    state, _ = load({"a": numbered(4)}, model, Mapping([Rule("a", (low, high))]))
    assert state["c"].tolist() == [0, 1] and state["d"].tolist() == [2, 3]


# ------------------------------------------------------------------ what is done


def test_rules_and_transforms_share_a_mapping(load):
    stored = {f"old.{n}.{kind}": numbered(1, 3, start=n) for n in range(2) for kind in "qk"}
    stored |= {"old.norm": numbered(3), "same": numbered(2)}
    model = Own(**{"new.0.qk": (2, 3), "new.1.qk": (2, 3), "norm": (3,), "same": (2,)})
    state, report = load(stored, model, Mapping([rename("old.norm", "norm"), fuse, KEEP]))
    assert torch.equal(state["new.1.qk"], torch.cat([stored["old.1.q"], stored["old.1.k"]]))
    assert torch.equal(state["norm"], stored["old.norm"])
    rules = {claim.key: claim.rule for claim in report.claims}
    assert rules["new.0.qk"] == "run transform fuse" and rules["same"] == "copy"


def test_several_targets_are_filled_in_order_by_one_call_each(load):
    calls = []

    @transform(sources="old.*.kv", target=("new.*.k", "new.*.v"))
    def halve(kv):
        calls.append(kv.is_meta)
        return kv.chunk(2)

    model = Own(**{f"new.{n}.{kind}": (1, 2) for n in range(2) for kind in "kv"})
    stored = {f"old.{n}.kv": numbered(2, 2, start=10 * n) for n in range(2)}
    state, _ = load(stored, model, Mapping([halve]))
    assert state["new.1.k"].tolist() == [[10, 11]] and state["new.1.v"].tolist() == [[12, 13]]
    assert calls.count(False) == 2  # and as often on meta, while the plan is made


def test_several_sources_may_make_several_targets(load):
    turned = transform(sources=("old.*.a", "old.*.b"), target=("new.*.sum", "new.*.difference"))(
        lambda a, b: (a + b, a - b)
    )
    model = Own(**{"new.7.sum": (2,), "new.7.difference": (2,)})
    stored = {"old.7.a": numbered(2, start=5), "old.7.b": numbered(2)}
    state, _ = load(stored, model, Mapping([turned]))
    assert state["new.7.sum"].tolist() == [5, 7]
    assert state["new.7.difference"].tolist() == [5, 5]


@given(
    layers=st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True),
    extra=st.lists(st.integers(0, 99), max_size=3, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_layer_meets_layer_whatever_is_missing_and_in_whatever_order(layers, extra, order):
    stored = [f"old.{n}.{kind}" for n in layers for kind in "qk"]
    order.shuffle(stored)
    keys = [f"new.{n}.qk" for n in {*layers, *extra}]
    order.shuffle(keys)
    assert made(Mapping([fuse]), shapes(*stored), keys) == {
        (f"new.{n}.qk",): (f"old.{n}.q", f"old.{n}.k") for n in layers
    }


def test_a_wrong_shape_is_a_problem_of_the_plan(load):
    with pytest.raises(PlanError, match=r"transform fuse makes \[2, 3\]"):
        load({"old.0.q": numbered(1, 3), "old.0.k": numbered(1, 3)},
             Own(**{"new.0.qk": (2, 2)}), Mapping([fuse]))  # fmt: skip


def test_a_function_that_fails_is_a_problem_of_the_plan_that_says_where(load):
    with pytest.raises(PlanError, match=r"transform fuse failed at 0 on tensors of \[1, 3\]"):
        load({"old.0.q": numbered(1, 3), "old.0.k": numbered(1, 2)},
             Own(**{"new.0.qk": (2, 3)}), Mapping([fuse]))  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.from_numpy(np.flip(x.numpy(), 0).copy()),
        lambda x: torch.tensor(list(reversed(x.tolist()))),
        lambda x: torch.flip(x, [0]) + torch.zeros(3),
        lambda x: torch.flip(x, [0]) if x.sum() > 0 else x,
    ],
    ids=["numpy", "lists", "other tensors", "a question"],
)
def test_a_function_that_needs_the_numbers_runs_when_they_are_there(load, function):
    state, _ = load({"a": numbered(3)}, Own(b=(3,)),
                    Mapping([transform(sources="a", target="b")(function)]))  # fmt: skip
    assert state["b"].tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (lambda a: (a, a, a), "gives 3 where 2 tensors are wanted"),
        (lambda a: a, "gives a Tensor where 2 tensors are wanted"),
        (lambda a: (a, None), "gives a NoneType for 'c'"),
    ],
)
def test_what_a_function_gives_is_counted(load, result, match):
    pair = transform(sources="a", target=("b", "c"))(result)
    with pytest.raises(PlanError, match=match):
        load({"a": numbered(2)}, Own(b=(2,), c=(2,)), Mapping([pair]))


def test_a_skipped_target_is_not_made(load):
    def never(a):
        raise AssertionError

    model = Own(b=(2,), same=(2,)).to_empty(device="cpu")
    nn.init.zeros_(model.b)
    skipped = Mapping([transform(sources="a", target="b")(never), KEEP])
    state, _ = load({"a": numbered(2), "same": numbered(2)}, model, skipped, skip_prefixes=("b",))
    assert state["b"].tolist() == [0, 0] and state["same"].tolist() == [0, 1]


def test_values_are_those_of_the_file_whatever_the_function_does_to_them(load):
    def destroy(a):
        a.zero_()
        return a

    stored = {"a": numbered(2) + 1, "same": numbered(2)}
    model = Own(b=(2,), same=(2,))
    state, _ = load(stored, model, Mapping([transform(sources="a", target="b")(destroy), KEEP]))
    assert state["b"].tolist() == [0, 0] and state["same"].tolist() == [0, 1]


def test_a_canonical_name_is_filled_under_the_models_own(tmp_path):
    save_file(
        {"old.0.q": numbered(1, 2), "old.0.k": numbered(1, 2)}, tmp_path / "model.safetensors"
    )
    model = Own(**{"mine.0.w": (2, 2)})
    names = Names(Mapping([fuse]), Mapping([rename("mine.*.w", "new.*.qk")]))
    bioinit.load_weights(model, tmp_path, mapping=names)
    assert model.state_dict()["mine.0.w"].tolist() == [[0, 1], [0, 1]]


# ------------------------------------------------------------------ the way back


def test_the_inverse_writes_what_was_read():
    there = Mapping([fuse, stack])
    canonical = {"new.4.qk": (2, 3), "new.4.experts": (12, 2, 3), "norm": (3,)}
    written, back = way_back(there, canonical)
    assert written == {"old.4.q": (1, 3), "old.4.k": (1, 3)} | {
        f"old.4.experts.{n}.w": (2, 3) for n in range(12)
    }
    values = {"new.4.qk": numbered(2, 3), "new.4.experts": numbered(12, 2, 3)}
    stored = {}
    for conversion in back:
        stored |= conversion.convert([values[name] for name in conversion.sources])
    again = {}
    for conversion in conversions(there, written, {key: key for key in values}):
        again |= conversion.convert([stored[name] for name in conversion.sources])
    assert all(torch.equal(again[key], values[key]) for key in values)
    assert torch.equal(stored["old.4.experts.11.w"], values["new.4.experts"][11])


def test_a_transform_without_an_inverse_cannot_be_written():
    oneway = transform(sources="a.*", target="b.*")(lambda a: a)
    assert way_back(Mapping([oneway]), {"c.0": (1,)}) == ({}, ())
    with pytest.raises(MappingError, match="has no way back"):
        way_back(Mapping([oneway]), {"b.0": (1,)})


def test_an_inverse_that_needs_the_numbers_cannot_be_written():
    reads = transform(sources="a.*", target="b.*", inverse=lambda b: b[: int(b[0])])(lambda a: a)
    with pytest.raises(MappingError, match="reads values"):
        way_back(Mapping([reads]), {"b.0": (1,)})


CANONICAL = {"new.4.qk": (2, 3), "new.4.experts": (2, 2, 3), "norm": (3,)}
STORED = {"old.4.q": (1, 3), "old.4.k": (1, 3), "n": (3,)} | {
    f"old.4.experts.{n}.w": (2, 3) for n in range(2)
}
THERE = Mapping([fuse, stack, rename("n", "norm")])


def test_a_conversion_runs_the_transforms_of_the_table_that_it_reads():
    wrapped = {f"w.{name}": shape for name, shape in STORED.items()}
    names = Names(THERE, Mapping([rename("canonical.**", "**")]))
    found, written = across(names, wrapped, CANONICAL, lambda name: name.removeprefix("w."))
    assert written == {f"canonical.{name}": shape for name, shape in CANONICAL.items()}
    assert {c.targets: c.sources for c in found.conversions} == {
        ("canonical.new.4.qk",): ("w.old.4.q", "w.old.4.k"),
        ("canonical.new.4.experts",): ("w.old.4.experts.0.w", "w.old.4.experts.1.w"),
    }
    assert promised(THERE, STORED, CANONICAL) == {"new.4.qk", "new.4.experts"}


def test_a_conversion_runs_the_inverses_of_the_table_that_it_writes():
    names = Names(Mapping([rename("canonical.**", "**")]), THERE)
    stored = {f"w.canonical.{name}": shape for name, shape in CANONICAL.items()}
    found, written = across(names, stored, CANONICAL, lambda name: name.removeprefix("w."))
    assert written == STORED
    assert {c.sources: c.targets for c in found.conversions} == {
        ("w.canonical.new.4.qk",): ("old.4.q", "old.4.k"),
        ("w.canonical.new.4.experts",): ("old.4.experts.0.w", "old.4.experts.1.w"),
    }


def test_what_an_inverse_takes_must_be_a_tensor_of_its_own():
    halves = tuple(Part("new.4.qk", (Narrow(0, n, 1),)) for n in (0, 1))
    names = Names(Mapping([Rule("both", halves)]), Mapping([fuse]))
    with pytest.raises(MappingError, match=r"'new\.4\.qk' is needed whole"):
        across(names, {"both": (2, 3)}, {"new.4.qk": (2, 3)})


@pytest.mark.parametrize("odd", [lambda a: a.to_sparse(), lambda a: a.to("meta")])
def test_a_result_that_is_no_ordinary_tensor_is_refused(load, odd):
    strange = transform(sources="a.*", target="b.*")(lambda a: odd(a) if not a.is_meta else a)
    with pytest.raises(MappingError, match="Return an ordinary tensor"):
        load({"a.0": numbered(2, 3)}, Own(b__0=(2, 3)), Mapping([strange]))
