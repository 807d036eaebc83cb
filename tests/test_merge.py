"""The merge table of docs/design.md, row by row, and what stands beside it."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fiddle as fdl
import pytest
import torch

from bioinit.config import TrainableModelConfig, derived, own, renamed_from
from bioinit.errors import ConfigError
from bioinit.merge import merge
from bioinit.record import (
    Origin,
    SavedField,
    build,
    load_record,
    make_record,
    read_context,
    read_fields,
    record_of,
    save_context,
    set_hparam,
)
from bioinit.storage import Folder

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
FILE = "config.json"


@dataclass(kw_only=True)
class Tower(TrainableModelConfig):
    """The fields under test are the last five; each test touches one of them."""

    hidden_size: int = 8
    plain: int = 1
    made: tuple[int, ...] = field(default_factory=lambda: (1,))
    mine: int = own(1)
    computed: int | None = derived(lambda c: c.hidden_size * 2)
    filled: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filled is None:
            self.filled = self.hidden_size * 3


class Row(NamedTuple):
    number: int
    kind: str
    checkpoint: str
    set: str
    listed: str
    on_conflict: str
    value: str
    origin: str
    shadowed: str
    problem: str
    record: str


class Case(NamedTuple):
    """One row with every `any` decided, for one field and one way in which a person sets it."""

    row: Row
    name: str
    checkpoint: str
    literal: bool
    setter: Origin | None
    listed: bool
    on_conflict: str
    parent_changes: bool

    def __str__(self) -> str:
        literal = "literal" if self.literal else "class"
        return (
            f"{self.row.number}-{self.name}-{self.checkpoint}-{literal}-"
            f"{self.setter.by if self.setter else 'Python' if self.row.set == 'yes' else 'unset'}-"
            f"{'listed' if self.listed else 'unlisted'}-{self.on_conflict}"
            f"{'-changed' if self.parent_changes else ''}"
        )


def rows() -> Iterator[Row]:
    """The table as it is written, row 22 spelled out."""
    table = DESIGN.read_text().partition("## Who wins")[2]
    found: dict[int, list[str]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            found[int(cells[0])] = cells[1:]
    assert list(found) == list(range(1, 23)), "the table has 22 rows; this test knows each of them"
    derived_and_set = found.pop(22)
    assert derived_and_set[:2] == ["derived", "any"] and "as rows 2, 5 to 9 and 12" in str(
        derived_and_set
    )
    for number, cells in found.items():
        yield Row(number, *cells)
    for number in (2, 5, 6, 7, 8, 9, 12):
        yield Row(number, "derived", *found[number][1:])


PRESET = Origin("default", "conf/model/small.yaml:3")


def cases() -> Iterator[Case]:
    for row in rows():
        names = {"own": ("mine",), "derived": ("computed", "filled"), "plain": ("plain", "made")}
        kinds = {"-": ["-"], "any": ["-", "literal", "class"]}.get(row.checkpoint) or [
            kind for kind in ("literal", "class") if kind in row.checkpoint
        ]
        setters: list[Origin | None] = [None]
        if row.set == "yes":
            setters = [Origin("recipe", "r.yaml:2"), Origin("command line", "model.x=2"), None]
        elif "preset not chosen" in row.kind:
            setters = [PRESET, None] if "or none" in row.kind else [PRESET]
        listings = [True, False] if row.listed == "any" else [row.listed == "yes"]
        policies = (
            ["error", "checkpoint", "recipe"] if row.on_conflict == "any" else [row.on_conflict]
        )
        changes = [False, True] if row.number in (18, 19, 21) else [False]
        for name in (n for kind in names if kind in row.kind for n in names[kind]):
            for kind, value, setter, listed, policy, changed in itertools.product(
                kinds, saved_values(row, name), setters, listings, policies, changes
            ):
                value = "-" if kind == "-" else value
                yield Case(row, name, value, kind == "literal", setter, listed, policy, changed)


def saved_values(row: Row, name: str) -> list[str]:
    """Which values in the checkpoint a row speaks of, for a field of this name."""
    if "equal" in row.checkpoint:
        return ["same"]
    if name not in ("computed", "filled") or "another" in row.checkpoint:
        return ["other"]
    return ["derives", "null"] if "derives" in row.checkpoint else ["derives", "null", "other"]


ALL = list(dict.fromkeys(cases()))


class Values:
    """What each word of the table means for one field."""

    def __init__(self, case: Case) -> None:
        wrap: Callable[[int], Any] = (lambda n: (n,)) if case.name == "made" else (lambda n: n)
        factor = {"computed": 2, "filled": 3}.get(case.name)
        hidden = 10 if case.parent_changes else 8
        self.derived = None if factor is None else hidden * factor
        self.before = None if factor is None else 8 * factor
        self.default = wrap(1) if factor is None else self.derived
        self.person = self.preset = wrap(2)
        self.saved = {
            "-": None,
            "same": self.person,
            "other": wrap(5),
            "derives": self.before,
            "null": None,
        }[case.checkpoint]
        self.effective = self.before if case.checkpoint == "null" else self.saved


def run(case: Case) -> Any:
    values = Values(case)
    raw: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    listed = [case.name] if case.listed else []
    saved = {}
    if case.checkpoint != "-":
        place = f"{FILE}: {case.name}"
        saved = {case.name: SavedField(values.saved, case.literal, place)}
    if case.parent_changes:
        raw["hidden_size"] = 10
        listed.append("hidden_size")
    saved["hidden_size"] = SavedField(8, True, FILE)
    if case.row.set == "yes" or case.setter == PRESET:
        raw[case.name] = values.person
        if case.setter is not None:
            origins[f"model.{case.name}"] = case.setter
    raw["override_parent_fields"] = listed
    record = make_record(Tower, raw, at="model")
    return merge(record, saved, origins, case.on_conflict)


@pytest.fixture(scope="module")
def saved_here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_row_of_the_table(case: Case, saved_here: Path) -> None:
    row, values, merged = case.row, Values(case), run(case)
    [decision] = [d for d in merged.decisions if d.field == case.name]

    value = {
        "default": values.default,
        "derived": values.derived,
        "derived again": values.derived,
        "person's": values.person,
        "preset's": values.preset,
        "checkpoint's": values.effective,
        "both": values.person,
    }[row.value]
    assert decision.value == value
    assert getattr(build(merged.record), case.name) == value

    person = case.setter.by if case.setter else "recipe"
    origin = {"person": person, "default": "default", "checkpoint": "checkpoint"}.get(row.origin)
    if origin is None:
        assert row.origin == "checkpoint if it is still the same, else default"
        origin = "default" if case.parent_changes else "checkpoint"
    assert decision.origin.by == origin
    if origin == "checkpoint":
        assert decision.origin.where == f"{FILE}: {case.name}"

    lost = {
        "-": None,
        "default": (values.default, "default"),
        "derived": (values.before, "default"),
        "preset": (values.preset, "default"),
        "person": (values.person, person),
        "checkpoint": (values.effective, "checkpoint"),
    }[row.shadowed]
    if lost is not None and lost[0] == value:
        lost = None
    found = decision.shadowed and (decision.shadowed[0], decision.shadowed[1].by)
    assert found == lost

    conflicts = [p for p in merged.problems if p.key == case.name]
    assert bool(conflicts) == (row.problem == "**conflict**")
    for problem in conflicts:
        assert problem.kind == "conflict"
        for part in (repr(values.effective), repr(values.person), FILE, "override_parent_fields"):
            assert part.strip("()").strip(",") in str(problem)

    is_set = case.name in fdl.ordered_arguments(merged.record)
    assert is_set == (row.record == "set")
    save_context(merged.record, saved_here)
    document = json.loads((saved_here / "context" / "record.json").read_text())
    node = document["record"]["set"]["model"]
    assert (case.name in node["set"]) == is_set
    assert sum(case.name in node[part] for part in ("set", "default", "computed")) == 1
    assert load_record(saved_here, Tower) == merged.record


def test_every_row_was_tried() -> None:
    assert {case.row.number for case in ALL} == set(range(1, 22))
    assert {case.row.number for case in ALL if case.row.kind == "derived"} > {2, 5, 6, 7, 8, 9, 12}


def test_what_was_merged_is_literal_in_the_next_run(tmp_path: Path) -> None:
    record = make_record(Tower, {"hidden_size": 16}, at="model")
    first = merge(record, {"plain": SavedField(7, False, FILE)}, {})
    save_context(first.record, tmp_path)
    document, where = read_context(Folder.at(tmp_path))
    fields, unknown = read_fields(document["record"]["set"]["model"], Tower, where)
    assert not unknown and all(saved.literal for saved in fields.values())
    second = merge(make_record(Tower, {}), fields, {})
    assert build(second.record) == build(first.record)
    assert not second.problems
    third = merge(make_record(Tower, {"plain": 9}), fields, {})
    assert [p.key for p in third.problems] == ["plain"]


def test_the_default_of_an_older_class_survives_a_change_of_the_code(tmp_path: Path) -> None:
    save_context(make_record(Tower, {}), tmp_path)
    file = tmp_path / "context" / "record.json"
    file.write_text(file.read_text().replace('"plain": 1', '"plain": 77'))
    document, where = read_context(Folder.at(tmp_path))
    fields, _ = read_fields(document["record"]["set"]["model"], Tower, where)
    assert build(merge(make_record(Tower, {}), fields, {}).record).plain == 77
    assert build(load_record(tmp_path, Tower)).plain == 77


def test_without_a_checkpoint_everything_stays_as_the_recipe_says() -> None:
    record = make_record(Tower, {"plain": 3})
    merged = merge(record, None, {"model.plain": Origin("recipe", "r.yaml:1")})
    assert merged.record == record and not merged.missing and not merged.problems
    assert {d.field for d in merged.decisions if d.is_remarkable} == {"plain"}


def test_the_given_record_is_not_changed() -> None:
    record = make_record(Tower, {"plain": 3})
    merge(record, {"plain": SavedField(4, True, FILE)}, {}, "checkpoint")
    assert record == make_record(Tower, {"plain": 3})


def test_a_listed_name_that_nobody_knows_is_refused_with_the_closest() -> None:
    record = make_record(Tower, {"override_parent_fields": ["hiden_size"]})
    with pytest.raises(ConfigError, match="hidden_size"):
        merge(record, {}, {})


@pytest.mark.parametrize("name", ["initial_ckpt_path", "override_parent_fields", "mine", "old"])
def test_a_listed_name_may_be_own_or_known_to_the_checkpoint_only(name: str) -> None:
    record = make_record(Tower, {"override_parent_fields": [name]})
    merged = merge(record, {"old": SavedField(1, True, FILE)}, {})
    assert [p.key for p in merged.problems] == ([] if name == "old" else ["old"])


def test_a_saved_field_that_nobody_knows_is_a_problem_with_its_cure() -> None:
    merged = merge(make_record(Tower, {}), {"plane": SavedField(1, True, FILE)}, {})
    [problem] = merged.problems
    assert (problem.kind, problem.key, merged.unknown) == ("field", "plane", ("plane",))
    assert "'plain'" in problem.message and "renamed_from" in problem.cure


def test_fields_that_the_context_lacks_are_named() -> None:
    merged = merge(make_record(Tower, {}), {"plain": SavedField(1, True, FILE)}, {})
    assert set(merged.missing) == {"hidden_size", "made", "computed", "filled"}


@dataclass(kw_only=True)
class Vision:
    depth: int = 2
    eps: float = 1e-5


@dataclass(kw_only=True)
class Text:
    depth: int = 2


@dataclass(kw_only=True)
class Both(TrainableModelConfig):
    num_layers: int = renamed_from("n_layers", default=2)
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.gelu
    vision: Vision = field(default_factory=Vision)
    side: Vision | Text | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count = self.num_layers + self.vision.depth


def literal(**values: Any) -> dict[str, SavedField]:
    return {name: SavedField(value, True, f"{FILE}: {name}") for name, value in values.items()}


def test_a_nested_config_is_merged_field_by_field() -> None:
    record = make_record(Both, {"vision": {"eps": 0.1}}, at="model")
    saved = literal(vision={"depth": 7, "eps": 0.5})
    origins = {"model.vision.eps": Origin("command line", "model.vision.eps=0.1")}
    merged = merge(record, saved, origins)
    assert [p.key for p in merged.problems] == ["vision.eps"]
    assert "model.vision.eps is 0.1 (command line, model.vision.eps=0.1)" in str(merged.problems[0])
    assert build(merged.record).vision == Vision(depth=7, eps=0.5)
    kept = merge(
        make_record(Both, {"vision": {"eps": 0.1}, "override_parent_fields": ["vision.eps"]}),
        saved,
        origins,
    )
    assert not kept.problems and build(kept.record).vision == Vision(depth=7, eps=0.1)
    whole = merge(make_record(Both, {"override_parent_fields": ["vision"]}), saved, {})
    assert build(whole.record).vision == Vision()


def test_nested_configs_of_two_classes_are_one_value_each() -> None:
    record = make_record(Both, {"side": record_of(Text(depth=3))})
    saved = literal(side=record_of(Vision(depth=4)))
    merged = merge(record, saved, {}, "checkpoint")
    assert build(merged.record).side == Vision(depth=4)
    [decision] = [d for d in merged.decisions if d.field.startswith("side")]
    assert decision.shadowed is not None


def test_a_renamed_field_is_taken_under_its_new_name_and_noted() -> None:
    merged = merge(make_record(Both, {}), literal(n_layers=5), {})
    [decision] = [d for d in merged.decisions if d.field == "num_layers"]
    assert decision.value == 5 and "n_layers" in decision.note
    assert not merged.unknown and build(merged.record).count == 7


def test_a_function_is_merged_by_its_name() -> None:
    merged = merge(make_record(Both, {}), literal(activation="relu"), {})
    assert build(merged.record).activation is torch.nn.functional.relu
    [decision] = [d for d in merged.decisions if d.field == "activation"]
    assert decision.to_json() == {
        "field": "activation",
        "value": "torch.nn.functional.relu",
        "origin": "checkpoint",
        "where": f"{FILE}: activation",
        "shadowed": {"value": "torch.nn.functional.gelu", "origin": "default", "where": "Both"},
    }


def test_a_saved_value_that_the_field_cannot_hold_is_a_problem_until_it_is_listed() -> None:
    saved = literal(activation="my_own_activation")
    [problem] = merge(make_record(Both, {}), saved, {}).problems
    assert (problem.kind, problem.key) == ("field", "activation")
    assert "my_own_activation" in problem.message and "override_parent_fields" in problem.cure
    listed = make_record(Both, {"override_parent_fields": ["activation"]})
    assert not merge(listed, saved, {}).problems
    chosen = make_record(Both, {"activation": "silu"})
    assert merge(chosen, saved, {}).problems
    assert not merge(chosen, saved, {}, "recipe").problems


def test_values_are_compared_as_the_field_holds_them() -> None:
    record = make_record(Both, {"vision": {"eps": 1}})
    assert not merge(record, literal(vision={"eps": 1.0}), {}).problems


def test_drift_that_changes_no_shape_is_remarkable() -> None:
    merged = merge(make_record(Both, {}), literal(vision={"eps": 1e-12}), {})
    shown = [d.render() for d in merged.decisions if d.is_remarkable]
    assert shown == [
        f"vision.eps = 1e-12 (checkpoint, {FILE}: vision.eps), not 1e-05 (default, Vision)"
    ]


def test_a_computed_field_shows_the_value_it_has_after_the_merge() -> None:
    merged = merge(make_record(Both, {}), literal(num_layers=9), {})
    [decision] = [d for d in merged.decisions if d.field == "count"]
    assert decision.value == 11 and "count" not in fdl.ordered_arguments(merged.record)


def test_values_that_contradict_each_other_after_the_merge_are_refused() -> None:
    record = make_record(Both, {"num_labels": 3, "labels": ["a", "b"]}, at="model")
    with pytest.raises(ConfigError, match=r"^model: num_labels=3"):
        merge(record, {}, {})


def test_what_python_assigns_to_a_composed_record_is_a_person_s_word() -> None:
    preset = {"model.plain": Origin("default", "conf/model/small.yaml:2")}
    record = make_record(Tower, {"plain": 3, "made": [3]}, preset, at="model")
    saved = literal(plain=5)
    assert not merge(record, saved, preset).problems
    record.plain = 4
    [problem] = merge(record, saved, preset).problems
    assert "model.plain is 4 (recipe, test_merge.py:" in problem.message
    again = make_record(Tower, {"plain": 3}, preset, at="model")
    set_hparam(again, "plain", 4)
    [problem] = merge(again, saved, preset).problems
    assert "model.plain is 4 (recipe, test_merge.py:" in problem.message


def test_what_python_assigns_is_judged_like_anything_else() -> None:
    record = make_record(Both, {})
    record.activation, record.vision.depth = "relu", "7"
    assert build(record).activation is torch.nn.functional.relu
    merged = merge(record, literal(activation="relu", vision={"depth": 7}), {})
    assert not merged.problems
    [problem] = merge(record, literal(vision={"depth": 8}), {}).problems
    assert "model.vision.depth is 7 (recipe, test_merge.py:" in problem.message
    record.vision.depth = "many"
    with pytest.raises(ConfigError, match=r"model\.vision\.depth: 'many'"):
        build(record, at="model")
    with pytest.raises(ConfigError, match=r"model\.vision\.depth: 'many'"):
        merge(record, None, {})
