"""Wrapper prefixes: solved from names, said, and refused when two ways are equally good."""

import pytest

from bioinit.errors import AmbiguousFormat
from bioinit.prefixes import solve

BODY = [f"encoder.layer.{i}.{n}" for i in range(3) for n in ("q.weight", "k.weight", "out.bias")]
BODY += ["embeddings.word.weight", "pooler.weight"]


def solved(stored, model):
    found = solve(stored, set(model).intersection, model)
    return [found.spell(name) for name in stored], found.note


def test_names_that_fit_are_left_alone():
    assert solved(BODY, BODY) == (BODY, "")


@pytest.mark.parametrize("prefix", ["module.", "model.", "bert.", "esm.", "module.model."])
def test_a_prefix_too_many_is_taken_off(prefix):
    spelled, note = solved([prefix + n for n in BODY], BODY)
    assert spelled == BODY
    assert prefix in note and f"{len(BODY)} of {len(BODY)} match" in note


@pytest.mark.parametrize("prefix", ["model.", "bert.", "esm."])
def test_a_prefix_too_few_is_put_on(prefix):
    model = [prefix + n for n in BODY] + ["classifier.weight", "classifier.bias"]
    assert solved(BODY, model)[0] == [prefix + n for n in BODY]


def test_one_body_prefix_is_exchanged_for_another():
    model = ["esm." + n for n in BODY]
    assert solved(["module." + n for n in BODY], model)[0] == model


def test_wrapper_segments_are_taken_out_wherever_they_stand():
    stored = [n.replace("layer.", "_fsdp_wrapped_module.layer._orig_mod.") for n in BODY]
    spelled, note = solved(["_orig_mod." + n for n in stored], BODY)
    assert spelled == BODY and "wrappers" in note


def test_a_head_beside_the_body_stays_where_it_is():
    stored = [*BODY, "classifier.weight", "classifier.bias"]
    model = ["bert." + n for n in BODY] + ["classifier.weight", "classifier.bias"]
    assert solved(stored, model)[0] == model


def test_two_equally_good_ways_are_refused_with_their_scores():
    model = [f"{tower}.{n}" for tower in ("query", "document") for n in BODY]
    with pytest.raises(AmbiguousFormat, match=rf"'query.' in front: {len(BODY)} match"):
        solved(BODY, model)


def test_names_of_something_else_are_not_forced_to_fit():
    stored = ["a.b.c", "d.e.f"]
    assert solved(stored, BODY) == (stored, "")


def test_no_name_is_read_as_another_that_the_checkpoint_holds():
    stored = [*BODY, *(f"module.{n}" for n in BODY), "module.extra"]
    assert solved(stored, [*BODY, "extra"]) == (stored, "")


def test_a_name_is_asked_for_in_the_spelling_that_it_would_have():
    renamed = {"old.weight": "new.weight"}  # what the disk dialect knows, rightly spelled alone
    model = [*BODY, "new.weight"]

    def known(names):
        return {name for name in names if renamed.get(name, name) in model}

    found = solve(["module.old.weight", *(f"module.{n}" for n in BODY)], known, model)
    assert found.spell("module.old.weight") == "old.weight"


@pytest.mark.parametrize(
    "stored",
    [
        ["student.encoder.w", "student.encoder.b", "teacher.encoder.w", "teacher.encoder.b"],
        ["a.long.encoder.w", "a.long.encoder.b", "b.encoder.w", "b.encoder.b", "c.other"],
    ],
)
def test_two_parts_of_a_checkpoint_that_fit_equally_are_refused_and_not_chosen_from(stored):
    keys = {"encoder.w", "encoder.b"}
    with pytest.raises(AmbiguousFormat, match="in more than one way"):
        solve(stored, keys.intersection, keys)
