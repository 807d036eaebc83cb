"""Decoders of megatron-core beside those of transformers, and what their worlds say differently."""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import bioinit  # noqa: E402
from bioinit import families  # noqa: E402
from bioinit.contexts._aliases import canonical  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402
from bioinit.layout import Box  # noqa: E402
from bioinit.mapping import Mapping  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402

NEMO2 = "nemo.collections.llm.gpt.model"
ROWS = {"embedding.word_embeddings.weight": (48, 32)}
GEMMA = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "encoder_seq_length": 64,
    "activation": "geglu",
    "openai_gelu": True,
    "normalization": "rmsnorm",
    "apply_embedding_scaling": True,
    "bias": False,
    "position_embedding_type": "rope",
}
GEMMA2 = GEMMA | {
    "name": "megatron_gemma2",
    "layernorm_zero_centered_gamma": True,
    "window_size": [7, 0],
    "mcore_customization_config": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 20,
    },
}
NEMOTRON = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "encoder_seq_length": 64,
    "activation": "squared-relu",
    "normalization": "layernorm1p",
    "bias": False,
    "position_embedding_type": "rope",
    "rotary_percentage": 0.5,
    "share_embeddings_and_output_weights": False,
}
NORMS = (
    "decoder.final_layernorm.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
)


def tiny(name: str) -> dict[str, dict]:
    path = Path(__file__).parent / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tiny_configs()


def described(name: str, saved: Context, shapes=ROWS):
    family = families.load(name)
    read = family.read_fields(saved, shapes)
    result = merge(make_record(family.config, {}, {}, at="model"), read.fields, {})
    assert not result.problems, [str(problem) for problem in result.problems]
    return build(result.record, at="model")


def nemo2(data: dict, name: str) -> Context:
    name = f"{NEMO2}.{name}"
    return Context("nemo2", "io.json", data, name, raw={"canonical": canonical(name)})


def added(name: str, config, shapes) -> set[float]:
    """What is added to the stored weights of norms on the way in."""
    table = Mapping(families.load(name).dialects["nemo1"].rules(config, shapes, ""))
    return {
        placed.add
        for key, shape in shapes.items()
        for placed in table.place(key, (Box.contiguous(shape),))
        if key in NORMS
    }


LIVE = [
    (name, which)
    for name in ("llama", "mistral", "gemma", "nemotron")
    for which in tiny(name)
    if (name, which) != ("gemma", "biased")
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")
@pytest.mark.parametrize(("name", "which"), LIVE)
def test_megatron_computes_what_transformers_computes(name, which, tmp_path):
    pytest.importorskip("megatron.core")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**tiny(name)[which])
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    words = [f"model.initial_ckpt_path={tmp_path}", "model.backend=megatron"]
    live = bioinit.initialize(bioinit.compose(f"{name}/causal_lm", words)).model.eval()
    ids = torch.randint(3, config.vocab_size, (2, 13))
    with torch.no_grad():
        logits = live(ids, torch.arange(13)[None].expand_as(ids), None)
        expected = model(ids).logits
    assert type(live).__module__.startswith("megatron.core")
    assert (logits[..., : config.vocab_size] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "fields", "what"),
    [
        ("gemma", {"add_attention_bias": True}, "add_attention_bias"),
        ("gemma2", {}, "scores within bounds"),
        ("llama", {"add_attention_bias": True}, "add_mlp_bias=False"),
        ("llama", {"rope_type": "yarn", "scale_factor": 2.0}, "rope_type='yarn'"),
        ("mistral", {"architecture": "sequence_classification", "num_labels": 2}, "architecture"),
    ],
)
def test_what_megatron_cannot_build_is_refused_by_name(name, fields, what):
    family = families.load(name)
    config = family.config(num_layers=1, backend="megatron", **fields)
    with pytest.raises(ConfigError, match=what):
        family.build(config)


def test_norms_of_gemma_from_nemo_1_are_stored_around_one_and_the_rule_says_so():
    saved = Context("nemo1", "model_config.yaml", GEMMA, None)
    assert families.find(saved, ROWS) == "gemma"
    config = described("gemma", saved)
    assert not config.layernorm_zero_centered_gamma
    shapes = {NORMS[0]: (32,), NORMS[1]: (2, 32)}
    assert added("gemma", config, shapes) == {-1.0}
    table = Mapping(families.load("gemma").dialects["nemo1"].rules(config, shapes, ""))
    assert "-1)" in table.rule_for(NORMS[0]).text


