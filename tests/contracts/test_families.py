"""What every family promises, for every family there is.

A family is found by its file in ``bioinit/families``; its test file,
``tests/families/test_<name>.py``, brings ``tiny_configs()``: what ``config.json`` says of small
models of the family, by a name for the report. Nothing here is edited when a family is added.
"""

import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from bioinit import families
from bioinit.backends.transformers.architectures import names as classes
from bioinit.backends.transformers.architectures import tasks
from bioinit.config import TrainableModelConfig
from bioinit.contexts.protocol import Context
from bioinit.families.protocol import Family
from bioinit.formats import open_weights
from bioinit.layout import Box, intersect, numel
from bioinit.mapping import Mapping
from bioinit.merge import merge
from bioinit.record import build, make_record, save_context, specs
from bioinit.storage import Folder
from tests.simulate import execute

TESTS = Path(__file__).parents[1] / "families"
HERE = Path(families.__file__).parent
SIBLINGS = [name for name in families.names() if (HERE / f"{name}.py").exists()]


def module_for(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", TESTS / f"test_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(name: str) -> dict[str, dict]:
    return module_for(name).tiny_configs() if (TESTS / f"test_{name}.py").exists() else {}


CONFIGS = {
    f"{name}-{which}": (name, data) for name in SIBLINGS for which, data in tiny(name).items()
}


def saved(data: dict) -> Context:
    return Context("hf", "config.json", data, data["model_type"])


def config_of(family: Family, data: dict, **written) -> TrainableModelConfig:
    context = saved(data)
    record = make_record(family.config_for(context), written, {}, at="model")
    result = merge(record, family.read_fields(context).fields, {})
    assert not result.problems, [str(problem) for problem in result.problems]
    return build(result.record, at="model")


def built(
    family: Family, data: dict, architecture: str
) -> tuple[TrainableModelConfig, torch.nn.Module]:
    config = config_of(family, data, architecture=architecture)
    return config, family.backend(config).build(lambda: family.build(config))


def config_json(family: Family, config: TrainableModelConfig) -> dict:
    """What ``save_pretrained`` writes for the model of ``config``, beside its weights."""
    saved: Any = family.backend(config).build(lambda: family.build(config))
    saved.config.architectures = [type(saved).__name__]
    return saved.config.to_diff_dict()


def architectures() -> Iterator[tuple[str, str]]:
    for case, (_, data) in CONFIGS.items():
        for architecture in (*tasks(data["model_type"]), *classes(data["model_type"])):
            yield case, architecture


each_config = pytest.mark.parametrize("case", CONFIGS)
each_architecture = pytest.mark.parametrize(("case", "architecture"), list(architectures()))


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def placements(mapping: Mapping, live: dict[str, torch.Tensor]) -> dict[str, list[tuple[str, Box]]]:
    """By canonical key, the boxes that lie there and whose they are."""
    found: dict[str, list[tuple[str, Box]]] = {}
    for key, tensor in live.items():
        for placed in mapping.place(key, (Box.contiguous(tuple(tensor.shape)),)) or ():
            found.setdefault(placed.key, []).append((key, placed.box))
    return found


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_family_brings_small_models_to_hold_it_to_its_promises(name):
    assert tiny(name), f"tests/families/test_{name}.py must define tiny_configs()"


@each_config
def test_its_own_checkpoints_are_recognized_and_others_are_not(case):
    name, data = CONFIGS[case]
    family = families.load(name)
    assert family.recognizes(saved(data))
    assert not family.recognizes(Context("nemo2", "io.json", {}, "some.Config"))


@each_config
def test_every_field_of_a_saved_config_is_accounted_for_once(case):
    name, data = CONFIGS[case]
    family = families.load(name)
    data = data | {"a_field_nobody_knows": 7}
    result = family.read_fields(saved(data))
    assert sorted(f.name for f in result.account if "." not in f.name) == sorted(data)
    ours = specs(family.config_for(saved(data)))
    for field in result.account:
        assert field.note, f"{field.name}: {field.fate}, but nobody says how or why"
        if field.fate == "mapped":
            for target in field.note.split(", "):
                assert target.partition(".")[0] in ours, f"{field.name} became {target}"
    strange = next(f for f in result.account if f.name == "a_field_nobody_knows")
    assert strange.fate in ("unknown", "carried")


@each_config
def test_every_saved_value_is_a_field_of_the_config_class(case):
    name, data = CONFIGS[case]
    family = families.load(name)
    ours = specs(family.config_for(saved(data)))
    assert set(family.read_fields(saved(data)).fields) <= set(ours)


@each_config
def test_a_config_comes_back_equal_from_our_fields(case):
    name, data = CONFIGS[case]
    family = families.load(name)
    once = config_json(family, config_of(family, data))
    twice = config_json(family, config_of(family, once))
    assert once == twice
    ignored = {f.name for f in family.read_fields(saved(data)).account if f.fate == "ignored"}
    moved = {
        f.name for f in family.read_fields(saved(data)).account if f.fate == "mapped"
    } - once.keys()
    for key in data.keys() - ignored - moved - {"model_type"}:
        assert once[key] == data[key], key
    assert once["model_type"] == data["model_type"]


@each_config
def test_a_merged_config_survives_saving(case, tmp_path):
    from bioinit.contexts import find

    name, data = CONFIGS[case]
    family = families.load(name)
    before = config_of(family, data)
    save_context(before, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(data))
    context = find((Folder.at(tmp_path),))
    assert context is not None and family.recognizes(context)
    record = make_record(family.config_for(context), {}, {}, at="model")
    after = build(merge(record, family.read_fields(context).fields, {}).record, at="model")
    assert config_json(family, after) == config_json(family, before)


@each_architecture
def test_every_live_tensor_is_placed_once_and_whole(case, architecture):
    name, data = CONFIGS[case]
    family = families.load(name)
    config, model = built(family, data, architecture)
    # Names that are tied are one tensor, which lies in one place.
    first: dict[int, str] = {}
    live = {
        key: tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if first.setdefault(id(tensor), key) == key
    }
    names = family.names(config, model, "hf", {key: tuple(t.shape) for key, t in live.items()})
    placed = placements(names.memory, live)
    size = dict.fromkeys(live, 0)
    for boxes in placed.values():
        for i, (key, box) in enumerate(boxes):
            size[key] += numel(box.sizes)
            assert not any(intersect(box, other) for _, other in boxes[:i] if box.sizes != ())
    assert size == {key: tensor.numel() for key, tensor in live.items()}


@each_architecture
def test_what_is_saved_is_found_again_bit_for_bit(case, architecture, tmp_path):
    name, data = CONFIGS[case]
    family = families.load(name)
    config, model = built(family, data, architecture)
    backend = family.backend(config)
    real = family.build(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in real.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    backend.save(real, tmp_path, 10**9)
    _, contents = open_weights(Folder.at(tmp_path))
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    shapes = {key: tensor.shape for key, tensor in contents.tensors.items()}
    dialect = family.dialect_of(stored) or "hf"
    names = family.names(config, model, dialect, shapes)
    expected = real.state_dict()
    found = execute(names, stored, expected)
    aliases: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(key)
    for keys in aliases.values():
        assert any(torch.equal(found[key], expected[key]) for key in keys), keys
    if not names.conversions:
        back = execute(names._replace(disk=names.memory, memory=names.disk), expected, stored)
        for key, tensor in stored.items():
            assert torch.equal(back[key], tensor), f"{key} does not come back"


@each_architecture
def test_every_tensor_has_a_rule_that_can_initialize_it(case, architecture):
    name, data = CONFIGS[case]
    family = families.load(name)
    config, model = built(family, data, architecture)
    backend = family.backend(config)
    keys = [*model.state_dict(), *(key for key, _ in model.named_buffers())]
    assert all(backend.describe_init(model, key) for key in keys)
