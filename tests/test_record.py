"""Records: what was set, live configs that know it, and the saved context."""

import copy
import dataclasses
import enum
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiddle as fdl
import pytest
import torch
import yaml

from bioinit.config import Run, TrainableModelConfig, derived, one_of, own, renamed_from
from bioinit.errors import ConfigError, CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.record import (
    Origin,
    build,
    get_hparam,
    get_hparams,
    get_non_default_hparams,
    load_record,
    make_record,
    plain,
    read_context,
    record_of,
    save_context,
    set_hparam,
    specs,
)
from bioinit.storage import Folder

if TYPE_CHECKING:
    from decimal import Decimal


class Norm(enum.Enum):
    LAYER = "layer_norm"
    RMS = "rms_norm"


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) ** 2


@dataclass(kw_only=True)
class Vision:
    depth: int = 2
    sizes: tuple[int, int] = (8, 8)


@dataclass(kw_only=True)
class BigVision(Vision):
    extra: int = 1


@dataclass(kw_only=True)
class Model(TrainableModelConfig):
    hidden_size: int = 32
    num_heads: int = 4
    kv_channels: int | None = derived(lambda c: c.hidden_size // c.num_heads)
    ffn_size: int | None = None
    dropout: float = 0.1
    norm: Norm = Norm.LAYER
    activation: Callable[[torch.Tensor], torch.Tensor] = torch.nn.functional.gelu
    custom: Callable[..., Any] = one_of(squared_relu)  # noqa: RUF009
    dtype: torch.dtype | None = None
    vision: Vision = field(default_factory=Vision)
    towers: tuple[Vision, ...] = ()
    other: Vision | None = None
    tags: tuple[str, ...] = field(default_factory=lambda: ("a",))
    table: dict[str, float] = field(default_factory=dict)
    head: str = own("linear")
    depth: int = renamed_from("num_layers", default=2)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_size is None:
            self.ffn_size = 4 * self.hidden_size
        assert self.kv_channels is not None
        self.total = self.ffn_size + self.kv_channels


EVERYTHING: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_size": 100,
    "dropout": 0.25,
    "norm": Norm.RMS,
    "activation": torch.nn.functional.silu,
    "custom": squared_relu,
    "dtype": torch.bfloat16,
    "vision": Vision(depth=5, sizes=(1, 2)),
    "towers": (Vision(depth=1), BigVision(extra=3)),
    "other": None,
    "tags": ("x", "y"),
    "table": {"a": 1.5, "b": float("inf")},
}


# ---- the door


def test_only_what_was_written_is_in_the_record() -> None:
    record = make_record(Model, {"hidden_size": 32})
    assert get_hparams(record) == {"hidden_size": 32}
    assert get_non_default_hparams(record) == ["hidden_size"]


def test_values_are_coerced_to_what_the_field_holds() -> None:
    written = {
        "hidden_size": "64",
        "dropout": "1e-3",
        "norm": "RMS",
        "activation": "silu",
        "custom": "squared_relu",
        "dtype": "bf16",
        "vision": {"depth": "3", "sizes": [4, 5]},
        "towers": [{"depth": 1}, Vision(depth=9)],
        "tags": {"b", "a"},
        "table": {"a": 1},
    }
    config = build(make_record(Model, written))
    assert config.hidden_size == 64 and config.dropout == 0.001 and config.norm is Norm.RMS
    assert config.activation is torch.nn.functional.silu and config.custom is squared_relu
    assert config.dtype is torch.bfloat16
    assert config.vision == Vision(depth=3, sizes=(4, 5))
    assert config.towers == (Vision(depth=1), Vision(depth=9))
    assert config.tags == ("a", "b") and config.table == {"a": 1.0}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("fp32", torch.float32),
        (16, torch.float16),
        ("32", torch.float32),
        (torch.float64, torch.float64),
        ("float8_e4m3fn", torch.float8_e4m3fn),
    ],
)
def test_dtypes_are_known_by_their_usual_names(name: Any, dtype: torch.dtype) -> None:
    assert make_record(Model, {"dtype": name}).dtype is dtype


