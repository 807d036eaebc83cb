"""What is carried along beside a saved config never speaks over the saved config itself."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers")

import torch
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import bioinit
from bioinit.errors import ConfigError

SIDECAR = "context/bioinit.json"
SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 32.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 16,
}
SCALING = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")


def carried(folder: Path) -> dict:
    return json.loads((folder / SIDECAR).read_text())["carried"]


@pytest.fixture
def nemo(tmp_path) -> Path:
    torch.manual_seed(0)
    Llama(LlamaConfig(**SIZES, rope_parameters=LLAMA31)).save_pretrained(tmp_path / "hf")
    bioinit.convert(tmp_path / "hf", tmp_path / "nemo2", "nemo2")
    return tmp_path / "nemo2"


def without_scaling(folder: Path) -> None:
    """Edit NeMo's own files as a person would who wants plain positions."""
    path = folder / "context" / "io.json"
    document = json.loads(path.read_text().replace("Llama31Config", "LlamaConfig"))
    for held in document["objects"].values():
        items = held.get("items", ())
        held["items"] = [i for i in items if not any(f"'{name}'" in i[0] for name in SCALING)]
    path.write_text(json.dumps(document))
    path = folder / "context" / "model.yaml"
    tree = yaml.safe_load(path.read_text().replace("Llama31Config", "LlamaConfig"))
    for name in SCALING:
        tree["config"].pop(name, None)
    path.write_text(yaml.safe_dump(tree))


def rope_type(folder: Path) -> str:
    return AutoConfig.from_pretrained(folder).rope_parameters["rope_type"]


def test_what_the_saved_config_says_is_not_carried_beside_it(nemo):
    assert not {"rope_type", *SCALING, "add_mlp_bias"} & carried(nemo).get("bioinit", {}).keys()


def test_a_saved_config_that_was_edited_counts(nemo, tmp_path):
    bioinit.convert(nemo, tmp_path / "as_it_was")
    assert rope_type(tmp_path / "as_it_was") == "llama3"
    without_scaling(nemo)
    bioinit.convert(nemo, tmp_path / "plain")
    assert rope_type(tmp_path / "plain") == "default"


def test_a_sidecar_cannot_make_another_model_of_it(nemo, tmp_path):
    without_scaling(nemo)
    said = carried(nemo)
    said["bioinit"] = {"rope_type": "linear", "scale_factor": 4.0}
    (nemo / SIDECAR).write_text(json.dumps({"carried": said}))
    bioinit.convert(nemo, tmp_path / "plain")
    assert rope_type(tmp_path / "plain") == "default"


@pytest.mark.parametrize("name", ["auto_map", "quantization_config"])
def test_nothing_that_runs_code_is_smuggled_into_a_config(nemo, tmp_path, name):
    said = carried(nemo)
    said.setdefault("hf", {})[name] = {"AutoConfig": "evil.Config"}
    (nemo / SIDECAR).write_text(json.dumps({"carried": said}))
    with pytest.raises(ConfigError, match=name):
        bioinit.convert(nemo, tmp_path / "hf2")
    with pytest.raises(ConfigError, match=name):
        bioinit.convert(tmp_path / "hf", tmp_path / "hf3", set={"extra": {name: {}}})


def test_the_divisor_of_the_vocabulary_comes_back_through_hf(tmp_path):
    Llama(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "hf")
    asked = {"make_vocab_size_divisible_by": 64}
    bioinit.convert(tmp_path / "hf", tmp_path / "one", "nemo2", set=asked)
    bioinit.convert(tmp_path / "one", tmp_path / "two", "hf")
    bioinit.convert(tmp_path / "two", tmp_path / "three", "nemo2")
    [rows] = (t["shape"][0] for t in _claims(tmp_path / "three") if "word_embeddings" in t["key"])
    assert rows == 128
    assert "ffn_hidden_size" not in carried(tmp_path / "two")["bioinit"]


def _claims(folder: Path) -> list:
    return json.loads(next(folder.glob("*receipt*.json")).read_text())["tensors"]


@pytest.mark.parametrize("word", ["gelu_new", "gelu_fast"])
def test_a_word_of_which_neox_says_less_comes_back(tmp_path, word):
    config = GPTNeoXConfig(**SIZES, hidden_act=word)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "hf")
    bioinit.convert(tmp_path / "hf", tmp_path / "neox", "neox")
    bioinit.convert(tmp_path / "neox", tmp_path / "back")
    assert AutoConfig.from_pretrained(tmp_path / "back").hidden_act == word
    (tmp_path / "neox" / SIDECAR).unlink()
    done = bioinit.convert(tmp_path / "neox", tmp_path / "without", set={"vocab_size": 100})
    assert AutoConfig.from_pretrained(tmp_path / "without").hidden_act == "gelu_fast"
    [note] = [f.note for f in done.account if f.name == "bias_gelu_fusion"]
    assert "gelu_new" in note
