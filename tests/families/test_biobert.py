"""Megatron's BERT: in BioNeMo and NeMo, and at home in transformers."""

import hashlib
import json

import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")

import bioinit  # noqa: E402
from bioinit import families  # noqa: E402
from bioinit.contexts import find  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402
from bioinit.families.biobert import FAMILY, BioBertConfig  # noqa: E402
from bioinit.mapping import Mapping as Table  # noqa: E402
from bioinit.mapping import Names  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402
from bioinit.storage import Folder  # noqa: E402
from tests.simulate import execute  # noqa: E402

# Megatron asks for process groups as it did before, and says that it will not any more.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

BIOBERT = {
    "architectures": ["MegatronBertForMaskedLM"],
    "model_type": "megatron-bert",
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 1,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.02,
    "attention_probs_dropout_prob": 0.3,
    "initializer_range": 0.015,
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "transformers_version": "4.30.0",
}
PAIRS = BIOBERT | {"type_vocab_size": 2, "architectures": ["MegatronBertForPreTraining"]}
GENEFORMER = "bionemo.geneformer.api.GeneformerConfig"


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"biobert": BIOBERT, "pairs": PAIRS}


def context(data: dict) -> Context:
    return Context("hf", "config.json", data, data.get("model_type"))


def settled(read, **written) -> BioBertConfig:
    result = merge(make_record(BioBertConfig, written, {}, at="model"), read.fields, {})
    assert not result.problems, [str(p) for p in result.problems]
    return build(result.record, at="model")


def config_of(data: dict, **written) -> BioBertConfig:
    return settled(FAMILY.read_fields(context(data)), **written)


def nemo2(cls: str = GENEFORMER, **fields) -> Context:
    small = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4}
    return Context("nemo2", "io.json", small | fields, cls, raw={"canonical": cls})


def nemo1(**fields) -> Context:
    small = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4}
    given = small | {"max_position_embeddings": 20, "bert_binary_head": False} | fields
    return Context("nemo1", "model_config.yaml", given, "pkg.MegatronBertModel")


SHAPES = {"module.embedding.word_embeddings.weight": (40, 16)}


def test_one_token_type_is_none():
    assert config_of(BIOBERT).num_tokentypes == 0 and config_of(PAIRS).num_tokentypes == 2
    assert FAMILY.build(config_of(BIOBERT)).config.type_vocab_size == 1


def test_the_classes_of_bionemo_have_their_own_defaults():
    fields = FAMILY.read_fields(nemo2(), SHAPES).fields
    assert fields["layernorm_epsilon"] == (1e-12, False, "the class that io.json names: "
                                           "layernorm_epsilon")  # fmt: skip
    assert fields["seq_length"].value == 2048 and fields["hidden_dropout"].value == 0.02
    general = FAMILY.read_fields(nemo2("bionemo.llm.model.biobert.model.BioBertConfig"), SHAPES)
    assert general.fields["seq_length"].value == 1024
    assert general.fields["share_embeddings_and_output_weights"].value is False


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("position_embedding_type", "rope", "learns its positions"),
        ("qk_layernorm", True, "have no norm"),
        ("gated_linear_unit", True, "no gate"),
        ("normalization", "RMSNorm", "layer norms"),
        ("add_bias_linear", False, "have biases"),
        ("num_query_groups", 2, "its own keys and values"),
        ("window_size", [8, 0], "sees every other"),
        ("layernorm_zero_centered_gamma", True, "stored as they are"),
        ("apply_residual_connection_post_layernorm", True, "before the norm"),
    ],
)
def test_what_makes_another_model_is_refused(field, value, why):
    with pytest.raises(ConfigError, match=f"{field}.*{why}"):
        FAMILY.read_fields(nemo2(**{field: value}), SHAPES)


