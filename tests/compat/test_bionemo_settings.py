"""Settings taken over from a checkpoint: what wins, what is tracked, and what is an error."""

import enum
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bioinit.compat import bionemo
from bioinit.compat.bionemo import IOMixinWithGettersSetters
from bioinit.compat.nemo import io
from bioinit.errors import ConfigError, CorruptCheckpoint


class Spec(enum.Enum):
    LOCAL = "local"
    FUSED = "fused"


@dataclass
class Base:
    width: int = 8
    doubled: int = 1
    channels: int | None = None
    heads: int = 2
    dropout: float = 0.1
    tags: list[str] = field(default_factory=lambda: ["new"])
    area: int = field(init=False, default=0)
    dtype: torch.dtype = torch.float32
    activation: Any = torch.nn.functional.gelu
    spec: Spec = Spec.LOCAL
    window: tuple[int, ...] = (1, 1)
    initial_ckpt_path: str | None = None
    override_parent_fields: list[str] = field(
        default_factory=lambda: list(bionemo.OVERRIDE_BIONEMO_CONFIG_DEFAULTS)
    )

    def __post_init__(self) -> None:
        self.doubled = self.doubled * 10
        if self.channels is None:
            self.channels = self.width // self.heads
        self.area = self.width * self.heads

    load_settings_from_checkpoint = bionemo.load_settings_from_checkpoint


@dataclass
class Saved(Base, IOMixinWithGettersSetters):
    only_there: int = 1


@dataclass
class Mine(Base, IOMixinWithGettersSetters):
    head_size: int = 5


class Model(io.IOMixin):
    def __init__(self, config: Any) -> None:
        self.config = config


def checkpoint(config: Any, folder: Path, yaml_attrs: tuple[str, ...] = ("model",)) -> Path:
    context = io.TrainerContext(model=Model(config), trainer=Model(None))
    context.io_dump(folder / "context", yaml_attrs=list(yaml_attrs))
    return folder


def unknown(folder: Path) -> Path:
    """The same checkpoint, as one reads it in whose program its classes are not."""
    for path in (folder / "context").iterdir():
        text = path.read_text()
        for name in ("Saved", "Model"):
            text = text.replace(f'"{name}"', f'"Another{name}"').replace(
                f".{name}\n", f".Another{name}\n"
            )
        path.write_text(text)
    return folder


@pytest.fixture(params=["its class is known", "its class is not known"])
def saved(request, tmp_path):
    """Makes a checkpoint of a config, whose class this program knows or does not."""

    def make(**fields: Any) -> Path:
        folder = checkpoint(Saved(**fields), tmp_path / "saved")
        return folder if request.param == "its class is known" else unknown(folder)

    return make


def test_a_field_that_both_have_is_taken_and_others_stay(saved):
    mine = Mine(head_size=7)
    mine.load_settings_from_checkpoint(saved(width=32, only_there=9))
    assert (mine.width, mine.head_size) == (32, 7)
    assert not hasattr(mine, "only_there")


def test_the_hyper_parameter_is_what_was_passed_and_the_attribute_what_became_of_it(saved):
    mine = Mine()
    mine.load_settings_from_checkpoint(saved(doubled=2))
    assert (mine.doubled, mine.get_hparam("doubled")) == (20, 2)
    assert io.reinit(mine).doubled == 20


def test_what_is_taken_is_set_from_then_on(saved):
    mine = Mine()
    mine.load_settings_from_checkpoint(saved(width=32))
    taken = mine.get_hparams()
    assert taken["width"] == 32 and taken["dropout"] == 0.1 and taken["channels"] is None
    assert "head_size" not in taken and "initial_ckpt_path" not in taken


def test_what_a_class_computes_is_taken_along(saved):
    mine = Mine()
    mine.load_settings_from_checkpoint(saved(width=32, heads=4))
    assert (mine.channels, mine.area) == (8, 128)
    assert "area" not in mine.get_hparams()


