"""Rules in YAML: the same verbs as in Python, and nothing that is not understood passes."""

import os
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bioinit
from bioinit import rulebook
from bioinit.errors import MappingError, StorageError
from bioinit.rules import Each, Narrow, Part, Permute, Reinterpret, Rule, Unflatten, dropped

EVERYTHING = """
rules:
  - {from: "a.*.w", to: "b.*.w", note: "as it is"}
  - from: "fused.*"
    parts:
      - {to: "q.*", view: [{unflatten: [0, [2, 3, 4]]}, {narrow: [1, 0, 1]}]}
      - {to: "k.*", view: [{unflatten: [0, [2, 3, 4]]}, {narrow: [1, 1, 1, 3]}], add: -1}
  - {from: "turned", to: "t", view: [{permute: [1, 0]}]}
  - {from: "many", to: "one.*", view: [{each: [0, 0]}]}
  - {from: "said", to: "is", view: [{reinterpret: [[2, 6], [3, 4]]}]}
  - {from: "layers.*.norm", to: "h.*.norm", stacked: true}
  - {from: "vocab", to: "words", fill: true}
  - {drop: "rotary.inv_freq", because: "computed"}
  - {from: "**", to: "**"}
model:
  - {from: "live", to: "canonical"}
"""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 6, bias=False)
        self.k = nn.Linear(4, 6, bias=False)
        self.norm = nn.LayerNorm(4)