def test_an_activation_goes_both_ways_and_the_head_of_megatron_keeps_gelu():
    read = FAMILY.read_fields(nemo2(activation_func="torch.nn.functional.relu"), SHAPES)
    config = settled(read, architecture="token_classification", num_labels=2)
    assert config.activation == "relu" and config.lm_head_activation == "gelu"
    assert FAMILY.build(config).config.hidden_act == "relu"
    with pytest.raises(ConfigError, match="head for masked tokens has the activation"):
        FAMILY.build(settled(read))
    with pytest.raises(ConfigError, match="head for masked tokens has gelu there"):
        FAMILY.dialects["nemo2"].write(config_of(BIOBERT | {"hidden_act": "relu"}), {}, ())


def test_nemo_2_gets_the_class_that_has_what_the_model_has(tmp_path):
    write = FAMILY.dialects["nemo2"].write
    plain = yaml.safe_load(write(config_of(BIOBERT), {}, ()).files["context/model.yaml"])
    assert plain["config"]["_target_"] == GENEFORMER
    assert "num_tokentypes" not in plain["config"]
    pairs = yaml.safe_load(write(config_of(PAIRS), {}, ()).files["context/model.yaml"])
    assert pairs["config"]["_target_"].endswith("bert.model.bert.MegatronBertConfig")
    assert pairs["config"]["num_tokentypes"] == 2 and pairs["config"]["bert_type"] == "megatron"


@pytest.mark.parametrize("data", [BIOBERT, PAIRS], ids=["plain", "pairs"])
def test_what_is_written_for_nemo_2_is_read_back(data, tmp_path):
    config = config_of(data)
    for name, content in FAMILY.dialects["nemo2"].write(config, {}, ()).files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    saved = find((Folder.at(tmp_path),))
    shapes = {"module.embedding.word_embeddings.weight": (config.vocab_size, 16)}
    assert FAMILY.recognizes(saved) and families.find(saved, ()) == "biobert"
    again = FAMILY.read_fields(saved, shapes)
    assert {f.name: f.note for f in again.account if f.fate == "carried"} == {}
    back = settled(again)
    for name in ("num_layers", "ffn_hidden_size", "layernorm_epsilon", "attention_dropout"):
        assert getattr(back, name) == getattr(config, name), name
    assert back.num_tokentypes == config.num_tokentypes and back.vocab_size == config.vocab_size


def test_nemo_1_has_token_types_where_it_has_a_head_for_pairs():
    config = settled(FAMILY.read_fields(nemo1(bert_binary_head=True), SHAPES))
    assert config.num_tokentypes == 2 and config.add_binary_head
    assert settled(FAMILY.read_fields(nemo1(), SHAPES)).num_tokentypes == 0


def test_a_post_layer_norm_model_of_nemo_1_is_refused():
    with pytest.raises(ConfigError, match=r"post_ln.*post-layer-norm"):
        FAMILY.read_fields(nemo1(transformer_block_type="post_ln"), SHAPES)


def test_the_vocabulary_is_counted_where_a_list_of_words_lies_beside(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(33)))
    words = {"vocab.txt": Folder.at(tmp_path).file("vocab.txt")}
    said = Context("nemo1", "model_config.yaml", nemo1().data, "MegatronBertModel", carried=words)
    assert FAMILY.read_fields(said, SHAPES).fields["vocab_size"].value == 33
    few = {"model.embedding.word_embeddings.weight": (32, 16)}
    assert FAMILY.read_fields(said, few).fields["vocab_size"].value == 32
    alone = FAMILY.read_fields(nemo1(), SHAPES).fields["vocab_size"]
    assert alone.value == 40 and "rows" in alone.where


@pytest.mark.parametrize("name", ["bert_torch_dist", "bert_legacy_model_weights_ckpt"])
def test_archives_of_nemo_1_give_what_their_model_held(fixtures_dir, name):
    expected = json.loads((fixtures_dir / "nemo1" / "expected.json").read_text())["tensors"]
    with bioinit.open_checkpoint(fixtures_dir / "nemo1" / f"{name}.nemo") as checkpoint:
        assert checkpoint.dialect == "nemo1"
        assert families.find(checkpoint.context, checkpoint.tensors) == "biobert"
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
        config = settled(FAMILY.read_fields(checkpoint.context, shapes))
        weights = [k for k, t in checkpoint.tensors.items() if t.kind == "weight"]
        stored = {k.removeprefix("model."): checkpoint.read(k) for k in weights}
    held = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    table = Table(FAMILY.dialects["nemo1"].rules(config, held, ""))
    core = Table(FAMILY.dialects["megatron"].rules(config, {}, ""))
    like = {key: torch.empty(entry["shape"]) for key, entry in expected.items()}
    found = execute(Names(table, core), stored, like)
    for key, entry in expected.items():
        digest = hashlib.sha256(found[key].contiguous().numpy().tobytes()).hexdigest()
        assert digest == entry["sha256_f32"], key