@pytest.mark.parametrize(
    ("written", "path", "says"),
    [
        ({"hiden_size": 1}, "model.hiden_size", "'hidden_size'"),
        ({"total": 3}, "model.total", "Set the fields it is computed from"),
        ({"hidden_size": "twelve"}, "model.hidden_size", "'twelve'"),
        ({"hidden_size": True}, "model.hidden_size", "not true or false"),
        ({"hidden_size": 1.5}, "model.hidden_size", "1.5"),
        ({"norm": "BATCH"}, "model.norm", "LAYER | RMS"),
        ({"dtype": "bfloat17"}, "model.dtype", "'bfloat16'"),
        ({"activation": "gleu"}, "model.activation", "'gelu'"),
        ({"activation": "os.system"}, "model.activation", "knows"),
        ({"tags": "abc"}, "model.tags", "list of str"),
        ({"vision": {"dept": 1}}, "model.vision.dept", "'depth'"),
        ({"vision": {"sizes": [1, 2, 3]}}, "model.vision.sizes", "(1, 2, 3)"),
        ({"vision": 3}, "model.vision", "Vision"),
        ({"vision": Run()}, "model.vision", "Run"),
        ({"towers": [{"depth": "q"}]}, "model.towers.0.depth", "'q'"),
        ({"other": {"depth": "q"}}, "model.other.depth", "'q'"),
        ({"initial_ckpt_skip_keys_with_these_prefixes": "head"}, "prefixes", "list of str"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(written: Any, path: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_record(Model, written, at="model")
    if says == "(1, 2, 3)":
        says = "[1, 2, 3]"
    assert path in str(error.value) and says in str(error.value)


def test_all_wrong_fields_are_named_at_once_with_where_they_are_written() -> None:
    origins = {"model.norm": Origin("recipe", "mine.yaml:7")}
    with pytest.raises(ConfigError) as error:
        make_record(Model, {"hiden_size": 1, "norm": "?"}, origins, at="model")
    first, second = str(error.value).splitlines()
    assert first.startswith("model.hiden_size: ") and second.startswith("model.norm (mine.yaml:7)")


@pytest.mark.parametrize("prefixes", [["head"], ("head",), {"head"}])
def test_skip_prefixes_may_be_any_collection_but_no_text(prefixes: Any) -> None:
    name = "initial_ckpt_skip_keys_with_these_prefixes"
    assert getattr(build(make_record(Model, {name: prefixes})), name) == ("head",)
    live = Model(**{name: prefixes})
    assert getattr(live, name) == ("head",) and record_of(live) == make_plain(name)
    with pytest.raises(ConfigError, match="Write a tuple"):
        Model(**{name: "head"})


def make_plain(name: str) -> Any:
    record = fdl.Config(Model)
    setattr(record, name, ("head",))
    return record


def test_a_type_that_cannot_be_resolved_matters_only_when_it_is_set() -> None:
    @dataclass(kw_only=True)
    class Odd(TrainableModelConfig):
        price: "Decimal | None" = None
        size: int = 1

    assert Odd(size=2).get_hparams() == {"size": 2}
    assert make_record(Odd, {"size": "3"}).size == 3
    with pytest.raises(ConfigError, match="TYPE_CHECKING"):
        make_record(Odd, {"price": 1})


# ---- live configs


def test_a_config_knows_its_record_however_it_was_made() -> None:
    record = make_record(Model, {"hidden_size": 64})
    for config in (Model(hidden_size=64), build(record), fdl.build(record)):
        assert config.get_hparams() == {"hidden_size": 64}
        assert (config.kv_channels, config.ffn_size, config.total) == (16, 256, 272)
    assert record_of(build(record)) == record


def test_building_does_not_tie_the_config_to_the_record() -> None:
    record = make_record(Model, {"hidden_size": 64})
    config = build(record)
    record.hidden_size = 8
    assert config.get_hparam("hidden_size") == 64


@dataclass(kw_only=True)
class Child(Model):
    extra: int = 1


class Undecorated(Model):
    pass


class Mixin:
    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.seen = self.kv_channels  # type: ignore[attr-defined]


@dataclass(kw_only=True)
class Mixed(Mixin, Model):
    pass


def test_parents_and_children_are_tracked_in_any_order() -> None:
    assert Model(hidden_size=64).get_hparams() == {"hidden_size": 64}
    child = Child(extra=3, num_heads=2)
    assert child.get_hparams() == {"num_heads": 2, "extra": 3} and child.kv_channels == 16
    assert Model(num_heads=8).get_hparams() == {"num_heads": 8}
    assert Undecorated(num_heads=8).get_hparams() == {"num_heads": 8}
    mixed = Mixed(num_heads=8)
    assert mixed.seen == 4 and mixed.get_hparams() == {"num_heads": 8}  # type: ignore[attr-defined]


@dataclass(kw_only=True)
class Forgetful(TrainableModelConfig):
    size: int = 4
    twice: int | None = derived(lambda c: 2 * c.size)
    seen: int = field(init=False)

    def __post_init__(self) -> None:  # without super(): its parent's work is done all the same
        assert self.twice is not None
        self.seen = self.twice


def test_derived_fields_are_there_in_a_post_init_that_calls_no_parent() -> None:
    config = Forgetful(size=3, override_parent_fields=["size"])
    assert config.seen == 6 and config.override_parent_fields == ("size",)
    assert dataclasses.replace(config, size=5).seen == 10


def test_positional_arguments_and_slots_are_tracked() -> None:
    @dataclass
    class Loose(TrainableModelConfig):
        size: int = 1
        name: str = "x"

    @dataclass(kw_only=True, slots=True)
    class Tight(TrainableModelConfig):
        size: int = 1

    assert Loose(3, "y").get_hparams() == {"size": 3, "name": "y"}
    assert Tight(size=2).get_hparams() == {"size": 2}
    with pytest.raises(TypeError):
        Loose(3, "y", 5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_keep_the_record(duplicate: Callable[[Any], Any]) -> None:
    config = Model(hidden_size=64, vision=Vision(depth=3))
    again = duplicate(config)
    assert again == config and record_of(again) == record_of(config)
    if duplicate is not copy.copy:
        again.set_hparam("hidden_size", 8)
        assert config.get_hparam("hidden_size") == 64


def test_replace_keeps_what_was_set_and_computes_the_rest_again() -> None:
    config = Model(hidden_size=64, ffn_size=100)
    config.set_hparam("num_heads", 8)
    wider = dataclasses.replace(config, hidden_size=128)
    assert (wider.kv_channels, wider.ffn_size, wider.total) == (16, 100, 116)
    assert wider.get_hparams() == {"hidden_size": 128, "num_heads": 8, "ffn_size": 100}
    assert dataclasses.replace(wider) == wider


def test_replace_does_not_apply_a_post_init_twice() -> None:
    @dataclass(kw_only=True)
    class Doubling(TrainableModelConfig):
        size: int = 1
        other: int = 1

        def __post_init__(self) -> None:
            self.size *= 2

    config = Doubling(size=3)
    assert config.size == 6 and config.get_hparam("size") == 3
    assert dataclasses.replace(config, other=5).size == 6
    assert dataclasses.replace(config, size=4).size == 8


def test_an_assigned_field_is_kept_by_replace_and_refused_by_save(tmp_path: Path) -> None:
    config = Model()
    config.dropout = 0.5
    assert dataclasses.replace(config, num_heads=2).get_hparams() == {
        "num_heads": 2,
        "dropout": 0.5,
    }
    with pytest.raises(ConfigError, match=r"set_hparam\('dropout', 0.5\)"):
        save_context(config, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- hyper-parameters


@pytest.mark.parametrize(
    "make", [lambda: Model(num_heads=2), lambda: make_record(Model, {"num_heads": 2})]
)
def test_hparams_are_what_was_given_or_the_default(make: Callable[[], Any]) -> None:
    config = make()
    assert get_hparam(config, "num_heads") == 2
    assert get_hparam(config, "dropout") == 0.1
    assert get_hparam(config, "tags") == ("a",)
    assert get_hparam(config, "total") == 128 + 16
    assert get_hparam(config, "kv_channels") is None
    assert get_hparam(config, "vision") == record_of(Vision())
    with pytest.raises(ConfigError, match="'num_heads'"):
        get_hparam(config, "num_head")


def test_a_value_equal_to_the_default_still_counts_as_set() -> None:
    assert Model(dropout=0.1).get_non_default_hparams() == ["dropout"]


def test_setting_changes_record_and_value_and_what_depends_on_it() -> None:
    config = Model()
    config.set_hparam("hidden_size", 64)
    assert (config.hidden_size, config.kv_channels, config.ffn_size) == (64, 16, 256)
    assert config.total == 272 and config.get_hparams() == {"hidden_size": 64}
    config.set_hparam("kv_channels", 3)
    config.set_hparam("hidden_size", 128)
    assert config.kv_channels == 3 and config.total == 515


def test_setting_only_the_record_leaves_the_value() -> None:
    config = Model()
    config.set_hparam("dropout", 0.5, also_change_value=False)
    assert config.dropout == 0.1 and config.get_hparam("dropout") == 0.5
    assert build(record_of(config)).dropout == 0.5


def test_a_config_that_is_set_becomes_a_record() -> None:
    config = Model()
    config.set_hparam("vision", Vision(depth=9))
    assert isinstance(config.get_hparam("vision"), fdl.Config)
    assert config.vision == Vision(depth=9)


@pytest.mark.parametrize("also", [True, False])
@pytest.mark.parametrize(
    ("name", "value"), [("zzz", 1), ("total", 1), ("hidden_size", "x"), ("tags", "abc")]
)
def test_a_refused_setting_changes_nothing(name: str, value: Any, also: bool) -> None:
    config = Model(hidden_size=64)
    before = copy.deepcopy(config)
    with pytest.raises(ConfigError):
        config.set_hparam(name, value, also_change_value=also)
    assert config == before and record_of(config) == record_of(before)
    assert not hasattr(config, "zzz")


def test_a_setting_that_contradicts_the_others_changes_nothing() -> None:
    config = Model(hidden_size=64)
    with pytest.raises(ConfigError, match="kv_channels"):
        config.set_hparam("num_heads", 0)
    assert config.num_heads == 4 and config.get_hparams() == {"hidden_size": 64}


def test_a_record_is_set_through_the_same_door() -> None:
    record = make_record(Model, {})
    set_hparam(record, "activation", "relu")
    assert record.activation is torch.nn.functional.relu
    with pytest.raises(ConfigError):
        set_hparam(record, "activation", "nope")


# ---- building


def test_a_missing_field_is_named_with_its_path() -> None:
    @dataclass(kw_only=True)
    class Needs(TrainableModelConfig):
        size: int

    with pytest.raises(ConfigError, match=r"^model: Needs has no default for size.*model\.size"):
        build(make_record(Needs, {}), at="model")


@dataclass(kw_only=True)
class Picky:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size={self.size} is negative")


@dataclass(kw_only=True)
class Holder(TrainableModelConfig):
    inner: Picky = field(default_factory=Picky)


def test_a_constructor_that_refuses_becomes_one_error_with_the_path() -> None:
    with pytest.raises(ConfigError) as error:
        build(make_record(Holder, {"inner": {"size": -1}}), at="model")
    assert str(error.value) == "model.inner: cannot make a Picky: size=-1 is negative"


def test_a_shared_record_is_built_once() -> None:
    shared = record_of(Vision(depth=7))
    record = make_record(Model, {})
    record.vision, record.other = shared, shared
    config = build(record)
    assert config.vision is config.other


# ---- the saved context


@pytest.mark.parametrize("values", [{}, {"hidden_size": 32}, EVERYTHING])
@pytest.mark.parametrize("make", [lambda v: Model(**v), lambda v: make_record(Model, v)])
def test_a_saved_context_gives_an_equal_record(
    tmp_path: Path, values: dict[str, Any], make: Callable[[Any], Any]
) -> None:
    config = make(values)
    save_context(config, tmp_path)
    again = load_record(tmp_path, Model)
    assert again == record_of(config)
    assert build(again) == build(record_of(config))
    assert load_record(tmp_path / "context", Model) == again


def test_the_yaml_shows_every_field_and_its_value(tmp_path: Path) -> None:
    save_context(Model(**EVERYTHING), tmp_path)
    shown = yaml.safe_load((tmp_path / "context" / "model.yaml").read_text())
    assert set(shown) == set(specs(Model))
    assert shown["dtype"] == "bfloat16" and shown["norm"] == "RMS" and shown["total"] == 116
    assert shown["activation"] == "torch.nn.functional.silu"
    assert shown["towers"][1] == {"depth": 2, "sizes": [8, 8], "extra": 3}


def test_the_json_tells_set_from_default_and_computed(tmp_path: Path) -> None:
    save_context(Model(hidden_size=32), tmp_path)
    document = json.loads((tmp_path / "context" / "record.json").read_text())
    node = document["record"]["set"]["model"]
    assert node["set"] == {"hidden_size": 32}
    assert node["default"]["num_heads"] == 4
    assert node["computed"] == {"kv_channels": 8, "ffn_size": 128, "total": 136}
    values = plain(node)
    assert values["towers"] == () and values["norm"] == "Norm.LAYER" and values["total"] == 136


def test_a_whole_run_is_saved_with_its_origins(tmp_path: Path) -> None:
    origins = {"model.hidden_size": Origin("command line", "model.hidden_size=64")}
    model = make_record(Model, {"hidden_size": 64}, origins, at="model")
    run = make_record(Run, {"model": model, "init": {"new": ["pooler.*"]}}, origins)
    save_context(run, tmp_path)
    assert load_record(tmp_path, Run, model=Model) == run
    assert load_record(tmp_path, Model) == model


def test_the_origins_of_a_model_s_fields_are_kept_beside_them(tmp_path: Path) -> None:
    save_context(Model(), tmp_path, {"model.norm": Origin("checkpoint", "config.json: norm")})
    document = json.loads((tmp_path / "context" / "record.json").read_text())
    assert document["origins"] == {"model.norm": {"by": "checkpoint", "where": "config.json: norm"}}


def test_a_function_that_could_not_be_found_again_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    config = Model(activation=lambda x: x)
    with pytest.raises(ConfigError, match=r"model\.activation: .*one_of"):
        save_context(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [object(), Norm.RMS, Vision(), b"x"])
def test_a_value_that_could_not_be_read_back_is_refused(tmp_path: Path, value: Any) -> None:
    @dataclass(kw_only=True)
    class Anything(TrainableModelConfig):
        thing: Any = None

    with pytest.raises(ConfigError, match=r"model\.thing"):
        save_context(Anything(thing=value), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_that_a_file_names_is_imported(tmp_path: Path) -> None:
    save_context(Model(), tmp_path)
    file = tmp_path / "context" / "record.json"
    document = json.loads(file.read_text())
    node = document["record"]["set"]["model"]
    node["$config"] = "antigravity.Config"
    node["set"] = {"activation": {"$name": "antigravity.fly"}}
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="activation"):
        load_record(tmp_path, Model)
    node["set"] = {"norm": {"$enum": "antigravity.RMS"}}
    file.write_text(json.dumps(document))
    assert load_record(tmp_path, Model).norm is Norm.RMS
    node["set"] = {"other": {"$config": "antigravity.Vision", "set": {"depth": 4}}}
    file.write_text(json.dumps(document))
    assert build(load_record(tmp_path, Model)).other == Vision(depth=4)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("value", ["os.system", "torch.load", "torch.nn.functional.__loader__"])
def test_only_functions_of_the_table_are_found(tmp_path: Path, value: str) -> None:
    save_context(Model(), tmp_path)
    file = tmp_path / "context" / "record.json"
    document = json.loads(file.read_text())
    document["record"]["set"]["model"]["set"] = {"activation": {"$name": value}}
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="activation"):
        load_record(tmp_path, Model)


def test_a_renamed_field_is_read_under_its_new_name(tmp_path: Path) -> None:
    save_context(Model(depth=9), tmp_path)
    file = tmp_path / "context" / "record.json"
    file.write_text(file.read_text().replace('"depth": 9', '"num_layers": 9'))
    assert load_record(tmp_path, Model).depth == 9


def test_a_set_field_that_the_class_lacks_is_refused_by_name(tmp_path: Path) -> None:
    save_context(Child(extra=5), tmp_path)
    with pytest.raises(ConfigError, match="extra"):
        load_record(tmp_path, Model)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", CorruptCheckpoint),
        ("{", CorruptCheckpoint),
        ("[]", CorruptCheckpoint),
        ("{}", CorruptCheckpoint),
        ('{"bioinit_context": 1}', CorruptCheckpoint),
        ('{"bioinit_context": 1, "record": {"set": {"model": 3}}}', CorruptCheckpoint),
        (
            '{"bioinit_context": 1, "record": {"set": {"model": 3}}, "origins": {}}',
            CorruptCheckpoint,
        ),
        (
            '{"bioinit_context": 1, "record": {"set": {"model": {"$config": "x", "set": []}}}, '
            '"origins": {}}',
            CorruptCheckpoint,
        ),
        ('{"bioinit_context": 2}', RefusedCheckpoint),
    ],
)
def test_a_damaged_context_is_an_error_of_the_checkpoint(
    tmp_path: Path, text: str, error: type[Exception]
) -> None:
    save_context(Model(), tmp_path)
    (tmp_path / "context" / "record.json").write_text(text)
    with pytest.raises(error):
        load_record(tmp_path, Model)


def test_a_value_of_the_wrong_type_in_a_context_is_refused(tmp_path: Path) -> None:
    save_context(Model(hidden_size=64), tmp_path)
    file = tmp_path / "context" / "record.json"
    file.write_text(file.read_text().replace('"hidden_size": 64', '"hidden_size": "many"'))
    with pytest.raises(ConfigError, match="hidden_size"):
        load_record(tmp_path, Model)


def test_a_folder_without_a_context_is_said_to_have_none(tmp_path: Path) -> None:
    assert read_context(Folder.at(tmp_path)) is None
    with pytest.raises(StorageError, match="record"):
        load_record(tmp_path, Model)


def test_a_context_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        save_context(Model(), tmp_path / "file")
