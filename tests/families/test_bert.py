"""BERT and its kin under the field's names."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from bioinit import families  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402
from bioinit.families.bert import FAMILY, BertConfig  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402
from tests.simulate import execute  # noqa: E402

BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "pad_token_id": 0,
    "use_cache": True,
    "transformers_version": "4.30.0",
}
GENEFORMER = BERT | {"hidden_act": "relu", "vocab_size": 45, "attention_probs_dropout_prob": 0.02}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"bert": BERT, "geneformer": GENEFORMER}


def context(data: dict) -> Context:
    return Context("hf", "config.json", data, data.get("model_type"))


def config_of(data: dict, **written) -> BertConfig:
    saved = FAMILY.read_fields(context(data))
    result = merge(make_record(BertConfig, written, {}, at="model"), saved.fields, {})
    assert not result.problems, [str(p) for p in result.problems]
    return build(result.record, at="model")


def on_meta(config: BertConfig):
    with torch.device("meta"):
        return FAMILY.build(config)


def shapes(stored):
    return {key: tuple(tensor.shape) for key, tensor in stored.items()}


def test_an_activation_that_is_not_the_usual_one_comes_from_the_checkpoint():
    config = config_of(GENEFORMER)
    assert config.activation == "relu" and config.attention_dropout == 0.02
    assert on_meta(config).config.hidden_act == "relu"


def test_a_position_embedding_that_transformers_dropped_is_refused_not_ignored():
    with pytest.raises(ConfigError, match=r"relative_key.*no longer builds"):
        FAMILY.read_fields(context(BERT | {"position_embedding_type": "relative_key"}))


def test_names_of_the_first_generation_lead_to_the_same_parameters():
    config = config_of(BERT)
    model = on_meta(config)
    names = FAMILY.names(config, model, "hf", {})
    layer = "bert.encoder.layer.1.attention.output.LayerNorm"
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        ((stored,),) = (names.disk.place(f"{layer}.{old}", ((),)),)
        ((live,),) = (names.memory.place(f"{layer}.{new}", ((),)),)
        assert stored.key == live.key


def test_the_weights_of_a_body_are_placed_without_its_prefix():
    config = config_of(BERT, architecture="BertModel")
    model = on_meta(config)
    names = FAMILY.names(config, model, "hf", {})
    assert all(names.memory.place(key, ()) is not None for key in model.state_dict())
    assert names.disk.place("bert.pooler.dense.weight", ()) is None


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "bin_sharded"])
def test_stored_tensors_land_where_from_pretrained_puts_them(fixtures_dir, layout):
    from safetensors.torch import load_file

    folder = fixtures_dir / "hf" / "bert" / layout
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        stored |= torch.load(file, weights_only=True)
    expected = transformers.BertForMaskedLM.from_pretrained(folder).state_dict()
    config = config_of(transformers.BertConfig.from_pretrained(folder).to_dict())
    found = execute(FAMILY.names(config, on_meta(config), "hf", shapes(stored)), stored, expected)
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k not in tied)


def test_the_first_berts_name_no_model_type_and_are_recognized(tmp_path):
    first = {k: v for k, v in BERT.items() if k not in ("model_type", "architectures")}
    saved = context(first | {"directionality": "bidi", "pooler_type": "first_token_transform"})
    assert FAMILY.recognizes(saved) and families.find(saved, ()) == "bert"
    fates = {f.name: f.fate for f in FAMILY.read_fields(saved).account}
    assert fates["directionality"] == "carried"
    with pytest.raises(ConfigError, match="names no model_type"):
        families.load("auto").config_for(saved)


def test_a_training_setting_in_an_old_config_is_left_behind():
    account = FAMILY.read_fields(context(BERT | {"gradient_checkpointing": False})).account
    assert {f.name: f.fate for f in account}["gradient_checkpointing"] == "ignored"


def test_an_esm_checkpoint_is_not_taken_for_a_bert():
    assert not FAMILY.recognizes(context(BERT | {"model_type": "esm"}))
    assert families.find(context(BERT | {"model_type": "esm"}), ()) == "esm2"


def test_names_alone_tell_a_bert_checkpoint():
    stored = ["encoder.layer.0.attention.output.LayerNorm.weight", "pooler.dense.bias"]
    assert families.find(None, stored) == "bert"


def test_an_architecture_outside_the_table_is_left_to_auto():
    config = config_of(BERT, architecture="EsmForMaskedLM")
    with pytest.raises(ConfigError, match="is a class for 'esm'"):
        on_meta(config)


def nemo2(name: str = "HuggingFaceBertBaseConfig", **fields) -> Context:
    cls = f"nemo.collections.llm.bert.model.bert.{name}"
    return Context("nemo2", "io.json", {"num_layers": 2} | fields, cls, raw={"canonical": cls})


def test_nemo_s_own_bert_is_of_the_family_that_its_norms_say():
    assert families.find(nemo2(), ()) == "bert"
    assert families.find(nemo2("MegatronBertBaseConfig"), ()) == "biobert"
    assert families.find(nemo2("BertConfig", bert_type="huggingface"), ()) == "bert"
    shapes = {"module.embedding.word_embeddings.weight": (40, 768)}
    fields = FAMILY.read_fields(nemo2(), shapes).fields
    assert fields["hidden_size"].value == 768 and fields["num_tokentypes"].value == 2


@pytest.mark.parametrize(
    ("architecture", "heads"),
    [
        ("masked_lm", (True, False, False)),
        ("BertForPreTraining", (True, True, True)),
        ("BertModel", (False, False, True)),
        ("token_classification", (False, False, False)),
    ],
)
def test_nemo_2_is_told_which_heads_there_are(architecture, heads):
    import yaml

    config = config_of(BERT, architecture=architecture)
    written = FAMILY.dialects["nemo2"].write(config, {}, ())
    said = yaml.safe_load(written.files["context/model.yaml"])["config"]
    assert (said["add_lm_head"], said["bert_binary_head"], said["add_pooler"]) == heads
    assert said["bert_type"] == "huggingface"


def test_an_activation_that_the_head_of_nemo_has_not_is_refused():
    with pytest.raises(ConfigError, match="activation is 'relu', which nemo2 cannot express"):
        FAMILY.dialects["nemo2"].write(config_of(GENEFORMER), {}, ())


def test_the_outer_bias_of_an_untied_head_is_a_tensor_of_its_own():
    tied, untied = config_of(BERT), config_of(BERT | {"tie_word_embeddings": False})
    for config, canonical in ((tied, "output_layer.bias"), (untied, "lm_head.bias")):
        names = FAMILY.names(config, on_meta(config), "hf", {})
        (placed,) = names.disk.place("cls.predictions.bias", ((),))
        assert placed.key == canonical
    assert FAMILY.tensors(untied)["lm_head.bias"].kind == "zero"


def test_what_nemo_2_has_no_word_for_is_carried_there_and_back(tmp_path):
    import json

    import bioinit

    hf = transformers.BertConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=20, pad_token_id=3, classifier_dropout=0.25,
    )  # fmt: skip
    transformers.BertForMaskedLM(hf).save_pretrained(tmp_path / "hf")
    bioinit.convert(tmp_path / "hf", tmp_path / "nemo2", "nemo2")
    bioinit.convert(tmp_path / "nemo2", tmp_path / "back", "hf")
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "back")
    )
    assert {key: after.get(key) for key in before} == before