@pytest.mark.parametrize("name", ["bert_torch_dist", "bert_legacy_model_weights_ckpt"])
def test_archives_of_nemo_1_start_the_same_model_of_transformers(fixtures_dir, name):
    path = fixtures_dir / "nemo1" / f"{name}.nemo"
    started = bioinit.initialize(
        bioinit.compose("biobert/masked_lm", [f"model.initial_ckpt_path={path}"])
    )
    model = started.model
    assert isinstance(model, transformers.MegatronBertForMaskedLM)
    assert not model.bert.embeddings.token_type_embeddings.weight.any()
    claim = next(c for c in started.report.claims if "token_type" in c.key)
    assert claim.claim == "loaded" and claim.rule.startswith("zero")
    with bioinit.open_checkpoint(path) as checkpoint:
        key = next(k for k in checkpoint.tensors if k.endswith("word_embeddings.weight"))
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, checkpoint.read(key))


def test_a_body_across_the_two_kinds_of_bert_is_refused_with_the_reason(tmp_path):
    hf = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        vocab_size=20,
    )  # fmt: skip
    transformers.BertModel(hf).save_pretrained(tmp_path / "bert")
    mega = transformers.MegatronBertConfig(
        **{
            k: v
            for k, v in BIOBERT.items()
            if k in hf.to_dict() and k not in ("model_type", "architectures")
        }
    )
    transformers.MegatronBertModel(mega).save_pretrained(tmp_path / "biobert")
    for recipe, stored in (("biobert", "bert"), ("bert", "biobert")):
        words = [f"model.initial_ckpt_path={tmp_path / stored}"]
        with pytest.raises(ConfigError, match=r"post-layer-norm.*pre-layer-norm") as caught:
            bioinit.plan(bioinit.compose(f"{recipe}/token_classification", words))
        assert f"Use a recipe of the family {stored!r}" in str(caught.value)


def test_names_alone_tell_the_encoders_of_megatron_apart():
    tree = ["encoder.layers.self_attention.linear_qkv.weight"]
    learned = "embedding.position_embeddings.weight"
    assert families.find(None, [*tree, learned]) == "biobert"
    assert families.find(None, tree) == "esm2"
    assert families.find(None, [*tree, learned, "encoder.layers.post_att_layernorm.bias"]) == "bert"
    assert families.find(None, ["bert.encoder.layer.0.attention.ln.weight"]) == "biobert"


def test_the_model_of_megatron_gives_the_logits_of_transformers():
    core = pytest.importorskip("megatron.core")
    assert core is not None
    config = config_of(BIOBERT, make_vocab_size_divisible_by=8, backend="megatron")
    hf = FAMILY.build(config_of(BIOBERT)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        hf.bert.embeddings.token_type_embeddings.weight.zero_()
    stored = dict(hf.state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    live = FAMILY.backend(config).build(lambda: FAMILY.build(config))
    like = {key: torch.empty(p.shape) for key, p in live.named_parameters()}
    found = execute(FAMILY.names(config, live, "hf", shapes), stored, like)
    filled = {key: tensor.nan_to_num(0.0) for key, tensor in found.items()}
    real = FAMILY.build(config).eval()
    missing = real.load_state_dict(filled, strict=False).unexpected_keys
    assert not missing
    ids = torch.randint(1, 37, (2, 9))
    with torch.no_grad():
        expected = hf(ids, attention_mask=torch.ones_like(ids)).logits
        logits = real(ids, torch.ones_like(ids))[0][..., :37]
    assert torch.allclose(logits, expected, atol=1e-4)