def test_norms_that_are_written_are_always_around_zero():
    config = families.load("gemma").config(num_layers=1, layernorm_zero_centered_gamma=False)
    dialect = families.load("gemma").dialects["nemo2"]
    assert all(not part.add for rule in dialect.rules(config, {}, "") for part in rule.parts)
    shown = dialect.write(config, {}, ()).files["context/model.yaml"].decode()
    assert "layernorm_zero_centered_gamma: true" in shown


def test_norms_of_gemma_2_from_nemo_1_say_that_they_are_around_zero():
    saved = Context("nemo1", "model_config.yaml", GEMMA2, None)
    assert families.find(saved, ROWS) == "gemma2"
    config = described("gemma2", saved)
    assert config.layernorm_zero_centered_gamma and config.window_size == 7
    assert (config.query_pre_attn_scalar, config.attn_logit_softcapping) == (20, 50.0)
    assert added("gemma2", config, {NORMS[0]: (32,)}) == {0.0}


@pytest.mark.parametrize(("kind", "shift"), [("layernorm1p", 0.0), ("layernorm", -1.0)])
def test_a_layer_norm_with_one_added_is_another_word_for_around_zero(kind, shift):
    saved = Context("nemo1", "model_config.yaml", NEMOTRON | {"normalization": kind}, None)
    assert families.find(saved, ROWS) == "nemotron"
    config = described("nemotron", saved)
    assert config.rotary_percent == 0.5 and config.activation_func == "relu2"
    assert added("nemotron", config, {NORMS[0]: (32,)}) == {shift}


def test_a_window_is_no_length_of_sequences():
    data = {"seq_length": 99, "window_size": [5, 0]}
    config = described("mistral", nemo2(data, "mistral.MistralConfig7B"))
    assert (config.seq_length, config.window_size) == (99, 5)
    config = described("mistral", nemo2({"window_size": None}, "mistral.MistralConfig7B"))
    assert (config.seq_length, config.window_size) == (32768, None)
    assert described("mistral", nemo2({}, "mistral.MistralConfig7B")).window_size == 4096


def test_a_window_in_a_class_without_one_is_refused():
    with pytest.raises(ConfigError, match=r"window_size=\[5, 0\]"):
        families.load("llama").read_fields(
            nemo2({"window_size": [5, 0]}, "llama.Llama2Config7B"), ROWS
        )


@pytest.mark.parametrize(
    ("family", "name", "layers", "hidden"),
    [
        ("gemma", "gemma.CodeGemmaConfig2B", 18, 2048),
        ("gemma2", "gemma2.Gemma2Config27B", 46, 4608),
        ("nemotron", "nemotron.Nemotron4Config340B", 96, 18432),
        ("mistral", "mistral.MistralNeMo2407Config12B", 40, 5120),
    ],
)
def test_presets_are_known_by_their_class(family, name, layers, hidden):
    saved = nemo2({}, name)
    assert families.find(saved, ROWS) == family
    config = described(family, saved)
    assert (config.num_layers, config.hidden_size) == (layers, hidden)


def test_layers_of_gemma_2_that_do_not_alternate_are_refused_by_nemo_2():
    extra = {"layer_types": ("full_attention",)}
    config = families.load("gemma2").config(num_layers=1, extra=extra)
    with pytest.raises(ConfigError, match=r"layer_types.*nemo2 cannot express"):
        families.load("gemma2").dialects["nemo2"].write(config, {}, ())


def test_what_only_the_extra_fields_say_is_refused_by_nemo_2_too():
    extra = {"use_bidirectional_attention": True}
    config = families.load("gemma").config(num_layers=1, extra=extra)
    with pytest.raises(ConfigError, match=r"use_bidirectional_attention is True, which nemo2"):
        families.load("gemma").dialects["nemo2"].write(config, {}, ())


def test_an_older_order_of_rows_is_refused():
    saved = Context("megatron", "args", {}, None, tree={"checkpoint_version": 1.0})
    with pytest.raises(ConfigError, match=r"checkpoint_version=1\.0"):
        families.load("llama").dialects["megatron"].read(saved, ROWS)
