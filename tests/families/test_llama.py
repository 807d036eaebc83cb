"""Llama under the field's names."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import bioinit
from bioinit import families
from bioinit.contexts._aliases import canonical
from bioinit.contexts.protocol import Context
from bioinit.errors import ConfigError
from bioinit.families.llama import CLASSES, FAMILY, LlamaConfig
from bioinit.layout import Box
from bioinit.mapping import Mapping
from bioinit.merge import merge
from bioinit.record import build, make_record
from bioinit.storage import Folder

NEMO_1 = FAMILY.dialects["nemo1"]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.01,
    "attention_dropout": 0.1,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
LLAMA31 = LLAMA | {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 16,
    },
}
BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"llama2": LLAMA, "llama32": LLAMA31, "biased": BIASED}


NEMO2 = "nemo.collections.llm.gpt.model"
NEMO1 = {
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "encoder_seq_length": 64,
    "max_position_embeddings": 64,
    "activation": "fast-swiglu",
    "normalization": "rmsnorm",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_base": 50000.0,
    "share_embeddings_and_output_weights": False,
    "attention_dropout": 0.1,
    "tokenizer": {"library": "sentencepiece"},
}
ARGUMENTS = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": 16,
    "max_position_embeddings": 64,
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "norm_epsilon": 1e-6,
    "vocab_size": 48,
    "lr": 0.1,
}
ROWS = {"embedding.word_embeddings.weight": (48, 32)}


def context(dialect: str, data: dict, model: str | None = None) -> Context:
    raw = None if model is None else {"canonical": canonical(model)}
    return Context(dialect, "saved", data, model, raw=raw)


def settled(saved: Context, shapes=ROWS, **written) -> LlamaConfig:
    read = FAMILY.read_fields(saved, shapes)
    result = merge(make_record(LlamaConfig, written, {}, at="model"), read.fields, {})
    assert not result.problems, [str(problem) for problem in result.problems]
    return build(result.record, at="model")


def fields(config: LlamaConfig, *names: str) -> list:
    return [getattr(config, name) for name in names]


SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "seq_length")
ROPE = ("rope_type", "scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")


def test_a_preset_that_says_nothing_is_known_by_its_class():
    config = settled(context("nemo2", {}, f"{NEMO2}.llama.Llama32Config3B"))
    assert fields(config, *SIZES) == [28, 3072, 8192, 8, 4096]
    assert fields(config, *ROPE) == ["llama3", 32, 1, 4, 8192]
    assert config.share_embeddings_and_output_weights and config.rotary_base == 500000


def test_a_class_that_nobody_knows_must_say_its_sizes():
    saved = context("nemo2", {"num_layers": 2}, f"{NEMO2}.llama.Llama9Config1B")
    assert FAMILY.recognizes(saved)
    with pytest.raises(ConfigError, match=r"does not say hidden_size, and .*Llama9Config1B is no"):
        FAMILY.read_fields(saved, ROWS)


def test_bridge_scales_positions_by_a_switch():
    name = "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B"
    config = settled(context("bridge", {"rope_scaling_factor": 4.0}, name))
    assert fields(config, *ROPE) == ["llama3", 4.0, 1, 4, 8192]
    assert config.seq_length == 131072


def test_one_class_for_all_is_told_apart_by_its_parts():
    plain = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "normalization": "RMSNorm",
        "activation_func": "torch.nn.functional.silu",
        "gated_linear_unit": True,
        "position_embedding_type": "rope",
        "add_bias_linear": False,
    }
    name = "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert families.find(context("bridge", plain, name), ROWS) == "llama"
    assert families.find(context("bridge", plain | {"window_size": [8, 0]}, name), ()) == "mistral"
    relu = {"activation_func": "megatron.core.activations.squared_relu"}
    other = plain | relu | {"normalization": "LayerNorm", "gated_linear_unit": False}
    assert families.find(context("bridge", other, name), ()) == "nemotron"


def test_a_config_of_nemo_1_is_read_whole():
    saved = context("nemo1", NEMO1)
    assert families.find(saved, ROWS) == "llama"
    config = settled(saved)
    assert fields(config, *SIZES) == [2, 32, 24, 2, 64]
    assert (config.rotary_base, config.attention_dropout) == (50000.0, 0.1)
    assert config.vocab_size == 48
    scaled = settled(context("nemo1", NEMO1 | {"scale_positional_embedding": True}))
    assert fields(scaled, *ROPE) == ["llama3", 8, 1, 4, 8192]
    stretched = settled(context("nemo1", NEMO1 | {"seq_len_interpolation_factor": 4}))
    assert fields(stretched, *ROPE)[:2] == ["linear", 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer_block_type", "normformer"),
        ("rotary_percentage", 0.5),
        ("megatron_legacy", True),
        ("headscale", True),
        ("num_moe_experts", 8),
    ],
)
def test_what_makes_it_another_model_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        NEMO_1.read(context("nemo1", NEMO1 | {name: value}), ROWS)


def test_arguments_of_a_run_are_read():
    saved = context("megatron", ARGUMENTS)
    assert families.find(saved, ROWS) == "llama"
    config = settled(saved)
    assert fields(config, *SIZES) == [2, 32, 24, 2, 64]
    assert config.layernorm_epsilon == 1e-6 and not config.share_embeddings_and_output_weights
    alone = settled(context("megatron", ARGUMENTS | {"group_query_attention": False}))
    assert alone.num_query_groups == 4


def test_a_vocabulary_that_nobody_says_is_what_is_stored_and_the_account_says_so():
    data = {k: v for k, v in ARGUMENTS.items() if k != "vocab_size"}
    read = FAMILY.read_fields(
        context("megatron", data), {"module.embedding.word_embeddings.weight": (64, 32)}
    )
    assert read.fields["vocab_size"].value == 64
    [said] = [entry.note for entry in read.account if entry.name == "vocab_size"]
    assert "rows of the stored embedding, padding included" in said


def test_a_tokenizer_says_the_vocabulary(tmp_path):
    tree = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 41, "content": "c"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    file = Folder.at(tmp_path).file("tokenizer.json")
    data = {k: v for k, v in ARGUMENTS.items() if k != "vocab_size"}
    saved = Context("megatron", "saved", data, None, carried={"tokenizer.json": file})
    assert settled(saved).vocab_size == 42


def test_every_field_of_nemo_2_has_a_fate_and_a_reason(fixtures_dir):
    with bioinit.open_checkpoint(fixtures_dir / "nemo2" / "llama_tp1") as checkpoint:
        saved = checkpoint.context
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
        account = FAMILY.read_fields(saved, shapes).account
    assert {entry.name for entry in account} >= set(saved.data) and len(saved.data) > 200
    assert [e.name for e in account if e.fate in ("carried", "unknown")] == ["hidden_dropout"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")
@pytest.mark.parametrize("source", ["nemo2/llama_tp1", "hf/llama/safetensors"])
@pytest.mark.parametrize("backend", ["transformers", "megatron"])
def test_the_logits_are_those_of_whoever_wrote_it(fixtures_dir, source, backend):
    if backend == "megatron":
        pytest.importorskip("megatron.core")
    torch.set_num_threads(1)
    seen = np.load(fixtures_dir / "hf" / "llama" / "io.npz")
    ids, mask = torch.tensor(seen["input_ids"]), torch.tensor(seen["attention_mask"])
    words = [f"model.initial_ckpt_path={fixtures_dir / source}", f"model.backend={backend}"]
    model = bioinit.initialize(bioinit.compose("llama/causal_lm", words)).model.eval()
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with torch.no_grad():
        if backend == "megatron":
            logits = model(ids, positions, None)
        else:
            logits = model(ids, attention_mask=mask).logits
    at = mask.bool()  # padding is to the right, so what stands before it does not see it
    assert (logits[at] - torch.tensor(seen["logits"])[at]).abs().max() < 1e-5


def test_another_scaling_of_positions_is_refused_by_nemo_2_and_kept_by_transformers():
    config = LlamaConfig(rope_type="yarn", scale_factor=4.0, num_layers=1)
    with pytest.raises(ConfigError, match=r"rope_type='yarn'.*nemo2 cannot express"):
        FAMILY.dialects["nemo2"].write(config, {}, ())
    said = json.loads(FAMILY.dialects["hf"].write(config, {}, ()).files["config.json"])
    assert said["rope_parameters"]["rope_type"] == "yarn"


def test_a_bias_in_attention_alone_is_refused_by_nemo_2():
    with pytest.raises(ConfigError, match="add_attention_bias=True, add_mlp_bias=False"):
        FAMILY.dialects["nemo2"].write(LlamaConfig(add_attention_bias=True), {}, ())
    qwen = {**CLASSES["Llama2Config7B"], "add_qkv_bias": True}
    with pytest.raises(ConfigError, match="add_qkv_bias=True"):
        FAMILY.read_fields(context("nemo2", qwen, f"{NEMO2}.llama.LlamaConfig"), ROWS)


def test_llama_31_is_written_as_the_class_that_has_its_scaling():
    scaling = {"scale_factor": 16.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
    config = LlamaConfig(rope_type="llama3", **scaling, old_context_len=100)
    written = FAMILY.dialects["nemo2"].write(config, {}, ()).files["context/model.yaml"].decode()
    assert "llama.Llama31Config" in written
    for line in ("scale_factor: 16.0", "low_freq_factor: 2.0", "old_context_len: 100"):
        assert line in written
    assert "llama.LlamaConfig" in (
        FAMILY.dialects["nemo2"].write(LlamaConfig(), {}, ()).files["context/model.yaml"].decode()
    )


@pytest.mark.parametrize("apart", [True, False])
def test_names_from_before_megatron_core_hold_the_same_tensors(apart):
    config = settled(context("nemo1", NEMO1))
    top = "language_model.encoder.layers.1"
    shapes = {f"{top}.mlp.dense_h_to_4h.weight": (24 if apart else 48, 32)}
    shapes |= {f"{top}.mlp.dense_h_to_4h_2.weight": (24, 32)} if apart else {}
    shapes |= {
        f"{top}.self_attention.query_key_value.weight": (64, 32),
        f"{top}.post_attention_layernorm.weight": (32,),
    }
    assert NEMO_1.spells(shapes)
    table = Mapping(NEMO_1.rules(config, shapes, ""))
    found = {
        placed.key
        for key, shape in shapes.items()
        for placed in table.place(key, (Box.contiguous(shape),))
    }
    at = "decoder.layers.1"
    assert found == {
        f"{at}.pre_mlp_layernorm.weight",
        f"{at}.mlp.linear_fc1_gate.weight",
        f"{at}.mlp.linear_fc1_up.weight",
        *(f"{at}.self_attention.linear_{name}.weight" for name in "qkv"),
    }
