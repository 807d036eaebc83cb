"""Loading into a module that exists, from a checkpoint whose names another world spells."""

import pytest
import torch
import transformers

import bioinit
from bioinit.errors import PlanError


@pytest.fixture(scope="module")
def pair(fixtures_dir):
    """The same Llama as transformers and as NeMo 2 stored it."""
    return fixtures_dir / "hf/llama/safetensors", fixtures_dir / "nemo2/llama_tp1"


def test_a_transformers_model_takes_what_nemo_stored(pair):
    hf, nemo = pair
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(hf))
    report = bioinit.load_weights(module, nemo)
    expected = transformers.LlamaForCausalLM.from_pretrained(hf).state_dict()
    assert {
        key for key in expected if not torch.equal(module.state_dict()[key], expected[key])
    } == set()
    assert not report.unused


def test_a_body_without_its_head_leaves_the_head_unused(pair):
    hf, nemo = pair
    with torch.device("meta"):
        module = transformers.LlamaModel(transformers.AutoConfig.from_pretrained(hf))
    report = bioinit.load_weights(module, nemo)
    assert [tensor.key for tensor in report.unused] == ["module.output_layer.weight"]
    expected = transformers.LlamaModel.from_pretrained(hf).state_dict()
    assert all(torch.equal(module.state_dict()[key], expected[key]) for key in expected)


def test_a_model_of_other_sizes_is_refused_before_it_is_touched(pair):
    hf, nemo = pair
    config = transformers.AutoConfig.from_pretrained(hf, num_hidden_layers=3)
    module = transformers.LlamaForCausalLM(config)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(PlanError, match=r"model\.layers\.2"):
        bioinit.load_weights(module, nemo)
    assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)
