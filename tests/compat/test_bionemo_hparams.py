"""Configs that remember what they were made from, and let it be changed (BioNeMo's mixin)."""

import copy
import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import fiddle as fdl
import pytest

from bioinit.compat import bionemo
from bioinit.compat.bionemo import IOMixinWithGettersSetters, WillHaveGetSetHparam
from bioinit.compat.nemo import io
from bioinit.errors import ConfigError


@dataclass
class Plan(WillHaveGetSetHparam):
    """A base that changes a hyper-parameter before any leaf can do so."""

    rows: int = field(default_factory=lambda: 1)
    columns: int = 3

    def grow(self) -> None:
        self.set_hparam("columns", self.columns + 2)


@dataclass
class Table(Plan, IOMixinWithGettersSetters):
    rows: int = field(default_factory=lambda: 4)
    depth: int = 7


@dataclass
class Wider(Plan, IOMixinWithGettersSetters):
    rows: int = field(default_factory=lambda: 6)
    depth: int = 8
    tags: list[str] = field(default_factory=lambda: ["a"])
    area: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.area = self.rows * self.columns


@dataclass
class Inner:
    size: int = 2


@dataclass
class Outer(IOMixinWithGettersSetters):
    inner: Inner | None = None
    scale: int = 1

    def __post_init__(self) -> None:
        self.scale = self.scale * 10


def test_a_base_without_the_mixin_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Plan()


def test_what_a_base_changes_is_what_is_made_again():
    table = Wider(columns=4)
    table.grow()
    again = io.reinit(table)
    assert (table.columns, again.columns) == (6, 6)
    assert (again.rows, again.depth) == (6, 8)


def test_the_order_in_which_classes_are_made_does_not_matter():
    assert Table(columns=2).get_hparams() == {"columns": 2}
    assert Wider(columns=5).get_hparams() == {"columns": 5}
    assert Wider(9, 5).get_hparams() == {"rows": 9, "columns": 5}


def test_a_hyper_parameter_can_be_changed_beside_the_attribute():
    table = Table()
    table.set_hparam("columns", 9, also_change_value=False)
    assert table.columns == 3 and table.get_hparam("columns") == 9
    assert io.reinit(table).columns == 9
    table.set_hparam("columns", 8)
    assert table.columns == 8 and table.get_hparam("columns") == 8


def test_an_attribute_that_is_set_plainly_is_not_followed():
    table = Table(columns=5)
    table.columns = 6
    assert table.get_hparam("columns") == 5


def test_the_hyper_parameter_is_what_was_passed_and_not_what_became_of_it():
    outer = Outer(scale=2)
    assert (outer.scale, outer.get_hparam("scale")) == (20, 2)


# Observed with BioNeMo 2.7.1 and nemo-toolkit 2.2.1.
SET = [
    (Table(), [], {}),
    (Table(columns=3), ["columns"], {"columns": 3}),
    (Table(5, depth=2), ["rows", "depth"], {"rows": 5, "depth": 2}),
]


@pytest.mark.parametrize(("table", "names", "values"), SET)
def test_what_was_passed_is_set_even_if_it_is_the_default(table, names, values):
    assert table.get_non_default_hparams() == names
    assert table.get_hparams() == values


def test_the_default_of_the_class_answers_for_what_was_not_passed():
    assert Table().get_hparam("columns") == 3
    assert Table().get_hparam("depth") == 7


def test_a_default_factory_answers_with_a_fresh_value():
    wider = Wider()
    assert wider.get_hparam("rows") == 6
    wider.get_hparam("tags").append("b")
    assert wider.get_hparam("tags") == ["a"]


@pytest.mark.parametrize("name", ["q", "area", "__class__"])
def test_an_unknown_hyper_parameter_is_a_key_error_that_says_what_there_is(name):
    with pytest.raises(KeyError, match=r"not found in hyper-parameters of Wider.*columns"):
        Wider(columns=2).get_hparam(name)
    with pytest.raises(ConfigError):
        Wider(columns=2).get_hparam(name)


def test_setting_an_unknown_hyper_parameter_changes_nothing():
    table = Table()
    with pytest.raises(AttributeError, match=r"No parameter named 'colums' exists for .*'columns'"):
        table.set_hparam("colums", 1)
    assert not hasattr(table, "colums") and table.get_hparams() == {}


