"""Weights of a checkpoint into a model in place, and names of NeMo 1 as NeMo 2 has them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from bioinit.compat.bionemo import (
    load_weights_sharded_inplace_nemo2_to_mcore,
    nemo1_to_nemo2_biobert_key_mapping,
    update_model_from_checkpoint,
)
from bioinit.errors import BioinitError, ConfigError, PlanError

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore::FutureWarning"
)

# Observed with BioNeMo 2.7.1: the name, then with prefixes "module" and "", with norms as they are
# and as Transformer Engine has them.
LAYER = "model.language_model.encoder.layers.3"
NAMES = [
    (f"{LAYER}.mlp.dense_h_to_4h.weight", "encoder.layers.3.mlp.linear_fc1.weight", None),
    (f"{LAYER}.mlp.dense_4h_to_h.bias", "encoder.layers.3.mlp.linear_fc2.bias", None),
    (
        f"{LAYER}.self_attention.query_key_value.weight",
        "encoder.layers.3.self_attention.linear_qkv.weight",
        None,
    ),
    (
        f"{LAYER}.self_attention.dense.bias",
        "encoder.layers.3.self_attention.linear_proj.bias",
        None,
    ),
    (
        f"{LAYER}.input_layernorm.weight",
        "encoder.layers.3.input_layernorm.weight",
        "encoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
    ),
    (
        f"{LAYER}.input_layernorm.bias",
        "encoder.layers.3.input_layernorm.bias",
        "encoder.layers.3.self_attention.linear_qkv.layer_norm_bias",
    ),
    (
        f"{LAYER}.post_attention_layernorm.weight",
        "encoder.layers.3.pre_mlp_layernorm.weight",
        "encoder.layers.3.mlp.linear_fc1.layer_norm_weight",
    ),
    (
        f"{LAYER}.post_attention_layernorm.bias",
        "encoder.layers.3.pre_mlp_layernorm.bias",
        "encoder.layers.3.mlp.linear_fc1.layer_norm_bias",
    ),
    (
        "model.language_model.encoder.final_layernorm.weight",
        "encoder.final_layernorm.weight",
        None,
    ),
    (
        "model.language_model.embedding.word_embeddings.weight",
        "embedding.word_embeddings.weight",
        None,
    ),
    ("model.lm_head.bias", "output_layer.bias", None),
    ("model.lm_head.weight", "output_layer.weight", None),
    ("model.lm_head.layernorm.weight", "lm_head.layer_norm.weight", None),
    ("model.lm_head.dense.weight", "lm_head.dense.weight", None),
    ("model.language_model.pooler.dense.bias", "pooler.dense.bias", None),
    ("model.binary_head.weight", "binary_head.weight", None),
]


@pytest.mark.parametrize(("old", "new", "fused"), NAMES)
def test_names_of_nemo_1_are_those_of_nemo_2(old, new, fused):
    rename = nemo1_to_nemo2_biobert_key_mapping
    assert rename(old) == f"module.{new}"
    assert rename(old, new_model_prefix="") == new
    assert rename(old, new_model_prefix="module.", te_mapping=True) == f"module.{fused or new}"
    inner = old.removeprefix("model.")
    assert rename(f"net.{inner}", "", "net.") == new
    # The original puts the new prefix between all letters here.
    assert rename(inner, "module", "") == f"module.{new}"
    assert rename(inner, "", "") == new


@pytest.mark.parametrize(
    "key", ["submodel.language_model.x", "optimizer.step", "x.dense_h_to_4h_scale", "data.model.x"]
)
def test_what_is_no_name_of_the_model_stays_as_it_is(key):
    assert nemo1_to_nemo2_biobert_key_mapping(key) == key


# --- models of one's own ---


class Body(nn.Module):
    def __init__(self, layers: int = 12, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, width)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.Linear(width, width) for _ in range(layers))}
        )
        self.norm = nn.BatchNorm1d(width)


class WithHead(Body):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.regression_head = nn.Linear(4, 1)
        self.regression_head_scale = nn.Parameter(torch.ones(1))


def write(model: nn.Module, folder: Path, front: str = "module.") -> Path:
    state = {f"{front}{key}": value for key, value in model.state_dict().items()}
    dcp.save(state, checkpoint_id=folder / "weights", no_dist=True)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(3)
    model = Body()
    nn.init.uniform_(model.norm.running_mean)
    return model, write(model, tmp_path_factory.mktemp("body"))


def kept(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_everything_is_loaded_in_place_and_nothing_given_back(saved):
    original, folder = saved
    model = Body()
    weight = model.embedding.weight
    memory = weight.data_ptr()
    assert load_weights_sharded_inplace_nemo2_to_mcore(model, folder, set()) is None
    assert model.embedding.weight is weight and weight.data_ptr() == memory
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("front", ["", "module.", "model.", "module.module."])
def test_whatever_a_trainer_put_in_front_is_read_without_it(tmp_path, front):
    original = Body(layers=2)
    folder = write(original, tmp_path, front)
    model = Body(layers=2)
    load_weights_sharded_inplace_nemo2_to_mcore(model, str(folder), ())
    assert torch.equal(model.embedding.weight, original.embedding.weight)


@pytest.mark.parametrize("kind", [list, set, tuple, dict.fromkeys])
def test_prefixes_may_come_in_any_collection(saved, kind):
    _, folder = saved
    model = WithHead()
    before = copied(model)
    load_weights_sharded_inplace_nemo2_to_mcore(
        model, folder, kind(["regression_head", "regression_head_scale"])
    )
    heads = {"regression_head.weight", "regression_head.bias", "regression_head_scale"}
    assert heads <= kept(model, before)
    assert "embedding.weight" not in kept(model, before)


def test_a_prefix_is_raw_text_and_what_goes_on_within_its_last_word_is_said(saved, caplog):
    original, folder = saved
    model = WithHead()
    before = copied(model)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ["regression_head"])
    heads = {"regression_head.weight", "regression_head.bias", "regression_head_scale"}
    assert heads <= kept(model, before)
    assert torch.equal(model.embedding.weight, original.embedding.weight)
    assert "'regression_head' skips regression_head_scale too, and 1 in all" in caplog.text


def test_a_prefix_of_whole_words_is_not_warned_of(saved, caplog):
    _, folder = saved
    model = Body()
    before = copied(model)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ["encoder.layers.2."])
    found = {key for key in kept(model, before) if key.startswith("encoder")}
    assert found == {"encoder.layers.2.weight", "encoder.layers.2.bias"}
    assert "skips" not in caplog.text


def test_what_only_the_checkpoint_has_is_left_alone(tmp_path):
    folder = write(WithHead(layers=2), tmp_path)
    model = Body(layers=2)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ())
    # To skip it is to say the same again.
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ("regression_head",))


def test_a_parameter_that_is_not_contiguous_is_loaded(saved):
    original, folder = saved
    model = Body()
    model.encoder["layers"][0].weight = nn.Parameter(torch.zeros(4, 4).t()[:, :])
    assert model.encoder["layers"][0].weight.stride() == (1, 4)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ())
    assert torch.equal(model.encoder["layers"][0].weight, original.encoder["layers"][0].weight)


def test_values_are_cast_to_the_dtype_of_the_model(saved):
    original, folder = saved
    model = Body().to(torch.bfloat16)
    load_weights_sharded_inplace_nemo2_to_mcore(model, folder, ())
    assert torch.equal(model.embedding.weight, original.embedding.weight.to(torch.bfloat16))


# --- errors, after which the model is as it was ---


@pytest.mark.parametrize(
    ("model", "prefixes", "kind", "said"),
    [
        (WithHead, (), PlanError, "regression_head.weight"),
        (lambda: Body(layers=13), (), PlanError, r"encoder\.layers\.12\.weight"),
        (lambda: Body(width=5), (), PlanError, r"\[6, 5\].*\[6, 4\]"),
        (Body, ("hed",), PlanError, "'hed' matches no parameter"),
        (Body, ("",), ConfigError, "is empty and would skip every key"),
        (Body, "encoder", ConfigError, r"Write \['encoder'\]"),
    ],
)
def test_an_error_is_one_that_is_caught_as_usual_and_changes_nothing(
    saved, model, prefixes, kind, said
):
    _, folder = saved
    model = model()
    before = copied(model)
    with pytest.raises(kind, match=said) as raised:
        load_weights_sharded_inplace_nemo2_to_mcore(model, folder, prefixes)
    assert isinstance(raised.value, BioinitError) and "skip_prefixes" not in str(raised.value)
    assert kept(model, before) == set(before)


def test_the_config_says_what_is_skipped(saved):
    class Config:
        initial_ckpt_skip_keys_with_these_prefixes: Any = ("regression_head*",)

    _, folder = saved
    model = WithHead()
    update_model_from_checkpoint(Config(), model, str(folder))
    config = Config()
    config.initial_ckpt_skip_keys_with_these_prefixes = "regression_head"
    with pytest.raises(ConfigError, match="initial_ckpt_skip_keys_with_these_prefixes='regr"):
        update_model_from_checkpoint(config, model, folder)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(BioinitError, match="absent"):
        load_weights_sharded_inplace_nemo2_to_mcore(Body(), tmp_path / "absent", ())


def test_cures_name_what_the_caller_has(tmp_path):
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "w.pt")
    config = SimpleNamespace(initial_ckpt_skip_keys_with_these_prefixes=[])
    for model in (nn.Linear(2, 2), nn.Linear(2, 3, bias=False)):
        with pytest.raises(PlanError, match=r"kip its prefix in initial_ckpt_skip_keys") as caught:
            update_model_from_checkpoint(config, model, tmp_path / "w.pt")
        said = str(caught.value) + "".join(each.cure for each in caught.value.problems)
        assert "in new" not in said and "=init" not in said and "ckpt_initial" not in said


def test_what_only_the_bytes_show_is_said_with_what_is_not_as_it_was(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    torch.save({"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(PlanError, match=r"module is not as it was: .*a\.weight"):
        load_weights_sharded_inplace_nemo2_to_mcore(Tied(), tmp_path / "w.pt", ())