def test_a_field_left_to_its_factory_is_no_obstacle(saved):
    mine = Mine(tags=["old"])
    mine.load_settings_from_checkpoint(saved())
    assert mine.tags == ["new"] and mine.get_hparam("tags") == ["new"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", torch.bfloat16),
        ("activation", torch.nn.functional.relu),
        ("spec", Spec.FUSED),
        ("window", (3, 4)),
        ("tags", ["a", "b"]),
        ("dropout", 0.0),
    ],
)
def test_values_come_back_as_what_they_were(saved, name, value):
    mine = Mine()
    mine.load_settings_from_checkpoint(saved(**{name: value}))
    assert getattr(mine, name) == value == mine.get_hparam(name)
    assert type(getattr(mine, name)) is type(value)


def test_the_checkpoint_wins_and_the_log_names_what_was_lost(saved, caplog):
    mine = Mine(dropout=0.3, width=8)
    with caplog.at_level(logging.WARNING):
        mine.load_settings_from_checkpoint(saved(dropout=0.0, width=8))
    assert mine.dropout == 0.0
    assert [r.getMessage() for r in caplog.records] == [
        "dropout of Mine is 0.0 in the checkpoint, and that is taken: the 0.3 that was set is "
        "lost. Add it to override_parent_fields to keep it."
    ]


def test_a_config_that_makes_no_sense_yet_can_take_settings_over(saved):
    mine = Mine()
    mine.set_hparam("heads", 0)
    mine.load_settings_from_checkpoint(saved(width=32, heads=4))
    assert (mine.heads, mine.channels) == (4, 8)


def test_a_listed_field_keeps_its_value(saved):
    mine = Mine(dropout=0.3)
    mine.override_parent_fields.append("dropout")
    mine.load_settings_from_checkpoint(saved(dropout=0.0, width=32))
    assert (mine.dropout, mine.width) == (0.3, 32)


def test_where_a_run_starts_is_never_taken_over(saved):
    mine = Mine(initial_ckpt_path="here", override_parent_fields=["dropout"])
    mine.load_settings_from_checkpoint(saved(initial_ckpt_path="there", width=32))
    assert (mine.initial_ckpt_path, mine.width) == ("here", 32)
    assert mine.override_parent_fields == ["dropout"]


def test_what_follows_from_a_kept_field_is_computed_again(saved):
    mine = Mine(heads=8)
    mine.override_parent_fields.append("heads")
    mine.load_settings_from_checkpoint(saved(width=32, heads=4))
    assert (mine.heads, mine.channels, mine.area) == (8, 4, 256)
    assert io.reinit(mine).channels == 4


def test_what_follows_from_a_kept_attribute_that_was_set_plainly_follows_from_that(saved):
    mine = Mine()
    mine.heads = 8
    mine.override_parent_fields += ["heads", "doubled"]
    mine.load_settings_from_checkpoint(saved(width=32, heads=4, doubled=3))
    assert (mine.heads, mine.channels, mine.area, mine.doubled) == (8, 4, 256, 10)


def test_an_attribute_that_was_set_plainly_and_is_lost_is_named_too(saved, caplog):
    mine = Mine(head_size=3)
    mine.dropout, mine.head_size = 0.5, 9
    mine.load_settings_from_checkpoint(saved(dropout=0.2))
    assert (mine.dropout, mine.head_size) == (0.2, 9)
    assert ["the 0.5 that was set" in r.getMessage() for r in caplog.records] == [True]


def test_what_was_passed_is_not_computed_again(saved):
    mine = Mine(heads=8)
    mine.override_parent_fields.append("heads")
    mine.load_settings_from_checkpoint(saved(width=32, heads=4, channels=5))
    assert mine.channels == 5


