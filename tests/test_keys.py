"""Patterns, skip prefixes and nearest names."""

import pytest

from bioinit.errors import ConfigError, MappingError
from bioinit.keys import Pattern, SkipPrefix, escape, natural, numbers, suggestion, template


def test_one_star_is_one_segment_and_two_are_one_or_more():
    assert Pattern("a.*.c").match("a.b.c") == ("b",)
    assert Pattern("a.*.c").match("a.b.b.c") is None
    assert Pattern("a.**.c").match("a.b.b.c") == ("b.b",)
    assert Pattern("a.**").match("a") is None


def test_captures_are_filled_left_to_right():
    renamed = Pattern("layers.*.mlp.**").rename("layers.7.mlp.gate.w", to=Pattern("b.*.m.**"))
    assert renamed == "b.7.m.gate.w"


def test_other_wildcards_on_the_other_side_are_refused():
    with pytest.raises(MappingError, match="wildcards differ"):
        Pattern("a.*").rename("a.b", to=Pattern("a.**"))


def test_a_literal_star_in_a_key_is_matched_by_its_escape_alone():
    key = "layer.*.inv_freq"
    assert Pattern(escape(key)).match(key) == ()
    assert Pattern(escape(key)).match("layer.0.inv_freq") is None
    assert template(key) == r"layer.\*.inv_freq"


def test_regex_characters_in_a_pattern_are_plain_text():
    assert Pattern("a+b.(c)").match("a+b.(c)") == ()
    assert Pattern("a.b").match("aXb") is None


def test_a_skip_prefix_ends_at_a_dot_unless_it_says_otherwise():
    assert SkipPrefix("head").matches("head")
    assert SkipPrefix("head").matches("head.weight")
    assert not SkipPrefix("head").matches("header.weight")
    assert not SkipPrefix("encoder.layers.1").matches("encoder.layers.10.w")
    assert SkipPrefix("head*").matches("header.weight")
    assert SkipPrefix("head.").matches("head.weight")


@pytest.mark.parametrize("text", ["", ".", ".."])
def test_an_empty_skip_prefix_is_refused(text):
    with pytest.raises(ConfigError, match="every key"):
        SkipPrefix(text)


def test_numbers_and_templates_belong_together():
    key = "model.layers.12.experts.3.w1.weight"
    assert template(key) == "model.layers.*.experts.*.w1.weight"
    assert Pattern(template(key)).spell(numbers(key)) == key


def test_natural_order_counts():
    assert sorted(["l.10", "l.2", "l.a"], key=natural) == ["l.2", "l.10", "l.a"]


def test_a_suggestion_is_silent_when_nothing_is_close():
    assert suggestion("zzz", ["num_layers"]) == ""
    assert "num_layers" in suggestion("num_layer", ["num_layers", "vocab_size"])
