"""A person's own config class is a family; a module that exists has one as well."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from bioinit import backends, families
from bioinit.config import TrainableModelConfig
from bioinit.contexts import find
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.record import make_record, save_context
from bioinit.storage import Folder


@dataclass(kw_only=True)
class MyConfig(TrainableModelConfig):
    hidden_size: int = 8
    depths: tuple[int, ...] = field(default=(1, 2))

    def configure_model(self) -> nn.Module:
        return nn.Linear(self.hidden_size, 2)


def test_a_config_class_of_ones_own_needs_nothing_else():
    family = families.of_config(MyConfig)
    config = MyConfig(hidden_size=4)
    backend = family.backend(config)
    model = backend.build(lambda: family.build(config))
    assert backend is backends.load("module")
    assert model.weight.is_meta and model.weight.shape == (2, 4)


def test_its_tensors_are_called_what_the_module_calls_them():
    config = MyConfig()
    names = families.of_config(MyConfig).names(config, config.configure_model(), "hf", {})
    (placed,) = names.disk.place("weight", ((),))
    assert placed.key == "weight" and names.memory.place("weight", ((),)) == [placed]


def test_its_saved_context_is_read_back(tmp_path):
    save_context(make_record(MyConfig, {"depths": [3]}), tmp_path)
    fields = families.of_config(MyConfig).read_fields(find((Folder.at(tmp_path),))).fields
    assert fields["depths"].value == (3,) and fields["depths"].literal


def test_of_another_systems_config_the_fields_of_the_same_name_are_read():
    saved = Context("hf", "config.json", {"hidden_size": 16, "vocab_size": 9}, "esm")
    result = families.of_config(MyConfig).read_fields(saved)
    assert result.fields["hidden_size"] == (16, True, "config.json: hidden_size")
    assert {f.name: f.fate for f in result.account} == {
        "hidden_size": "mapped",
        "vocab_size": "ignored",
    }


def test_a_module_of_ones_own_is_loaded_under_its_own_names():
    backend, names = families.of_module(nn.Linear(2, 2))
    assert backend is backends.load("module") and names is None


def test_a_transformers_model_is_loaded_under_the_names_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        vocab_size=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = transformers.MixtralModel(config)
    backend, names = families.of_module(model)
    assert backend is backends.load("transformers") and names is not None
    stored = {f"layers.0.block_sparse_moe.experts.{i}.w2.weight": (8, 8) for i in range(2)}
    found = names(model, stored)
    placed = found.disk.place("layers.0.block_sparse_moe.experts.1.w2.weight", ((),))
    assert placed is not None


def test_a_family_that_is_not_there_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError, match="Closest: 'esm2'"):
        families.load("esm3")


def test_nothing_is_found_where_nothing_speaks():
    assert families.find(None, ["weight"]) is None
    assert families.find(Context("nemo2", "io.json", {}, "pkg.Config"), ()) is None