def test_configs_do_not_share_their_lists(saved):
    one, other = Mine(), Mine()
    one.override_parent_fields.append("dropout")
    assert "dropout" not in other.override_parent_fields
    assert "dropout" not in bionemo.OVERRIDE_BIONEMO_CONFIG_DEFAULTS
    source = Saved(tags=["a"])
    bionemo.override_mutate_possibly_extra_mutated_fiddle(one, source, ["tags"])
    one.tags.append("b")
    assert source.tags == ["a"] == one.get_hparam("tags")


def test_a_default_that_has_changed_since_is_that_of_the_day(tmp_path):
    folder = checkpoint(Saved(width=16), tmp_path)
    in_force = folder / "context/model.yaml"
    in_force.write_text(
        in_force.read_text()
        .replace("dropout: 0.1", "dropout: 0.25")
        .replace("_target_: torch.float32", "_target_: torch.float16")
        .replace("_name_: LOCAL", "_name_: FUSED")
        .replace("- new", "- old")
    )
    mine = Mine()
    mine.load_settings_from_checkpoint(folder)
    assert (mine.width, mine.dropout, mine.get_hparam("dropout")) == (16, 0.25, 0.25)
    assert (mine.dtype, mine.spec, mine.tags) == (torch.float16, Spec.FUSED, ["old"])
    # What was the default then is none that somebody passed, but it is kept from here on.
    assert "dropout" in mine.get_hparams() and mine.window == (1, 1)


def test_an_enum_that_was_written_without_its_member_says_nothing(saved):
    folder = saved(width=16)
    in_force = folder / "context/model.yaml"
    text = in_force.read_text().replace("    _name_: LOCAL\n", "")
    in_force.write_text(text.replace("    _args_:\n    - local\n", ""))
    mine = Mine(spec=Spec.FUSED)
    mine.override_parent_fields.append("spec")
    mine.load_settings_from_checkpoint(folder)
    assert (mine.width, mine.spec) == (16, Spec.FUSED)
    mine = Mine()
    mine.load_settings_from_checkpoint(folder)
    assert (mine.width, mine.spec) == (16, Spec.LOCAL)


def test_without_model_yaml_a_default_is_that_of_the_class_now(tmp_path):
    mine = Mine(dropout=0.3)
    mine.load_settings_from_checkpoint(checkpoint(Saved(width=16), tmp_path, yaml_attrs=()))
    assert (mine.width, mine.dropout) == (16, 0.1)


def test_a_context_that_holds_the_config_alone_serves_too(tmp_path):
    Saved(width=16).io_dump(tmp_path / "context", yaml_attrs=[])
    mine = Mine()
    mine.load_settings_from_checkpoint(tmp_path)
    assert mine.width == 16


# --- errors ---


def unchanged(mine: Any) -> bool:
    return mine == Mine() and mine.get_hparams() == {}


def test_no_saved_config_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved config"):
        Mine().load_settings_from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        Mine().load_settings_from_checkpoint(tmp_path / "absent")
    (tmp_path / "a.nemo").touch()
    with pytest.raises(FileNotFoundError, match="bioinit convert"):
        Mine().load_settings_from_checkpoint(tmp_path / "a.nemo")


def test_an_empty_io_json_is_no_config(tmp_path):
    (tmp_path / "context").mkdir()
    (tmp_path / "context/io.json").touch()
    with pytest.raises(CorruptCheckpoint):
        Mine().load_settings_from_checkpoint(tmp_path)


def test_a_listed_name_that_nobody_knows_is_an_error(saved):
    mine = Mine(override_parent_fields=["dropuot"])
    with pytest.raises(ConfigError, match=r"'dropuot', which is a field neither.*'dropout'"):
        mine.load_settings_from_checkpoint(saved(width=32))
    assert mine.width == 8


def test_a_list_that_is_one_text_is_an_error(saved):
    with pytest.raises(ConfigError, match=r"Write \['dropout'\]"):
        Mine(override_parent_fields="dropout").load_settings_from_checkpoint(saved())


