"""The configs of a run: their keys, their defaults, and what is refused."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from bioinit.config import InitPolicy, Output, Placement, Run, TrainableModelConfig
from bioinit.errors import ConfigError
from bioinit.record import Origin, build, make_record, record_of, specs


def test_the_keys_of_a_recipe_and_their_defaults() -> None:
    assert dataclasses.asdict(InitPolicy()) == {
        "on_conflict": "error",
        "on_missing": "error",
        "on_unused": "report",
        "on_mismatch": "error",
        "new": (),
        "seed": 0,
        "trainable": (),
        "frozen": (),
        "check_finite": False,
        "layers": None,
        "convert": None,
    }
    assert dataclasses.asdict(Placement()) == {
        "device": None,
        "dtype": None,
        "mesh": None,
        "strategy": None,
        "parallel_load": "auto",
    }
    assert dataclasses.asdict(Output()) == {
        "overwrite": False,
        "dialect": "hf",
        "format": None,
    }
    names = set(specs(Run))
    assert {"model", "init", "placement", "output", "output_dir", "origins"} <= names


def test_the_fields_of_every_model_are_its_own_run_s() -> None:
    assert {name: spec.default_value() for name, spec in specs(TrainableModelConfig).items()} == {
        "initial_ckpt_path": None,
        "initial_ckpt_skip_keys_with_these_prefixes": (),
        "override_parent_fields": (),
        "architecture": None,
        "backend": None,
        "num_labels": None,
        "labels": None,
    }
    assert all(spec.marks.own for spec in specs(TrainableModelConfig).values())


@pytest.mark.parametrize("cls", [InitPolicy, Placement, Output, Run])
def test_the_configs_of_a_run_hold_nothing_that_can_be_shared_and_changed(cls: Any) -> None:
    one, other = cls(), cls()
    for name in specs(cls):
        value = getattr(one, name)
        assert not isinstance(value, list | set)
        assert not isinstance(value, dict) or value is not getattr(other, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, next(iter(specs(cls))), 1)


def test_a_run_is_built_from_what_a_recipe_says() -> None:
    origins = {"init.seed": Origin("command line", "init.seed=3")}
    tree = {
        "model": {"anything": 1},
        "init": {"seed": "3", "new": ["pooler.**"]},
        "placement": {"dtype": "bf16", "device": "cpu", "parallel_load": False},
        "output_dir": "/runs/a",
    }
    record = make_record(Run, tree, origins)
    assert record.init.on_missing == "error" and record.output.overwrite is False
    run = build(record)
    assert run.init.seed == 3 and run.init.new == ("pooler.**",)
    assert run.placement == Placement(device="cpu", dtype=torch.bfloat16, parallel_load="off")
    assert run.model == {"anything": 1} and run.origins == origins and run.output == Output()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"modle": {}}, "modle: Run has no field 'modle'. Closest: 'model'."),
        ({"init": {"sed": 1}}, "init.sed: InitPolicy has no field 'sed'. Closest: 'seed'."),
        ({"init": {"on_conflict": "eror"}}, "error | checkpoint | recipe"),
        ({"init": {"on_missing": "checkpoint"}}, "error | init"),
        ({"init": {"on_unused": "init"}}, "report | error"),
        ({"init": {"on_mismatch": "report"}}, "error | init | resize"),
        ({"init": {"new": "pooler"}}, "init.new"),
        ({"init": {"seed": 1.5}}, "init.seed"),
        ({"init": {"check_finite": "maybe"}}, "init.check_finite"),
        ({"placement": {"dtype": "int8"}}, "cannot hold weights"),
        ({"placement": {"dtype": "complex64"}}, "cannot hold weights"),
        ({"placement": {"dtype": "fp33"}}, "placement.dtype"),
        ({"placement": {"device": "gpu"}}, "placement: device='gpu'"),
        ({"placement": {"device": "meta"}}, "placement: device='meta'"),
        ({"placement": {"device": "cuda:x"}}, "Write cpu, cuda or cuda:0"),
        ({"output": {"overwrite": 3}}, "output.overwrite"),
        ({"origins": {}}, "origins"),
        ({"model": 3}, "model is 3"),
    ],
)
def test_what_no_run_can_mean_is_refused(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(make_record(Run, tree))
    assert says in str(error.value)


def test_a_device_that_this_machine_lacks_may_be_planned_for() -> None:
    assert Placement(device="cuda:9").device == "cuda:9"


@pytest.mark.parametrize("given", ["hf", "always", "no"])
def test_a_dialect_to_convert_to_is_nobodys_choice_but_the_models(given: str) -> None:
    with pytest.raises(ConfigError, match=rf"convert='{given}' is not known: write once.*--to DIA"):
        build(make_record(Run, {"init": {"convert": given}}))


@pytest.mark.parametrize("given", [True, False, None, "once"])
def test_converting_once_is_on_or_off(given: Any) -> None:
    assert build(make_record(Run, {"init": {"convert": given}})).init.convert == given


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 4}, (2, 4), None])
def test_a_mesh_is_sizes_by_axis_or_sizes_alone(mesh: Any) -> None:
    given = {"mesh": mesh, "strategy": "fsdp2+tp", "parallel_load": True}
    placement = build(make_record(Run, {"placement": given})).placement
    assert (placement.mesh, placement.parallel_load) == (mesh, "on")


@pytest.mark.parametrize("given", [{"strategy": "fsdp3"}, {"mesh": {"dp": "two"}}, {"mesh": 2}])
def test_what_is_no_strategy_and_no_mesh_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"placement.{next(iter(given))}"):
        build(make_record(Run, {"placement": given}))


@dataclass(kw_only=True)
class Small(TrainableModelConfig):
    width: int = 3
    widths: tuple[int, ...] = field(default_factory=tuple)

    def configure_model(self) -> nn.Module:
        return nn.Linear(self.width, self.num_labels or 2)


def test_a_person_subclasses_it_as_an_ordinary_dataclass() -> None:
    config = Small(width=4, labels=("a", "b", "c"))
    model = config.configure_model()
    assert isinstance(model, nn.Linear) and model.weight.shape == (3, 4)
    assert build(record_of(config)) == config


def test_a_config_without_a_model_says_what_to_write() -> None:
    with pytest.raises(ConfigError, match="configure_model"):
        TrainableModelConfig().configure_model()


def test_labels_count_themselves() -> None:
    assert Small(labels=("a", "b")).num_labels == 2
    assert Small(num_labels=4).num_labels == 4
    with pytest.raises(ConfigError, match="num_labels=4, but there are 2 labels"):
        Small(num_labels=4, labels=("a", "b"))


def test_one_config_s_tuple_is_not_another_s() -> None:
    one = Small(override_parent_fields=["width"])  # type: ignore[arg-type]
    assert one.override_parent_fields == ("width",) and Small().override_parent_fields == ()
