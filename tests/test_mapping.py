"""Mappings: first rule wins, nobody's key is None, and look-up by template never mixes keys."""

from bioinit.layout import Box
from bioinit.mapping import Mapping
from bioinit.rules import Each, Part, Rule, rename

BOX = (Box.contiguous((2, 3)),)


def names(mapping, key, boxes=BOX):
    placed = mapping.place(key, boxes)
    return None if placed is None else [p.key for p in placed]


def test_identity_keeps_every_key():
    assert names(Mapping.identity(), "a.0.b") == ["a.0.b"]
    assert names(Mapping.identity(), "single") == ["single"]


def test_the_first_rule_that_matches_wins():
    mapping = Mapping([rename("a.*.b", "first.*"), rename("a.*.*", "second.*.*")])
    assert names(mapping, "a.1.b") == ["first.1"]
    assert names(mapping, "a.1.c") == ["second.1.c"]


def test_a_key_no_rule_knows_is_none():
    assert names(Mapping([rename("a.*", "b.*")]), "c.1") is None


def test_a_rule_for_one_number_does_not_speak_for_its_neighbours():
    mapping = Mapping([rename("a.0.w", "zero"), rename("a.*.w", "other.*")])
    assert names(mapping, "a.1.w") == ["other.1"]
    assert names(mapping, "a.0.w") == ["zero"]
    assert names(mapping, "a.1.w") == ["other.1"]


def test_wildcards_match_words_as_well_as_numbers():
    mapping = Mapping([rename("*.weight", "*.w")])
    assert names(mapping, "head.weight") == ["head.w"]
    assert names(mapping, "body.weight") == ["body.w"]
    assert names(mapping, "3.weight") == ["3.w"]


def test_stacked_tensors_get_one_key_per_index():
    mapping = Mapping([Rule("layers.w", (Part("layers.*.w", (Each(0, 0),)),))])
    assert names(mapping, "layers.w") == ["layers.0.w", "layers.1.w"]


def test_remembered_views_still_carry_each_keys_own_captures():
    mapping = Mapping([Rule("l.*.e", (Part("l.*.e.*", (Each(0, 1),)),))])
    assert names(mapping, "l.4.e") == ["l.4.e.0", "l.4.e.1"]
    assert names(mapping, "l.9.e") == ["l.9.e.0", "l.9.e.1"]


def test_a_rule_with_a_wildcard_and_a_number_does_not_speak_for_its_neighbours():
    mapping = Mapping([rename("blocks.*.0.w", "a.*.w"), rename("blocks.*.1.w", "b.*.w")])
    assert names(mapping, "blocks.3.0.w") == ["a.3.w"]
    assert names(mapping, "blocks.3.1.w") == ["b.3.w"]
    assert names(mapping, "blocks.4.0.w") == ["a.4.w"]
