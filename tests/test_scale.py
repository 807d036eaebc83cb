"""Planning for one rank of many costs what the rank owns. Counts are judged here, and no times."""

import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from bioinit.config import InitPolicy
from bioinit.formats.protocol import Piece, StoredTensor
from bioinit.layout import Box
from bioinit.mapping import Mapping, Names
from bioinit.plan import Model, cover, plan
from bioinit.plan.wanted import wanted
from bioinit.rules import Each, Part, Rule, dropped, rename
from bioinit.targets import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import giant
import scale

MODEL = giant.Giant(
    layers=32, experts=16, hidden=64, ffn=32, heads=4, groups=2, channels=16, vocab=512
)
TP, PP, EP = 2, 8, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("giant")
    giant.safetensors(made, MODEL, shard_bytes=1 << 20)
    return made


@pytest.fixture
def placed(monkeypatch):
    """The stored names that planning places."""
    names = []
    place = cover.Sources._place

    def noted(self, name, *rest):
        names.append(name)
        place(self, name, *rest)

    monkeypatch.setattr(cover.Sources, "_place", noted)
    return names


def of_rank(rank):
    return scale.targets_of(MODEL, scale.place_of(rank, TP, PP, EP, dp=1), TP, PP, EP)


def test_a_rank_places_what_is_stored_of_its_own_layers_and_experts_alone(folder, placed):
    made, _ = scale.planned(folder, of_rank(3 * TP * EP + TP))  # stage 3, the second experts
    assert not made.problems
    assert len(placed) == len(set(placed)) == 4 * (7 + 4 * 3)
    for name in placed:
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        assert int(layer) in range(12, 16)
        if ".experts." in rest:
            assert int(rest.split(".")[2]) in range(4, 8)


def test_every_element_of_a_rank_is_copied(folder):
    for rank in (0, 3 * TP * EP + TP + 1, TP * PP * EP - 1):
        targets = of_rank(rank)
        made, _ = scale.planned(folder, targets)
        held = sum(target.held for target in targets.values())
        copied = sum(copy.bytes for each in made.targets.values() for copy in each.copies)
        assert copied == 2 * held == made.memory_parameters


def test_planning_keeps_little_of_what_it_does_not_own(folder):
    """Two models, of which a rank owns the same; one has eight times as many layers."""
    few = giant.Giant(**{**vars(MODEL), "layers": 4})
    small = folder / "few"
    giant.safetensors(small, few, shard_bytes=1 << 20)
    targets = scale.targets_of(few, scale.Place(0, 0, 0), TP, 1, EP)
    del targets["decoder.final_layernorm.weight"], targets["output_layer.weight"]
    kept = []
    for each in (small, folder, small, folder):
        _, names, stored = scale.opened(each, targets)
        tracemalloc.start()
        made = scale.plan_of(targets, stored, names)
        kept.append((tracemalloc.get_traced_memory()[1], len(stored)))
        tracemalloc.stop()
        assert not made.problems
    (_, _), (_, _), (owned, few_stored), (all_of_it, stored) = kept
    assert (all_of_it - owned) / (stored - few_stored) < 150  # bytes per tensor of other ranks


def stored_tensor(*shape, at=0):
    return StoredTensor(shape, torch.float32, (Piece(0, at, Box.contiguous(shape)),))


def target(key, *shape):
    return Target(key, shape, torch.float32, (Box.contiguous(shape),), False, True, None)


def found(rules, stored, *targets):
    names = Names(Mapping(rules), Mapping.identity())
    return wanted(targets, {name: stored_tensor(*shape) for name, shape in stored.items()}, names)


def test_all_spellings_of_what_a_target_is_made_of_are_wanted():
    rules = [
        rename("h.*.w", "layers.*.w"),
        rename("old.*.w", "layers.*.w"),
        Rule("stack.w", (Part("layers.*.w", (Each(0, 0),)),)),
        dropped("**.freq", "it is computed"),
    ]
    stored = {f"h.{n}.w": (4,) for n in range(9)} | {"stack.w": (9, 4)}
    assert found(rules, stored, target("layers.7.w", 4)) == {"h.7.w", "old.7.w", "stack.w"}


@pytest.mark.parametrize(
    "rule",
    [
        rename("**.w.**", "**.v.**"),
        rename("a*b*.w", "a*b*.v"),
        Rule("h.*.w", (Part("layers.*.w"),), shift=1),
    ],
    ids=["several segments twice", "inside of a segment", "counted otherwise"],
)
def test_where_a_rule_cannot_be_read_backwards_anything_may_be_wanted(rule):
    assert found([rule], {"x": (100,)}, target("layers.1.w", 4)) is None


def test_who_owns_most_of_what_is_stored_looks_at_all_of_it():
    assert found([rename("**", "**")], {"a": (4,), "b": (4,)}, target("a", 4)) is None


def test_a_part_of_a_model_is_planned_as_if_everything_had_been_placed(placed):
    """Duplicates, drops and what nobody wants are told as ever."""
    rules = [
        rename("h.*.w", "layers.*.w"),
        rename("old.*.w", "layers.*.w"),
        dropped("**.freq", "it is computed"),
    ]
    names = [*(f"{front}.{n}.w" for n in range(9) for front in ("old", "h")), "h.1.freq"]
    stored = {name: stored_tensor(4, at=16 * n) for n, name in enumerate(names)}
    model = Model({"layers.7.w": target("layers.7.w", 4)}, lambda key: "normal")
    made = plan(
        model,
        stored,
        Names(Mapping(rules), Mapping.identity()),
        init=InitPolicy(on_unused="report"),
    )
    assert placed[:2] == ["old.7.w", "h.7.w"]
    (each,) = made.targets.values()
    assert each.claim.sources == ("old.7.w",) and [name for name, _ in each.equal] == ["h.7.w"]
    assert [tensor.key for tensor in made.unused] == [n for n in names[:-1] if ".7." not in n]
    assert made.notes == ("stored and not needed: h.1.freq (it is computed)",)


def read_by_this_rank(path, layout):
    """Bytes that loading a divided model reads from files; bytes of its shards."""
    import divided
    import transformers

    import bioinit

    torch.set_num_threads(1)
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    divided.LAYOUTS[layout](model, 2)
    read = bioinit.load_weights(model, path).bytes_read
    return read, sum(tensor.nbytes for tensor in divided.shards(model))


def read_by_layouts(path):
    return {layout: read_by_this_rank(path, layout) for layout in ("rows", "columns")}


@pytest.mark.dist
def test_two_ranks_read_what_the_formulas_say(tmp_path):
    transformers = pytest.importorskip("transformers")
    from volumes import Start

    from tests.processes import together

    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    said = {
        "rows": Start(stored=stored, columns=0, tensors=39, files=1, claims=39, tp=2),
        "columns": Start(stored=stored, columns=1, tensors=39, files=1, claims=39, tp=2),
    }
    for found in together(2, read_by_layouts, str(tmp_path)):
        for layout, (read, held) in found.items():
            expected = said[layout].held * said[layout].amplification
            assert held == pytest.approx(said[layout].held, rel=0.02)
            assert expected * 0.98 <= read <= expected * 1.02