@pytest.fixture
def stored(tmp_path):
    """Queries and keys fused head by head, in names of another world."""
    fused = torch.arange(48.0).reshape(2, 2, 3, 4)  # heads, q or k, rows of a head, columns
    tensors = {"body.qk": fused.reshape(12, 4), "norm.weight": torch.ones(4) * 2}
    tensors |= {"norm.bias": torch.ones(4), "rotary.inv_freq": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, fused


RULES = """
rules:
  - from: "body.qk"
    parts:
      - {to: "q.weight", view: [{unflatten: [0, [2, 2, 3]]}, {narrow: [1, 0, 1]}]}
      - {to: "k.weight", view: [{unflatten: [0, [2, 2, 3]]}, {narrow: [1, 1, 1]}]}
  - {drop: "rotary.inv_freq", because: "computed"}
  - {from: "norm.**", to: "norm.**"}
model:
  - {from: "q.weight", to: "q.weight", view: [{unflatten: [0, [2, 1, 3]]}]}
  - {from: "k.weight", to: "k.weight", view: [{unflatten: [0, [2, 1, 3]]}]}
"""


def test_every_verb_is_the_rule_of_the_same_name(tmp_path):
    (tmp_path / "rules.yaml").write_text(EVERYTHING)
    names = rulebook.read(tmp_path / "rules.yaml")
    wide = Unflatten(0, (2, 3, 4))
    assert names.disk.rules == (
        Rule("a.*.w", (Part("b.*.w"),), "as it is"),
        Rule(
            "fused.*",
            (Part("q.*", (wide, Narrow(1, 0, 1))), Part("k.*", (wide, Narrow(1, 1, 1, 3)), -1.0)),
        ),
        Rule("turned", (Part("t", (Permute((1, 0)),)),)),
        Rule("many", (Part("one.*", (Each(0, 0),)),)),
        Rule("said", (Part("is", (Reinterpret((2, 6), (3, 4)),)),)),
        Rule("layers.norm", (Part("h.*.norm", (Each(0, 0),)),)),
        Rule("vocab", (Part("words"),), fill=True),
        dropped("rotary.inv_freq", "computed"),
        Rule("**", (Part("**"),)),
    )
    assert [rule.pattern_text for rule in names.memory.rules] == ["live", "**"]


def test_a_file_of_rules_loads_what_is_fused_head_by_head(stored, tmp_path):
    path, fused = stored
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    model = Model()
    report = bioinit.load_weights(model, path, mapping=rules)
    assert torch.equal(model.q.weight, fused[:, 0].reshape(6, 4))
    assert torch.equal(model.k.weight, fused[:, 1].reshape(6, 4))
    assert torch.equal(model.norm.weight, torch.full((4,), 2.0))
    assert not report.unused


def test_the_same_words_may_be_given_as_plain_data(stored):
    path, _ = stored
    model = nn.Module()
    model.norm = nn.LayerNorm(4)
    rules = {"rules": [{"from": "norm.**", "to": "norm.**"}]}
    report = bioinit.load_weights(model, path, mapping=rules)
    assert torch.equal(model.norm.bias, torch.ones(4))
    assert {unused.key for unused in report.unused} == {"body.qk", "rotary.inv_freq"}


def test_a_missing_file_is_said_with_where_it_was_looked_for(stored):
    with pytest.raises(StorageError, match=r"cannot read the rules in no\.yaml .*looked at /"):
        bioinit.load_weights(Model(), stored[0], mapping="no.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is nothing. Write a mapping of: rules, model"),
        ("rules: []", "rules is empty"),
        ("rules: {}", "rules is {}. Write a list"),
        ("rule: []", "unknown word 'rule'. Closest: 'rules'"),
        ("model: []", "lacks 'rules'"),
        ("rules: [1]", r"rules\[0\] is 1. Write a mapping of: from, to"),
        ("rules: [{form: a, to: b}]", "unknown word 'form'. Closest: 'from'"),
        ("rules: [{from: a}]", "'to' is missing"),
        ("rules: [{to: a}]", "'from' is missing"),
        ("rules: [{from: 1, to: b}]", "'from' is 1. Write text"),
        ("rules: [{from: on, to: b}]", "'from' is True. Write text"),
        ("rules: [{drop: a}]", "'because' is missing"),
        ("rules: [{drop: a, because: b, to: c}]", "'to' beside 'drop'"),
        ("rules: [{from: a, to: b, because: c}]", "because says why a tensor is dropped"),
        ("rules: [{from: a, to: b, parts: []}]", "'to' beside 'parts'"),
        ("rules: [{from: a, parts: []}]", "parts is empty"),
        ("rules: [{from: a, parts: [{tp: b}]}]", r"parts\[0\] has the unknown word 'tp'"),
        ("rules: [{from: 'a.*', to: b}]", r"rules\[0\]: rule 'a.\*' -> 'b': the key has 1"),
        ("rules: [{from: a, to: b, view: {}}]", "view is {}. Write a list"),
        ("rules: [{from: a, to: b, view: [{flatten: 1}]}]", "'flatten'. Closest: 'unflatten'"),
        ("rules: [{from: a, to: b, view: [{}]}]", r"view\[0\] has 0 words"),
        (
            "rules: [{from: a, to: b, view: [{permute: [0], narrow: [0, 0, 1]}]}]",
            "has 2 words. Write one step",
        ),
        ("rules: [{from: a, to: b, view: [{permute: [1, 1]}]}]", "must name every dim"),
        ("rules: [{from: a, to: b, view: [{permute: 1}]}]", "permute is 1. Write a list"),
        ("rules: [{from: a, to: b, view: [{narrow: [0, 1]}]}]", r"has 2 values. Write \[dim, sta"),
        ("rules: [{from: a, to: b, view: [{narrow: [0, -1, 2]}]}]", "holds -1"),
        ("rules: [{from: a, to: b, view: [{unflatten: [0, 2]}]}]", "unflatten is 2. Write a list"),
        ("rules: [{from: a, to: b, view: [{unflatten: [0, [2.5]]}]}]", "holds 2.5"),
        ("rules: [{from: a, to: b, view: [{each: [true, 0]}]}]", "holds True"),
        ("rules: [{from: a, to: b, add: much}]", "add is 'much'. Write a number"),
        ("rules: [{from: a, to: b, fill: 1}]", "'fill' is 1. Write true or false"),
        ("rules: [{from: a, to: b, stacked: true}]", "no wildcard that the new dim"),
        ("rules: [{from: a, to: b, note: }]", "'note' is nothing"),
        ("rules: [{from: a, from: b, to: c}]", "'from' stands there twice"),
        ("rules: [{from: **, to: **}]", "needs quotes"),
        ("rules: [", "is not valid YAML"),
        ("rules: !!python/object:os.system [x]", "is not valid YAML"),
        ("rules: &a [*a]", r"rules\[0\] is \["),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_where(text, match, tmp_path):
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(MappingError, match=match):
        rulebook.read(tmp_path / "rules.yaml")


def test_a_file_that_is_no_text_is_said(tmp_path):
    (tmp_path / "rules.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MappingError, match="not UTF-8"):
        rulebook.read(tmp_path / "rules.yaml")


def test_the_example_of_the_room_is_understood():
    [example] = re.findall(r"^    rules:.*?^$", rulebook.__doc__, flags=re.M | re.S)
    names = rulebook._tables(rulebook._Loader(example).get_data(), "the example")
    assert len(names.disk.rules) == 4 and len(names.memory.rules) == 2


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rules.yaml")
    for place in (tmp_path / "rules.yaml", "/dev/zero", tmp_path):
        with pytest.raises(StorageError, match="no ordinary file"):
            rulebook.read(place)
    with pytest.raises(StorageError, match="null byte"):
        rulebook.read("a\0b")
