"""A whole conversion. Values in the tables are those of NeMo 8cfedd720, which was run for them."""

import logging
import sys
import types

import pytest
import torch
from torch import nn

from bioinit.compat.nemo.io.state import (
    AdditionalKeys,
    DifferentShapes,
    NotConverted,
    _ModelState,
    apply_transforms,
    state_transform,
)
from bioinit.errors import ConfigError, PlanError


class Source(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a = nn.Linear(2, 3, dtype=dtype)
        self.n = nn.LayerNorm(3, dtype=dtype)
        self.register_buffer("b", torch.arange(3.0))
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 10 * i)


class Target(nn.Module):
    def __init__(self, dtype=torch.float32, device=None):
        super().__init__()
        self.lin = nn.Linear(2, 3, dtype=dtype, device=device)
        self.norm = nn.LayerNorm(3, dtype=dtype, device=device)
        self.register_buffer("buf", torch.zeros(3, device=device))
        self.register_buffer("cached", torch.ones(1), persistent=False)
        self.lin.weight.tensor_model_parallel = True
        self.norm.bias.requires_grad_(False)


class Tied(nn.Module):
    def __init__(self, device=None, tied=True):
        super().__init__()
        self.emb = nn.Embedding(4, 2, device=device)
        self.head = nn.Linear(2, 4, bias=False, device=device)
        if tied:
            self.head.weight = self.emb.weight


FULL = {
    "a.weight": "lin.weight",
    "a.bias": "lin.bias",
    "n.weight": "norm.weight",
    "n.bias": "norm.bias",
    "b": "buf",
}
VALUES = {
    "lin.weight": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    "lin.bias": [10.0, 11.0, 12.0],
    "norm.weight": [20.0, 21.0, 22.0],
    "norm.bias": [30.0, 31.0, 32.0],
    "buf": [0.0, 1.0, 2.0],
}


