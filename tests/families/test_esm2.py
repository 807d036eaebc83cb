"""ESM-2 under the field's names."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from bioinit import families  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402
from bioinit.families.esm2 import FAMILY, Esm2Config  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402
from tests.simulate import execute  # noqa: E402

ESM2 = {
    "architectures": ["EsmForMaskedLM"],
    "model_type": "esm",
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "position_embedding_type": "rotary",
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "token_dropout": True,
    "emb_layer_norm_before": False,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "eos_token_id": 2,
    "is_folding_model": False,
    "esmfold_config": None,
    "vocab_list": None,
    "use_cache": True,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0",
}
ESM1B = ESM2 | {"position_embedding_type": "absolute", "emb_layer_norm_before": True}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"esm2": ESM2, "esm1b": ESM1B}


def context(data: dict) -> Context:
    return Context("hf", "config.json", data, data.get("model_type"))


def config_of(data: dict, **written) -> Esm2Config:
    saved = FAMILY.read_fields(context(data))
    result = merge(make_record(Esm2Config, written, {}, at="model"), saved.fields, {})
    assert not result.problems, [str(p) for p in result.problems]
    return build(result.record, at="model")


def on_meta(config: Esm2Config):
    with torch.device("meta"):
        return FAMILY.build(config)


def shapes(stored):
    return {key: tuple(tensor.shape) for key, tensor in stored.items()}


def test_the_fields_have_the_names_of_the_field():
    config = config_of(ESM2)
    assert (config.num_layers, config.ffn_hidden_size, config.seq_length) == (2, 24, 20)
    assert config.position_embedding_type == "rope" and config.kv_channels == 4


def test_what_the_file_leaves_out_is_transformers_default_never_ours():
    data = {k: v for k, v in ESM2.items() if k not in ("layer_norm_eps", "token_dropout")}
    saved = FAMILY.read_fields(context(data)).fields
    assert saved["layernorm_epsilon"] == (1e-12, False, "config.json: layer_norm_eps")
    assert config_of(data).token_dropout is False
    assert Esm2Config().layernorm_epsilon == 1e-5 and Esm2Config().token_dropout is True


def test_fields_that_only_transformers_reads_are_carried():
    config = config_of(ESM2)
    assert config.extra["eos_token_id"] == 2
    assert on_meta(config).config.eos_token_id == 2


def test_a_field_that_nobody_knows_is_reported_and_carried():
    result = FAMILY.read_fields(context(ESM2 | {"strange": 7}))
    assert {f.name for f in result.account if f.fate == "unknown"} == {"strange"}
    assert on_meta(config_of(ESM2 | {"strange": 7})).config.strange == 7


def test_an_entry_of_extra_that_has_a_name_of_ours_is_refused():
    with pytest.raises(ConfigError, match=r"model\.extra\.num_hidden_layers is called"):
        Esm2Config(extra={"num_hidden_layers": 3})


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ConfigError, match="hidden_size=16 is not num_attention_heads=3"):
        Esm2Config(hidden_size=16, num_attention_heads=3)


@pytest.mark.parametrize("name", ["is_folding_model", "is_decoder", "add_cross_attention"])
def test_what_is_no_encoder_is_left_to_auto(name):
    with pytest.raises(ConfigError, match="family auto"):
        Esm2Config(extra={name: True})


def test_a_position_embedding_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="position_embedding_type='alibi'"):
        FAMILY.read_fields(context(ESM2 | {"position_embedding_type": "alibi"}))


def test_the_config_that_the_published_models_have_leaves_nothing_unknown():
    published = ESM2 | {"classifier_dropout": None, "hidden_act": "gelu", "cls_token_id": 0}
    account = FAMILY.read_fields(context(published)).account
    assert not [f.name for f in account if f.fate == "unknown"]
    with pytest.raises(ConfigError, match="hidden_act='relu'"):
        FAMILY.read_fields(context(ESM2 | {"hidden_act": "relu"}))


def test_another_model_type_is_not_recognized():
    assert not FAMILY.recognizes(context(ESM2 | {"model_type": "bert"}))
    with pytest.raises(ConfigError, match="describes 'bert'"):
        FAMILY.read_fields(context(ESM2 | {"model_type": "bert"}))


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "bin_sharded"])
def test_every_spelling_of_a_stored_name_leads_to_its_parameter(fixtures_dir, layout):
    from safetensors.torch import load_file

    folder = fixtures_dir / "hf" / "esm2" / layout
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        stored |= torch.load(file, weights_only=True)
    expected = transformers.EsmForMaskedLM.from_pretrained(folder).state_dict()
    config = config_of(transformers.EsmConfig.from_pretrained(folder).to_dict())
    names = FAMILY.names(config, on_meta(config), "hf", shapes(stored))
    assert all(names.disk.place(key, ()) is not None for key in stored)
    found = execute(names, stored, expected)
    tied = "lm_head.decoder.weight"
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k != tied)


def test_frequencies_that_older_files_repeat_in_every_layer_lead_to_the_one_there_is():
    config = config_of(ESM2)
    names = FAMILY.names(config, on_meta(config), "hf", {})
    (live,) = names.memory.place("esm.rotary_embeddings.inv_freq", ((),))
    for layer in range(2):
        key = f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
        assert names.disk.place(key, ((),)) == [live]
    assert names.disk.place(key.replace("layer.1", "layer.2"), ()) is None


def test_stored_heads_of_another_size_show_as_another_canonical_shape():
    config = config_of(ESM2)
    key = "esm.encoder.layer.0.attention.self.query.weight"
    names = FAMILY.names(config, on_meta(config), "hf", {key: (32, 16)})
    from bioinit.layout import Box

    (stored,) = names.disk.place(key, (Box.contiguous((32, 16)),))
    (live,) = names.memory.place(key, (Box.contiguous((16, 16)),))
    assert (stored.key, stored.box.sizes, live.box.sizes) == (
        live.key,
        (4, 1, 8, 16),
        (4, 1, 4, 16),
    )


def test_a_person_can_extend_the_config_and_stays_in_the_family():
    from dataclasses import dataclass

    @dataclass(kw_only=True)
    class Mine(Esm2Config):
        temperature: float = 1.0

    family = families.of_config(Mine)
    assert family.config is Mine and family.names is FAMILY.names
    assert family.config_for(None) is Mine
    assert families.of_config(Esm2Config) is FAMILY


def test_names_alone_tell_an_esm_checkpoint():
    stored = ["esm.encoder.emb_layer_norm_after.weight", "lm_head.bias"]
    assert FAMILY.dialect_of(stored) == "hf" and families.find(None, stored) == "esm2"
    assert FAMILY.dialect_of(["bert.embeddings.LayerNorm.weight"]) is None


def nemo2(name: str = "model.ESM2Config", **fields) -> Context:
    small = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4}
    cls = f"bionemo.esm2.model.{name}"
    tokenizer = {"_target_": "bionemo.esm2.data.tokenizer.BioNeMoESMTokenizer"}
    tree = {"model": {"model_construct_args": {"tokenizer": tokenizer}}}
    return Context("nemo2", "io.json", small | fields, cls, tree, {"canonical": cls})


PADDED = {"module.embedding.word_embeddings.weight": (128, 16)}


@pytest.mark.parametrize(
    "name",
    [
        "model.ESM2Config",
        "finetune.sequence_model.ESM2FineTuneSeqConfig",
        "finetune.token_model.ESM2FineTuneTokenConfig",
    ],
)
def test_configs_of_bionemo_are_known_and_their_alphabet_with_them(name):
    saved = nemo2(name, cnn_num_classes=3, mlp_target_size=1)
    assert FAMILY.recognizes(saved)
    result = FAMILY.read_fields(saved, PADDED)
    assert {f.name: f.fate for f in result.account}["cnn_num_classes"] == "ignored"
    values = {name: field.value for name, field in result.fields.items()}
    assert (values["vocab_size"], values["pad_token_id"], values["mask_token_id"]) == (33, 1, 32)
    assert values["seq_length"] == 1024 and values["token_dropout"] is True


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("position_embedding_type", "learned_absolute", "another number"),
        ("use_attention_mask", False, "counts for nothing"),
        ("normalize_attention_scores", True, "scaled once"),
        ("activation_func", "torch.nn.functional.relu", "has gelu"),
        ("rotary_percent", 0.5, "all channels"),
    ],
)
def test_what_makes_another_model_of_bionemo_is_refused(field, value, why):
    with pytest.raises(ConfigError, match=f"{field}.*{why}"):
        FAMILY.read_fields(nemo2(**{field: value}), PADDED)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pad_token_id", 0), ("mask_token_id", 4), ("emb_layer_norm_before", True)],
)
def test_what_bionemo_has_no_word_for_is_refused(field, value):
    config = config_of(ESM2 | {field: value})
    with pytest.raises(ConfigError, match=f"{field} is {value!r}, which nemo2 cannot express"):
        FAMILY.dialects["nemo2"].write(config, {}, ())


def test_a_vocabulary_is_padded_to_any_multiple():
    import dataclasses

    for divisor, rows in ((8, 40), (16, 48), (33, 33), (10, 40), (128, 128)):
        config = dataclasses.replace(config_of(ESM2), make_vocab_size_divisible_by=divisor)
        names = FAMILY.names(config, on_meta(config), "nemo2", {})
        shapes = {"embedding.word_embeddings.weight": (33, 16), "output_layer.bias": (33,)}
        assert names.disk.spelled_out(shapes) == {
            "embedding.word_embeddings.weight": (rows, 16),
            "output_layer.bias": (rows,),
        }


def test_heads_of_bionemo_are_known_and_left_behind():
    config = config_of(ESM2)
    names = FAMILY.names(config, on_meta(config), "nemo2", {})
    for key in ("regression_head.linear_layers.0.weight", "classification_head.class_heads.bias"):
        assert names.disk.place(key, ()) == [] and not names.disk.rule_for(key).parts
    assert names.disk.place("language_model.rotary_pos_emb.inv_freq", ()) == []


def test_esm_2_of_bionemo_1_is_known_by_what_only_it_has():
    small = {
        "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4,
        "max_position_embeddings": 20, "position_embedding_type": "rope", "hidden_dropout": 0,
        "attention_dropout": 0.0, "embedding_token_dropout": True, "bert_binary_head": False,
        "embedding_use_attention_mask": True, "normalize_attention_scores": False,
        "esm_gelu": True, "use_esm_attention": True, "mask_token_id": 32,
    }  # fmt: skip
    saved = Context("nemo1", "model_config.yaml", small, "pkg.ESM2nvModel")
    assert families.find(saved, ()) == "esm2"
    shapes = {"model.language_model.embedding.word_embeddings.weight": (33, 16)}
    result = FAMILY.read_fields(saved, shapes)
    assert not [f for f in result.account if f.fate == "carried"]
    assert result.fields["token_dropout"].value is True and result.fields["seq_length"].value == 20


def test_partitions_of_bionemo_start_the_same_classifier(fixtures_dir):
    import bioinit

    started = {}
    for name in ("esm2_tp1", "esm2_tp2"):  # 40 and 48 rows for 33 tokens
        words = [f"model.initial_ckpt_path={fixtures_dir / 'nemo2' / name}", "model.num_labels=3"]
        made = bioinit.initialize(bioinit.compose("esm2/token_classification", words))
        assert isinstance(made.model, transformers.EsmForTokenClassification)
        started[name] = made.model.state_dict()
    one, other = started.values()
    assert one["esm.embeddings.word_embeddings.weight"].shape == (33, 32)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_every_field_that_bionemo_saves_is_accounted_for(fixtures_dir):
    import bioinit

    with bioinit.open_checkpoint(fixtures_dir / "nemo2" / "esm2_tp1") as checkpoint:
        result = FAMILY.read_fields(checkpoint.context, PADDED)
        assert set(checkpoint.context.data) <= {field.name for field in result.account}
    assert {field.fate for field in result.account} == {"mapped", "ignored"}
    assert all(field.note for field in result.account)
