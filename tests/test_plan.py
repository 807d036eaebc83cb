"""Plans: every target claimed or a problem with its cure, from headers alone."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bioinit.config import InitPolicy
from bioinit.formats import open_weights
from bioinit.layout import Box, intersect
from bioinit.mapping import Mapping, Names
from bioinit.plan import Copy, Model, plan
from bioinit.plan.reading import bytes_by_file
from bioinit.rules import Narrow, Part, Rule, Unflatten
from bioinit.storage import Folder
from bioinit.targets import describe

IDENTITY = Names(Mapping.identity(), Mapping.identity())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def state(**changes):
    model = Tied()
    held = {k: v.detach().clone() for k, v in model.state_dict().items() if k != "head.weight"}
    held.update(changes)
    return {k: v for k, v in held.items() if v is not None}


@pytest.fixture
def planned(tmp_path):
    def make(tensors, names=IDENTITY, module=None, dtype="stored", skip=(), vocab=(), **policy):
        save_file(tensors, tmp_path / "model.safetensors")
        _, contents = open_weights(Folder.at(tmp_path))
        side = Model(
            describe(module or Tied()), lambda key: f"init of {key}", vocab_keys=set(vocab)
        )
        return plan(
            side,
            contents.tensors,
            names,
            init=InitPolicy(**policy),
            skip_prefixes=skip,
            dtype=dtype,
        )

    return make


def claims(decided):
    return {claim.key: claim.claim for claim in decided.tensors}


def test_every_key_of_the_state_dict_is_claimed_once(planned):
    decided = planned(state())
    assert not decided.problems
    assert [c.key for c in decided.tensors] == list(Tied().state_dict())
    assert claims(decided)["head.weight"] == "tied"
    assert set(claims(decided).values()) == {"loaded", "tied"}


def test_bytes_to_read_are_the_stored_bytes_of_what_is_needed(planned):
    tensors = state()
    decided = planned({**tensors, "optimizer.junk": torch.zeros(100)})
    assert decided.bytes_to_read == sum(t.nbytes for t in tensors.values())
    assert [u.key for u in decided.unused] == ["optimizer.junk"]


def test_a_skipped_tensor_is_not_read_and_still_has_an_initializer(planned):
    decided = planned(state(), skip=("body.1",))
    skipped = [c for c in decided.tensors if c.claim == "skipped"]
    assert [c.key for c in skipped] == ["body.1.weight", "body.1.bias"]
    assert all(c.init == f"init of {c.key}" and c.bytes == 0 for c in skipped)
    assert decided.bytes_to_read == sum(
        t.nbytes for k, t in state().items() if not k.startswith("body.1.")
    )
    assert decided.hits == {"body.1": 4}  # two targets and two stored names
    assert not decided.unused


def test_a_prefix_without_a_hit_is_a_problem_with_the_closest_name(planned):
    [problem] = planned(state(), skip=("hed",)).problems
    assert problem.kind == "prefix"
    assert "'head'" in problem.message


def test_a_missing_parameter_is_a_problem_that_names_what_is_close(planned):
    stored = state(**{"head.bias": None})
    stored["head.bais"] = torch.zeros(7)
    [problem] = planned(stored).problems
    assert (problem.kind, problem.key) == ("unclaimed", "head.bias")
    assert "'head.bais'" in problem.message and "init.new" in problem.cure


def test_new_patterns_and_on_missing_claim_what_is_missing_by_name(planned):
    lacking = state(**{"head.bias": None})
    by_pattern = planned(lacking, new=("head.*",))
    assert claims(by_pattern)["head.bias"] == "initialized" and not by_pattern.problems
    assert claims(planned(lacking, on_missing="init"))["head.bias"] == "initialized"


def test_a_new_pattern_does_not_keep_a_stored_tensor_from_being_loaded(planned):
    assert claims(planned(state(), new=("head.*",)))["head.bias"] == "loaded"


@pytest.mark.parametrize("rows", [5, 9])
def test_other_shapes_are_a_problem_in_either_direction(planned, rows):
    [problem] = planned(state(**{"embed.weight": torch.zeros(rows, 4)})).problems
    assert problem.kind == "mismatch"
    assert f"[{rows}, 4]" in problem.message and "[7, 4]" in problem.message


def test_a_mismatch_can_be_initialized_instead(planned):
    decided = planned(state(**{"body.0.weight": torch.zeros(9, 9)}), on_mismatch="init")
    assert claims(decided)["body.0.weight"] == "initialized" and not decided.problems


def test_resize_takes_rows_of_embeddings_and_nothing_else(planned):
    grown = planned(
        state(**{"embed.weight": torch.zeros(5, 4)}), on_mismatch="resize", vocab=("embed.weight",)
    )
    assert grown.targets["embed.weight"].needs_init
    assert grown.targets["embed.weight"].claim.bytes == 5 * 4 * 4
    shrunk = planned(
        state(**{"embed.weight": torch.zeros(9, 4)}), on_mismatch="resize", vocab=("embed.weight",)
    )
    assert not shrunk.targets["embed.weight"].needs_init
    [problem] = planned(
        state(**{"body.0.weight": torch.zeros(5, 4)}), on_mismatch="resize", vocab=("embed.weight",)
    ).problems
    assert problem.key == "body.0.weight"


def test_integers_are_not_poured_into_floats(planned):
    [problem] = planned(state(**{"body.0.bias": torch.zeros(4, dtype=torch.int32)})).problems
    assert problem.kind == "dtype" and "int32" in problem.message


def test_a_cast_is_said(planned):
    decided = planned(
        state(**{"body.0.bias": torch.zeros(4, dtype=torch.bfloat16)}), dtype="module"
    )
    [cast] = [c for c in decided.tensors if c.cast]
    assert (cast.key, cast.cast) == ("body.0.bias", "bfloat16 -> float32")


def test_stored_dtypes_are_kept_and_new_parameters_get_the_common_one(planned):
    stored = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state().items()}
    decided = planned({k: v for k, v in stored.items() if k != "head.bias"}, new=("head.bias",))
    dtypes = {c.key: c.dtype for c in decided.tensors}
    assert dtypes["body.0.weight"] == dtypes["head.bias"] == dtypes["head.weight"] == "bfloat16"
    assert dtypes["steps"] == "int64"


def test_the_name_a_tied_weight_is_stored_under_does_not_matter(planned):
    stored = state()
    stored["head.weight"] = stored.pop("embed.weight")
    decided = planned(stored)
    assert decided.targets["embed.weight"].claim.sources == ("head.weight",)
    assert not decided.problems


def test_a_second_copy_of_a_tied_weight_is_held_against_the_first(planned):
    stored = state()
    stored["head.weight"] = stored["embed.weight"].clone()
    decided = planned(stored)
    [(name, _)] = decided.targets["embed.weight"].equal
    assert name == "head.weight" and not decided.unused


def test_unused_tensors_are_an_error_only_if_asked(planned):
    tensors = {**state(), "extra": torch.zeros(1)}
    assert not planned(tensors).problems
    [problem] = planned(tensors, on_unused="error").problems
    assert (problem.kind, problem.key) == ("unused", "extra")


def test_a_prefix_that_skips_a_part_of_a_fused_tensor_leaves_the_rest_loaded(planned):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.zeros(6, 2))

    memory = Mapping(
        [Rule("qkv", tuple(Part(n, (Narrow(0, 2 * i, 2),)) for i, n in enumerate("qkv")))]
    )
    decided = planned(
        {n: torch.zeros(2, 2) for n in "qkv"},
        Names(Mapping.identity(), memory),
        Fused(),
        skip=("k",),
    )
    whole = decided.targets["qkv"]
    assert whole.needs_init and whole.claim.sources == ("q", "v")
    assert decided.bytes_to_read == 2 * 2 * 2 * 4


def test_a_part_of_a_fused_tensor_that_is_missing_is_a_problem(planned):
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.zeros(6, 2))

    memory = Mapping(
        [Rule("qkv", tuple(Part(n, (Narrow(0, 2 * i, 2),)) for i, n in enumerate("qkv")))]
    )
    [problem] = planned(
        {n: torch.zeros(2, 2) for n in "qv"}, Names(Mapping.identity(), memory), Fused()
    ).problems
    assert "8 of the 12 elements" in problem.message


def test_a_plan_is_one_json_document_and_folded_lines(planned):
    decided = planned(state(), skip=("body.1",))
    document = decided.to_json()
    assert document["bytes_to_read"] == decided.bytes_to_read
    assert {"fields", "tensors", "unused", "problems", "files", "memory", "skip_prefixes"} <= set(
        document
    )
    text = decided.render()
    assert "body.{0..2}" not in text and "body.0.weight" in text


def test_a_tied_copy_that_fits_is_not_lost_to_one_that_does_not(planned):
    stored = {**state(), "head.weight": torch.zeros(9, 4)}
    [problem] = planned(stored).problems
    assert (problem.kind, problem.key) == ("mismatch", "embed.weight")
    decided = planned(stored, on_mismatch="init")
    assert decided.targets["embed.weight"].claim.sources == ("embed.weight",)


@pytest.mark.parametrize(
    ("stored", "fits"), [(torch.int32, True), (torch.uint8, True), (torch.bool, False)]
)
def test_integers_are_cast_only_where_no_value_can_change(planned, stored, fits):
    decided = planned(state(steps=torch.zeros(3, dtype=stored)))
    assert bool(decided.problems) is not fits


def test_a_wide_integer_does_not_go_into_a_narrow_one(planned):
    class Narrow8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(3, dtype=torch.int8))

    [problem] = planned({"steps": torch.tensor([1, 2, 300])}, module=Narrow8()).problems
    assert problem.kind == "dtype" and "int64" in problem.message


def test_a_prefix_that_only_names_a_tie_is_a_problem(planned):
    [problem] = planned(state(), skip=("head.weight",)).problems
    assert problem.kind == "prefix" and "tied" in problem.message
    assert not planned(state(), skip=("head",)).problems


def test_a_stored_tensor_that_does_not_fit_its_rule_is_a_problem_with_its_name(planned):
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.zeros(4, 2))

    disk = Mapping([Rule("qkv", (Part("q", (Unflatten(0, (2, 2)),)),))])
    memory = Mapping([Rule("q", (Part("q", (Unflatten(0, (2, 2)),)),))])
    found = planned({"qkv": torch.zeros(7, 2)}, Names(disk, memory), Split()).problems
    assert found[-1].key == "qkv" and "[7, 2]" in found[-1].message and found[-1].cure


def columns(low: int, high: int) -> Copy:
    whole = Box.contiguous((64, 32))
    overlap = intersect(whole, Box((0, low), (64, high - low), 0, (high - low, 1)))
    assert overlap is not None
    return Copy(0, 100, torch.float32, overlap)


def test_columns_are_planned_with_the_gaps_that_are_read_along():
    counts, along = bytes_by_file([columns(0, 8)])
    assert counts == {0: (63 * 32 + 8) * 4} and along == 63 * 24 * 4


def test_columns_that_make_up_whole_rows_are_read_once():
    counts, along = bytes_by_file([columns(8, 32), columns(0, 8)])
    assert counts == {0: 64 * 32 * 4} and along == 0
