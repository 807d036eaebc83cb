"""A stored tensor may hold all layers, or all experts: those that nobody wants are not lost."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bioinit
from bioinit.config import InitPolicy
from bioinit.errors import PlanError
from bioinit.formats import open_weights
from bioinit.mapping import Mapping, Names
from bioinit.plan import Model, plan
from bioinit.rules import Each, Narrow, Part, Rule
from bioinit.storage import Folder
from bioinit.targets import describe

STACKED = Mapping(
    [Rule("w", (Part("layers.*.weight", (Each(0, 0), Narrow(0, 0, 3, 4))),), fill=True)]
)


def planned(folder: Path, layers: int, skip: tuple[str, ...] = (), **policy):
    save_file({"w": torch.ones(5, 4, 2)}, folder / "model.safetensors")
    module = nn.Module()
    module.layers = nn.ModuleList(nn.Linear(2, 3, bias=False) for _ in range(layers))
    _, contents = open_weights(Folder.at(folder))
    model = Model(describe(module), lambda key: "nothing")
    names = Names(STACKED, Mapping.identity())
    return plan(model, contents.tensors, names, init=InitPolicy(**policy), skip_prefixes=skip)


def test_layers_that_the_model_lacks_are_unused_and_padding_is_not(tmp_path):
    decided = planned(tmp_path, 2)
    [left] = decided.unused
    assert left.key == "w" and left.folded == ["layers.{2..4}.weight"]
    assert "of it: layers.{2..4}.weight" in decided.render()
    assert decided.to_json()["unused"][0]["parts"] == [f"layers.{n}.weight" for n in (2, 3, 4)]
    assert not decided.problems
    assert not planned(tmp_path, 5).unused


def test_unused_layers_are_an_error_where_that_is_asked_for(tmp_path):
    [problem] = planned(tmp_path, 4, on_unused="error").problems
    assert problem.kind == "unused" and "of which layers.4.weight no parameter" in problem.message


def test_layers_that_a_prefix_skips_are_left_behind_knowingly(tmp_path):
    decided = planned(tmp_path, 5, ("layers.1", "layers.3"), on_unused="error")
    assert not decided.unused and not decided.problems


CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
AS_ASKED = "init.on_conflict=recipe"
KINDS = 6  # two norms, qkv, proj, fc1, fc2


@pytest.fixture(scope="module")
def nemo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder / "hf")
    bioinit.convert(folder / "hf", folder / "nemo2", "nemo2")
    return folder / "nemo2"


def test_a_conversion_does_not_lose_layers_of_a_stack(nemo, tmp_path):
    with pytest.raises(PlanError, match=r"no place for a part of it: decoder\.layers\.\{1\.\.2\}"):
        bioinit.convert(nemo, tmp_path / "hf", set={"num_layers": 1})
    assert not (tmp_path / "hf").exists()


def test_neither_does_one_whose_source_says_fewer_of_itself(nemo, tmp_path):
    own = shutil.copytree(nemo, tmp_path / "own")
    path = own / "context" / "io.json"
    said = path.read_text()
    was = 'Attr(name=\'num_layers\')", {"type": "leaf", "value": 3'
    assert was in said
    path.write_text(said.replace(was, was[:-1] + "1"))
    with pytest.raises(PlanError, match="no place") as error:
        bioinit.convert(own, tmp_path / "hf")
    assert len(error.value.problems) == KINDS


def test_a_start_reports_them_and_chosen_layers_are_no_surprise(nemo):
    at = f"model.initial_ckpt_path={nemo}"
    decided = bioinit.plan(bioinit.compose("llama/causal_lm", [at, "model.num_layers=1", AS_ASKED]))
    assert len(decided.unused) == KINDS and all(tensor.parts for tensor in decided.unused)
    assert "0 stored but unused, 6 in part" in decided.render()
    chosen = bioinit.plan(bioinit.compose("llama/causal_lm", [at, "init.layers=[2,0]"]))
    assert not chosen.unused and not chosen.problems


def test_experts_that_the_model_lacks_are_named(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "hf")
    bioinit.convert(tmp_path / "hf", tmp_path / "nemo2", "nemo2")
    with pytest.raises(PlanError) as error:
        bioinit.convert(tmp_path / "nemo2", tmp_path / "less", set={"num_moe_experts": 2})
    told = json.dumps([problem.message for problem in error.value.problems])
    assert "mlp.experts.{2..3}." in told
