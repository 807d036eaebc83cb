"""Reports: folding that does not lie, and problems that are raised all at once."""

import pytest

from bioinit.errors import PlanError, Problem
from bioinit.report import Claim, LoadReport, fold, printable, raise_for, render_claims, summary


def claim(key, shape=(4,), kind="loaded", **facts):
    return Claim(key, shape, "float32", kind, facts.pop("rule", "copy"), **facts)


def texts(claims):
    return [(f.text, f.times) for f in fold(claims)]


def test_an_unbroken_range_is_one_line():
    assert texts([claim(f"layers.{i}.w") for i in range(32)]) == [("layers.{0..31}.w", 32)]


def test_a_missing_layer_shows_as_a_gap():
    claims = [claim(f"layers.{i}.w") for i in range(8) if i != 5]
    assert texts(claims) == [("layers.{0..4}.w", 5), ("layers.{6..7}.w", 2)]


def test_two_numbers_fold_into_a_product_only_if_it_is_full():
    full = [claim(f"l.{i}.e.{j}.w") for i in range(3) for j in range(4)]
    assert texts(full) == [("l.{0..2}.e.{0..3}.w", 12)]
    assert sum(times for _, times in texts(full[:-1])) == 11
    assert ("l.{0..2}.e.{0..3}.w", 12) not in texts(full[:-1])


def test_other_facts_are_other_lines():
    claims = [claim("l.0.w"), claim("l.1.w", (5,)), claim("l.2.w"), claim("l.3.w", kind="skipped")]
    assert texts(claims) == [("l.0.w", 1), ("l.1.w", 1), ("l.2.w", 1), ("l.3.w", 1)]
    cast = [claim("l.0.w"), claim("l.1.w", cast="bfloat16 -> float32")]
    assert len(fold(cast)) == 2


def test_sources_of_another_kind_keep_claims_apart():
    claims = [claim("l.0.w", sources=("a.0.w",)), claim("l.1.w", sources=("b.1.w",))]
    assert len(fold(claims)) == 2
    assert len(fold([c._replace(sources=(f"a.{i}.w",)) for i, c in enumerate(claims)])) == 1


def test_a_literal_star_in_a_key_is_shown_as_it_is():
    assert texts([claim("layer.*.inv_freq")]) == [("layer.*.inv_freq", 1)]
    assert texts([claim(f"a.*.{i}") for i in range(2)]) == [("a.*.{0..1}", 2)]


def test_a_line_says_why_and_with_what_it_is_initialized():
    [line] = render_claims(
        [claim("head.w", kind="skipped", rule="skip prefix 'head'", init="N(0)")]
    )
    assert "skip prefix 'head'" in line and "N(0)" in line and "[4 float32]" in line


def test_the_summary_counts_each_kind():
    assert summary([claim("a"), claim("b"), claim("c", kind="tied")]) == "2 loaded, 1 tied"


def test_all_problems_are_raised_at_once_and_the_message_stays_short():
    problems = [Problem("unclaimed", f"k{i}", f"no k{i}.", "Mend it.") for i in range(20)]
    with pytest.raises(PlanError, match="20 problems") as caught:
        raise_for(problems, "the plan has")
    assert len(caught.value.problems) == 20
    assert "k7" in str(caught.value) and "k8" not in str(caught.value)
    raise_for((), "the plan has")


def test_a_report_without_problems_returns_itself():
    report = LoadReport((claim("a"),), (), (), 16, 0.5, 4, 4)
    assert report.raise_for_problems() is report
    assert report.to_json()["tensors"][0]["claim"] == "loaded"
    assert "4 of 4 parameters are trainable" in report.render()


def test_what_a_terminal_would_obey_is_spelled_out():
    assert printable("a\x1b[2J\r\n\u2028\u202e\ud800é ü*") == (
        "a\\x1b[2J\\r\\n\\u2028\\u202e\\ud800é ü*"
    )