def test_what_is_kept_must_go_with_what_is_taken(saved):
    mine = Mine(heads=0, channels=1)
    mine.override_parent_fields.append("heads")
    with pytest.raises(ConfigError, match="with what override_parent_fields keeps, make no"):
        mine.load_settings_from_checkpoint(saved(width=32))
    assert mine.width == 8


def test_a_value_of_an_unknown_class_is_an_error_unless_the_field_is_listed(tmp_path):
    folder = unknown(checkpoint(Saved(width=16, activation=Model), tmp_path))
    mine = Mine()
    with pytest.raises(ConfigError, match=r"activation \('.*AnotherModel'\).*track_io"):
        mine.load_settings_from_checkpoint(folder)
    assert unchanged(mine)
    mine.override_parent_fields.append("activation")
    mine.load_settings_from_checkpoint(folder)
    assert (mine.width, mine.activation) == (16, torch.nn.functional.gelu)


def test_a_config_of_something_else_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "esm", "vocab_size": 3}))
    with pytest.raises(ConfigError, match="has no field of Mine"):
        Mine().load_settings_from_checkpoint(tmp_path)


def test_no_dataclass_has_no_fields():
    with pytest.raises(ConfigError, match="is no dataclass"):
        bionemo.load_settings_from_checkpoint(Model(None), "anywhere")


# --- configs of the original software, whose classes nobody has here ---


@dataclass
class Esm2(bionemo.MegatronBioNeMoTrainableModelConfig, IOMixinWithGettersSetters):
    num_layers: int = 6
    hidden_size: int = 128
    num_attention_heads: int = 8
    seq_length: int = 1024
    share_embeddings_and_output_weights: bool = False
    position_embedding_type: str = "learned_absolute"
    head_size: int = 3

    def configure_model(self) -> None: ...

    def get_loss_reduction_class(self) -> None: ...


@pytest.mark.parametrize("name", ["esm2_tp1", "esm2_tp2"])
def test_settings_of_a_real_checkpoint_need_none_of_its_classes(fixtures_dir, name):
    mine = Esm2(attention_dropout=0.4)
    mine.load_settings_from_checkpoint(str(fixtures_dir / "nemo2" / name))
    found = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "attention_dropout": 0.0,
        "seq_length": 64,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "params_dtype": torch.float32,
        "activation_func": torch.nn.functional.gelu,
        "kv_channels": 8,
        "head_size": 3,
    }
    assert {name: getattr(mine, name) for name in found} == found
    assert mine.get_hparam("kv_channels") is None
    again = io.reinit(mine)
    assert (again.kv_channels, again.hidden_size) == (8, 32)


# --- one config to another ---


def test_both_layers_are_cloned():
    target, source = Mine(), Saved(doubled=2)
    source.set_hparam("width", 64, also_change_value=False)
    bionemo.override_mutate_possibly_extra_mutated_fiddle(target, source, ["doubled", "width"])
    assert (target.doubled, target.get_hparam("doubled")) == (20, 2)
    assert (target.width, target.get_hparam("width")) == (8, 64)


def test_a_name_that_the_source_lacks_changes_nothing():
    target = Mine()
    with pytest.raises(KeyError, match="head_size"):
        bionemo.override_mutate_possibly_extra_mutated_fiddle(
            target, Saved(width=64), ["width", "head_size"]
        )
    assert target.width == 8


def test_anything_with_the_two_methods_will_do():
    class Plain:
        def __init__(self) -> None:
            self.hparams: dict[str, Any] = {"a": 1}
            self.a = 10

        def set_hparam(self, attribute: str, value: Any, also_change_value: bool = True) -> None:
            self.hparams[attribute] = value

        def get_hparam(self, attribute: str) -> Any:
            return self.hparams[attribute]

    one, other = Plain(), Plain()
    one.set_hparam("a", 5)
    one.a = 50
    bionemo.override_mutate_possibly_extra_mutated_fiddle(other, one, ["a"])
    assert (other.hparams, other.a) == ({"a": 5}, 50)
