"""What a family of decoders declares for the worlds of Megatron, and what it cannot declare."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, EsmConfig, EsmForMaskedLM

import bioinit
from bioinit.backends.transformers.named import Translation
from bioinit.errors import ConfigError, PlanError
from bioinit.families import llama
from bioinit.families._fields import Joint, Only
from bioinit.families._joints import joints
from bioinit.families._named import named_family
from bioinit.families.esm2 import Esm2Config
from bioinit.families.llama import LlamaConfig

HOW = {"gated": True, "normalization": "RMSNorm", "is_zero_centered": False, "scales": False}


def of_biases(which: str) -> Joint:
    return next(j for j in joints("nemo2", has_biases=which, **HOW) if "add_qkv_bias" in j.theirs)


def test_a_family_may_have_a_bias_on_queries_keys_and_values_alone():
    joint = of_biases("qkv")
    assert joint.ours == ("add_qkv_bias",)
    said = joint.write({"add_qkv_bias": True})
    assert said == {"add_bias_linear": False, "add_qkv_bias": True}
    assert joint.read(said) == {"add_qkv_bias": True}
    with pytest.raises(ValueError, match="only queries, keys and values"):
        joint.read({"add_bias_linear": True, "add_qkv_bias": False})
    with pytest.raises(ValueError, match="no other layer"):
        of_biases("all").read({"add_bias_linear": False, "add_qkv_bias": True})
    with pytest.raises(ValueError, match="have no biases"):
        of_biases("none").read({"add_bias_linear": True, "add_qkv_bias": False})


def declared():
    return next(g for g in vars(llama).values() if type(g).__name__ == "Gpt")


def test_a_joint_of_a_family_takes_the_place_of_the_common_one():
    own = Joint(("add_bias_linear",), (), lambda said: {}, lambda ours: {"add_bias_linear": False})
    world = dataclasses.replace(declared(), joint={"nemo2": (own,)}).world("nemo2")
    assert [joint for joint in world.joint if "add_bias_linear" in joint.theirs] == [own]


def test_what_a_joint_reads_cannot_have_one_meaning_alone():
    wrong = dataclasses.replace(
        declared(), only={"nemo2": {"add_qkv_bias": Only((False,), "there is none")}}
    )
    with pytest.raises(ConfigError, match=r"add_qkv_bias of nemo2 .*joint"):
        wrong.world("nemo2")


def test_a_translation_names_fields_that_there_are():
    wrong = Translation("llama", {"vocab_size": "size_of_words"})
    with pytest.raises(ConfigError, match=r"size_of_words.*LlamaConfig has no such field"):
        named_family(LlamaConfig, wrong, {}, lambda config: {})


def test_an_activation_without_a_word_is_refused_with_those_that_have_one():
    with pytest.raises(ConfigError, match=r"gelu_new.*it has silu, gelu,"):
        llama.FAMILY.dialects["nemo2"].write(LlamaConfig(activation_func="gelu_new"), {}, ())


@pytest.mark.parametrize("name", ["num_layers", "kv_channels", "make_vocab_size_divisible_by"])
@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("cls", [LlamaConfig, Esm2Config])
def test_a_size_of_nothing_is_refused_by_name(cls, name, value):
    if any(field.name == name for field in dataclasses.fields(cls)):
        with pytest.raises(ConfigError, match=rf"{name} is {value}"):
            cls(**{name: value})


def test_norms_are_shifted_where_they_are_read_and_not_where_they_are_written():
    from bioinit.families.gemma import FAMILY, GemmaConfig

    config = GemmaConfig(layernorm_zero_centered_gamma=False)

    def added(shapes: dict) -> set[float]:
        rules = FAMILY.dialects["nemo2"].rules(config, shapes, "")
        return {part.add for rule in rules for part in rule.parts}

    assert added({}) == {0.0}
    assert added({"decoder.final_layernorm.weight": (4,)}) == {0.0, -1.0}


def test_a_trained_head_is_left_behind_only_by_whoever_says_so(tmp_path):
    config = EsmConfig(
        vocab_size=33, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, position_embedding_type="rotary",
        token_dropout=True, mask_token_id=32, pad_token_id=1,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(tmp_path / "hf")
    bioinit.convert(tmp_path / "hf", tmp_path / "nemo2", "nemo2", format="safetensors")
    path = next((tmp_path / "nemo2").rglob("*.safetensors"))
    state = load_file(path)
    front = "module." if any(name.startswith("module.") for name in state) else ""
    head = f"{front}classification_head.dense.weight"
    save_file({**state, head: torch.ones(2, 16)}, path, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"would be lost.*--drop .*classification_head"):
        bioinit.convert(tmp_path / "nemo2", tmp_path / "lost")
    drop = head.rpartition(".")[0]
    bioinit.convert(tmp_path / "nemo2", tmp_path / "asked", drop=[drop])
    assert AutoConfig.from_pretrained(tmp_path / "asked").hidden_size == 16
    at = f"model.initial_ckpt_path={tmp_path / 'nemo2'}"
    decided = bioinit.plan(bioinit.compose("esm2/masked_lm", [at]))
    assert not decided.problems and "classification_head" in decided.render()
    assert not any("lacks: extra" in note for note in decided.notes)
