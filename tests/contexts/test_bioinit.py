"""Our own ``context/`` as a saved config."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bioinit.config import Run, TrainableModelConfig, derived
from bioinit.contexts import load_context
from bioinit.contexts.bioinit import CONTEXT
from bioinit.errors import CorruptCheckpoint
from bioinit.record import Origin, load_record, make_record, read_fields, save_context
from bioinit.storage import Folder


@dataclass(kw_only=True)
class Inner:
    depth: int = 1


@dataclass(kw_only=True)
class Model(TrainableModelConfig):
    width: int = 4
    twice: int | None = derived(lambda c: 2 * c.width)
    inner: Inner = field(default_factory=Inner)


def test_it_says_every_field_and_the_name_of_the_class(tmp_path: Path) -> None:
    save_context(Model(width=5), tmp_path)
    context = CONTEXT.read(Folder.at(tmp_path))
    assert context is not None and context.dialect == "bioinit"
    assert context.model == f"{Model.__module__}.Model"
    assert context.data["width"] == 5 and context.data["twice"] == 10
    assert context.data["inner"] == {"depth": 1}
    fields, unknown = read_fields(context.raw, Model, context.where)
    assert fields["width"].value == 5 and fields["width"].literal
    assert fields["width"].where == f"{tmp_path}/context/record.json: width"
    assert unknown == {}


def test_the_rest_of_a_run_is_in_the_tree(tmp_path: Path) -> None:
    origins = {"init.seed": Origin("command line", "init.seed=3")}
    model = make_record(Model, {"width": 5})
    save_context(make_record(Run, {"model": model, "init": {"seed": 3}}, origins), tmp_path)
    context = CONTEXT.read(Folder.at(tmp_path))
    assert context is not None
    assert context.tree["init"]["seed"] == 3 and context.tree["model"]["width"] == 5


def test_fields_that_a_class_lacks_are_told_apart(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Narrow(TrainableModelConfig):
        width: int = 4

    save_context(Model(inner=Inner(depth=3)), tmp_path)
    context = CONTEXT.read(Folder.at(tmp_path))
    assert context is not None
    fields, unknown = read_fields(context.raw, Narrow, context.where)
    assert "width" in fields and unknown == {"twice": "computed", "inner": "set"}


DAMAGED = {
    "the model is a list": [1],
    "the fields are a list": {"$config": "a.B", "set": [1]},
    "the fields are a number": {"$config": "a.B", "set": 5},
    "a tuple of nothing": {"$config": "a.B", "set": {"width": {"$tuple": 5}}},
    "a float that is none": {"$config": "a.B", "set": {"width": {"$float": "much"}}},
    "a mapping without pairs": {"$config": "a.B", "set": {"width": {"$dict": [1]}}},
    "a mapping as a key": {"$config": "a.B", "set": {"width": {"$dict": [[{}, 1]]}}},
    "a class that is a list": {"$config": ["a"], "set": {}},
}


@pytest.mark.parametrize("node", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_corrupt_and_names_the_file(tmp_path: Path, node: Any) -> None:
    save_context(Model(), tmp_path)
    file = tmp_path / "context" / "record.json"
    document = json.loads(file.read_text())
    document["record"]["set"]["model"] = node
    file.write_text(json.dumps(document))
    with pytest.raises(CorruptCheckpoint, match=r"record\.json"):
        load_context(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"record\.json"):
        load_record(tmp_path, Model)


@pytest.mark.parametrize("depth", [100, 600])
def test_a_record_without_end_is_corrupt(tmp_path: Path, depth: int) -> None:
    save_context(Model(), tmp_path)
    file = tmp_path / "context" / "record.json"
    text = file.read_text().replace('"width": 4', '"width": ' + "[" * depth + "]" * depth)
    assert "[[" in text
    file.write_text(text)
    with pytest.raises(CorruptCheckpoint, match="nested deeper"):
        load_context(tmp_path)