def values(model):
    return {key: value.tolist() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("device", [None, "meta"])
def test_every_mapped_tensor_is_filled_and_keeps_what_it_is(device):
    source, target = Source(), Target(device=device)
    assert apply_transforms(source, target, FULL) is target
    assert values(target) == VALUES
    assert target.lin.weight.tensor_model_parallel
    assert [p.requires_grad for p in target.parameters()] == [True, True, True, False]
    assert not isinstance(target.buf, nn.Parameter)
    ours = {tensor.data_ptr() for tensor in source.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in target.state_dict().values())


def test_parameters_with_memory_stay_the_same_objects():
    target = Target()
    before = dict(target.named_parameters())
    apply_transforms(Source(), target, FULL)
    assert all(before[key] is parameter for key, parameter in target.named_parameters())


def test_a_later_line_writes_over_an_earlier_one():
    @state_transform("a.weight", "lin.weight")
    def twice(w):
        return 2 * w

    target = apply_transforms(Source(), Target(), FULL, [twice])
    assert target.lin.weight.tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    assert target.lin.bias.tolist() == VALUES["lin.bias"]


def test_a_state_dict_is_a_source_and_extra_states_are_nobodys():
    state = dict(Source().state_dict()) | {"a._extra_state": None}
    seen = []

    def look(ctx):
        seen.append(ctx.source.config)
        ctx.target_state["lin._extra_state"] = ctx.source_state["a._extra_state"]

    target = apply_transforms(_ModelState(state, config="here"), Target(), FULL, [look])
    assert values(target) == VALUES
    assert seen == ["here"]


def test_a_state_dict_is_cast_in_place_but_for_integers():
    state = _ModelState({"w": torch.ones(2), "i": torch.arange(300), "s": None})
    assert state.to(torch.bfloat16) is None
    kinds = [getattr(value, "dtype", None) for value in state.state_dict().values()]
    assert kinds == [torch.bfloat16, torch.int64, None]


@pytest.mark.parametrize("names_itself", [True, False])
def test_a_function_may_write_into_the_targets_state(names_itself):
    def pad(ctx):
        ctx.target_state["lin.weight"][:2].copy_(ctx.source_state["a.weight"][:2])

    @state_transform("a.weight", "lin.weight")
    def padded(ctx, w):
        pad(ctx)
        return ctx.target_state["lin.weight"]

    target = Target()
    nn.init.zeros_(target.lin.weight)
    mapping = {key: to for key, to in FULL.items() if to != "lin.weight"}
    apply_transforms(Source(), target, mapping, [padded if names_itself else pad])
    assert target.lin.weight.tolist() == [[0.0, 1.0], [2.0, 3.0], [0.0, 0.0]]


def test_a_function_may_say_that_the_target_keeps_what_it_has():
    keep = state_transform("a.weight", "lin.weight", lambda ctx, w: ctx.target_state["lin.weight"])
    target = Target()
    before = target.lin.weight.clone()
    apply_transforms(Source(), target, {k: v for k, v in FULL.items() if k != "a.weight"}, [keep])
    assert target.lin.weight.equal(before)


def test_a_new_state_dict_of_a_function_is_the_one_that_counts():
    def replaced(ctx):
        state = {**ctx.target_state, "buf": torch.full((3,), 7.0)}
        return type(ctx)(ctx.source, ctx.source_state, ctx.target, state)

    assert apply_transforms(Source(), Target(), FULL, [replaced]).buf.tolist() == [7.0] * 3


def test_what_no_line_used_of_the_source_is_named(caplog):
    source, target = Source(), Target()
    source.again = source.a  # another name of what is used
    mapping = {key: to for key, to in FULL.items() if key != "b"}
    with caplog.at_level(logging.WARNING, logger="bioinit"):
        apply_transforms(source, target, mapping)
        assert caplog.messages == ["1 tensors of the source were not used: b"]
        caplog.clear()
        apply_transforms(source, target, FULL)
        apply_transforms(source, target, mapping, [lambda ctx: list(ctx.source_state.items())])
        apply_transforms(source, target, mapping, [lambda ctx: ctx.source_state.get("b")])
        assert not caplog.messages


def test_values_of_the_target_itself_may_change_places():
    model = nn.ParameterDict({"x": nn.Parameter(torch.ones(2)), "y": nn.Parameter(torch.zeros(2))})
    apply_transforms(model, model, {"x": "y", "y": "x"})
    assert values(model) == {"x": [0.0, 0.0], "y": [1.0, 1.0]}


def fails(error, also, match, *arguments, target=None, **options):
    """Also: nothing was written."""
    target = Target() if target is None else target
    before = [(parameter, parameter.clone()) for parameter in target.parameters()]
    with pytest.raises(error, match=match) as caught:
        apply_transforms(Source(), target, *arguments, **options)
    assert isinstance(caught.value, also)
    assert isinstance(caught.value, PlanError)
    assert caught.value.problems
    for (held, copy), now in zip(before, target.parameters(), strict=True):
        assert held is now
        assert held.is_meta or held.equal(copy)
    return caught.value


def test_a_parameter_without_a_value_is_an_error_unless_it_is_ignored():
    error = fails(NotConverted, AssertionError, r"(?s)lin\.bias.*norm", {"a.weight": "lin.weight"})
    assert {problem.key for problem in error.problems} == {"lin.bias", "norm.weight", "norm.bias"}
    fails(NotConverted, AssertionError, "state_dict_ignored_entries", {})
    ignored = ["lin.bias", "norm.weight", "norm.bias"]
    target = Target()
    apply_transforms(
        Source(), target, {"a.weight": "lin.weight"}, state_dict_ignored_entries=ignored
    )
    assert target.lin.weight.tolist() == VALUES["lin.weight"]
    assert target.norm.weight.tolist() == [1.0, 1.0, 1.0]
    assert target.buf.tolist() == [0.0, 0.0, 0.0]


def test_a_parameter_left_on_meta_is_an_error_even_if_it_is_ignored():
    words = "There are meta tensors in the model after conversion"
    for ignored in ([], ["lin.bias", "norm.weight", "norm.bias"]):
        fails(
            NotConverted,
            AssertionError,
            words,
            {"a.weight": "lin.weight"},
            target=Target(device="meta"),
            state_dict_ignored_entries=ignored,
        )


def test_a_source_on_meta_has_nothing_to_give():
    with pytest.raises(NotConverted, match="hold no numbers"):
        apply_transforms(Source().to("meta"), Target(), FULL)


def test_a_wrong_shape_is_an_error_before_anything_is_written():
    @state_transform("a.weight", "lin.weight")
    def turned(w):
        return w.T

    words = r"Shape mismatch for parameter lin.weight: target shape \(3, 2\) vs converted"
    fails(DifferentShapes, ValueError, words, FULL, [turned])
    wrong = state_transform("b", "buf", lambda b: b[:2])
    fails(DifferentShapes, ValueError, "Shape mismatch for buffer buf", FULL, [wrong])
    number = state_transform("b", "buf", lambda b: 3)
    fails(DifferentShapes, ValueError, "a int", FULL, [number])


def fill_bias(state):
    state["lin.bias"].fill_(7)


def fill_all(state):
    for value in state.values():
        value.fill_(7)


WRITES = {
    "an item": fill_bias,
    "all": fill_all,
    "got": lambda state: state.get("lin.bias").fill_(7),
    "a view": lambda state: state["lin.weight"][0].fill_(7),
    "popped": lambda state: state.pop("lin.bias").fill_(7),
    "a copy": lambda state: fill_all(state.copy()),
    "a dict": lambda state: fill_all({**state}),
    "a union": lambda state: fill_all(state | {}),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_function_wrote_in_place_is_not_in_the_target_after_an_error(write):
    target = Target()
    before = values(target)
    for match, then in (("Shape", lambda: torch.zeros(5)), ("division", lambda: 1 / 0)):

        def function(ctx, then=then):
            write(ctx.target_state)
            ctx.target_state["lin.weight"] = then()

        with pytest.raises((ValueError, ZeroDivisionError), match=match):
            apply_transforms(Source(), target, {}, [function])
        assert values(target) == before


@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_tied_is_written_in_place_by_either_name(replaced):
    def function(ctx):
        state = ctx.target_state.copy() if replaced else ctx.target_state
        assert (len(state), set(state)) == (2, {"emb.weight", "head.weight"})
        state["head.weight"].fill_(3)
        state["emb.weight"].mul_(2)
        return type(ctx)(ctx.source, ctx.source_state, ctx.target, state)

    target = apply_transforms(_ModelState({}), Tied(), {}, [function])
    assert target.head.weight is target.emb.weight
    assert target.emb.weight.eq(6).all()


def test_what_a_function_only_looks_at_has_got_no_value():
    def look(ctx):
        assert list(ctx.target_state.values()) and repr(ctx.target_state)
        del ctx.target_state["buf"]

    fails(NotConverted, AssertionError, r"lin\.bias", {"a.weight": "lin.weight"}, [look])


def test_a_value_that_nothing_takes_is_an_error_unless_it_is_ignored():
    def add(ctx):
        ctx.target_state["lin.weights"] = torch.zeros(2)

    words = r"Additional keys: \['lin.weights'\] in checkpoint but not in model"
    error = fails(AdditionalKeys, RuntimeError, words, FULL, [add])
    assert "'lin.weight'" in str(error)
    apply_transforms(Source(), Target(), FULL, [add], ["lin.weights"])


def test_a_parameter_takes_its_own_dtype_unless_all_are_cast():
    words = "dtype mismatch between source and target state dicts"
    with pytest.raises(AssertionError, match=words) as caught:
        apply_transforms(Source(torch.bfloat16), Target(), FULL)
    assert "cast_dtype" in str(caught.value)
    assert "'lin.weight' is torch.float32 in the target and gets torch.bfloat16" in str(
        caught.value
    )


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_a_cast_goes_from_the_source_to_the_last_dtype_at_once(held, device):
    source = Source()
    with torch.no_grad():
        source.a.bias += 2**-12  # which bfloat16 would lose
    tied = Target(held, device)
    target = apply_transforms(source, tied, FULL, cast_dtype=torch.float32)
    assert target.lin.bias.equal(source.a.bias)
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert target.lin.weight.tensor_model_parallel
    assert not target.norm.bias.requires_grad


def test_a_cast_is_of_everything_floating():
    target = apply_transforms(Source(), Target(), FULL, cast_dtype=torch.bfloat16)
    assert {t.dtype for t in [*target.parameters(), *target.buffers()]} == {torch.bfloat16}
    assert values(target) == VALUES


def test_a_buffer_keeps_its_dtype_if_that_can_hold_the_values():
    source = Source()
    source.b = source.b.bfloat16()
    target = apply_transforms(source, Target(), FULL)
    assert (target.buf.dtype, target.buf.tolist()) == (torch.float32, VALUES["buf"])
    source.b = source.b.double()
    with pytest.raises(NotConverted, match=r"'buf' is torch\.float32"):
        apply_transforms(source, Target(), FULL)


EMB = {"emb.weight": "emb.weight"}
HEAD = {"head.weight": "head.weight"}


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("ignored", [(), ("head.weight",)])
@pytest.mark.parametrize("mapping", [EMB, HEAD, EMB | HEAD])
def test_what_is_tied_stays_tied_and_needs_one_value(mapping, ignored, device):
    source, target = Tied(), Tied(device)
    apply_transforms(source, target, mapping, state_dict_ignored_entries=ignored)
    assert target.head.weight is target.emb.weight
    assert target.emb.weight.equal(source.emb.weight)


def test_two_values_for_what_is_tied_are_an_error_unless_one_is_ignored():
    source, target = Tied(tied=False), Tied()
    with pytest.raises(RuntimeError, match=r"'head\.weight' and 'emb\.weight' are one parameter"):
        apply_transforms(source, target, EMB | HEAD)
    apply_transforms(source, target, EMB | HEAD, state_dict_ignored_entries=["head.weight"])
    assert target.head.weight is target.emb.weight
    assert target.emb.weight.equal(source.emb.weight)


def test_a_model_that_ties_later_is_tied_before_it_is_judged():
    class Later(Tied):
        def tie_weights(self):
            self.head.weight = self.emb.weight

    source, target = Tied(), Later("meta", tied=False)
    apply_transforms(source, target, EMB, state_dict_ignored_entries=["head.weight"])
    assert target.head.weight is target.emb.weight
    assert target.head.weight.equal(source.head.weight)


def test_the_module_of_megatron_inside_a_wrapper_is_meant(monkeypatch):
    class MegatronModule(nn.Module):
        pass

    class Inner(Target, MegatronModule):
        pass

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    fake = types.SimpleNamespace(MegatronModule=MegatronModule)
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.module", fake)
    wrapper = Wrapper(Inner())
    assert apply_transforms(Source(), wrapper, FULL) is wrapper
    assert values(wrapper.module) == VALUES


def test_a_divided_target_is_refused():
    class Divided(nn.Parameter):
        placements = ()

    target = Target()
    target.lin.weight = Divided(torch.zeros(3, 2))
    with pytest.raises(ConfigError, match=r"'lin\.weight' is divided"):
        apply_transforms(Source(), target, FULL)