def test_a_config_in_a_config_is_kept_as_its_record_however_it_came_there(tmp_path):
    passed, given = Outer(inner=Inner(3)), Outer()
    given.set_hparam("inner", Inner(3))
    for outer in (passed, given):
        assert outer.inner == Inner(3)
        assert isinstance(outer.get_hparam("inner"), fdl.Config)
        assert outer.get_hparam("inner").size == 3
        outer.io_dump(tmp_path / "saved", yaml_attrs=[])
        assert io.load(tmp_path / "saved", Outer).inner == Inner(3)


def test_a_copy_has_hyper_parameters_of_its_own():
    table = Table(columns=5)
    other = copy.deepcopy(table)
    other.set_hparam("columns", 6)
    assert table.get_hparam("columns") == 5 and other.get_hparam("columns") == 6


def test_a_set_serves_as_skip_list_and_is_saved(tmp_path):
    @dataclass
    class Skipping(IOMixinWithGettersSetters):
        skipped: Any = None

    config = Skipping(skipped={"head"})
    config.io_dump(tmp_path, yaml_attrs=[])
    assert io.load(tmp_path, Skipping).skipped == {"head"}


def test_what_does_not_remember_is_an_error():
    class Bare(IOMixinWithGettersSetters):
        def __init__(self) -> None: ...

    bare = Bare()
    del bare.__io__
    with pytest.raises(ConfigError, match="does not remember what it was made from"):
        bare.get_hparam("x")


# --- the package ---


@pytest.mark.parametrize("name", bionemo.__all__)
def test_every_name_is_there_and_says_what_it_stands_in_for(name):
    value = getattr(bionemo, name)
    if not isinstance(value, list):
        assert "Stands in for" in value.__doc__ and "bionemo." in " ".join(value.__doc__.split())


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'BioNemo'"):
        _ = bionemo.BioNemo


def test_the_names_are_listed():
    assert set(bionemo.__all__) <= set(dir(bionemo))


def test_importing_the_package_imports_nothing_of_the_original_and_no_torch():
    code = (
        "import sys, bioinit.compat.bionemo;"
        "print(sorted({'torch', 'megatron', 'nemo', 'lightning', 'bionemo'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"


def test_the_lists_are_those_of_bionemo_2_7():
    every = bionemo.OVERRIDE_BIONEMO_CONFIG_DEFAULTS
    biobert = bionemo.OVERRIDE_BIOBERT_CONFIG_DEFAULTS
    assert (len(every), len(biobert)) == (9, 30)
    assert biobert[:9] == every
    assert {"initial_ckpt_path", "model_cls", "bf16", "fp16", "valid_metric"} <= set(every)
    assert {"activation_func", "skip_logits", "params_dtype", "sequence_parallel"} <= set(biobert)
    assert isinstance(every + ["loss_cls"], list)  # noqa: RUF005


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("core.model.config", "BionemoModelConfig BionemoTrainableModelConfig"),
        (
            "llm.model.config",
            "MegatronBioNeMoModelConfig MegatronBioNeMoTrainableModelConfig IOMixinProto "
            "OVERRIDE_BIONEMO_CONFIG_DEFAULTS override_mutate_possibly_extra_mutated_fiddle",
        ),
        ("llm.model.biobert.model", "OVERRIDE_BIOBERT_CONFIG_DEFAULTS"),
        ("llm.utils.iomixin_utils", "IOMixinWithGettersSetters WillHaveGetSetHparam"),
        (
            "llm.utils.weight_utils",
            "load_weights_sharded_inplace_nemo2_to_mcore nemo1_to_nemo2_biobert_key_mapping",
        ),
    ],
)
def test_an_import_of_the_original_needs_our_name_in_front_and_no_more(module, names):
    found = importlib.import_module(f"bioinit.compat.bionemo.{module}")
    for name in names.split():
        assert getattr(found, name) is getattr(bionemo, name)
        assert name in found.__all__


def test_the_modules_are_there_by_their_own_names_too():
    assert bionemo.iomixin_utils.WillHaveGetSetHparam is WillHaveGetSetHparam
    assert bionemo.weight_utils.__name__ == "bioinit.compat.bionemo.weight_utils"
