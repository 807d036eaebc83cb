"""Any transformers architecture, its config class made of transformers' own."""

import json

import fiddle as fdl
import pytest
import torch

transformers = pytest.importorskip("transformers")

from bioinit import families  # noqa: E402
from bioinit.backends.transformers.architectures import make_config  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402
from bioinit.families.auto import FAMILY  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 5,
    "text_config": {k: v for k, v in LLAMA.items() if k != "architectures"},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
    },
}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"llama": LLAMA, "mixtral": MIXTRAL, "gpt2": GPT2}


def context(data: dict) -> Context:
    return Context("hf", "config.json", data, data.get("model_type"))


def merged(data: dict, **written):
    cls = FAMILY.config_for(context(data))
    saved = FAMILY.read_fields(context(data))
    return merge(make_record(cls, written, {}, at="model"), saved.fields, {})


def config_of(data: dict, **written):
    result = merged(data, **written)
    assert not result.problems, [str(p) for p in result.problems]
    return build(result.record, at="model")


def decision(result, name):
    return next(d for d in result.decisions if d.field == name)


def test_the_fields_are_those_of_transformers_and_hold_what_the_checkpoint_says():
    config = config_of(LLAMA)
    assert (config.hidden_size, config.num_key_value_heads, config.rms_norm_eps) == (16, 2, 1e-6)


def test_a_field_that_is_left_out_has_the_default_of_its_class_from_the_checkpoint():
    saved = FAMILY.read_fields(context(LLAMA)).fields
    assert saved["attention_bias"] == (False, False, "config.json: attention_bias")
    assert decision(merged(LLAMA), "attention_bias").origin.by == "checkpoint"


def test_an_old_spelling_is_read_as_the_field_it_became():
    result = FAMILY.read_fields(context(LLAMA))
    assert result.fields["rope_parameters"].literal
    assert result.fields["rope_parameters"].value["rope_theta"] == 500000.0
    assert result.fields["rope_parameters"].where == "config.json: rope_theta"
    account = {field.name: field for field in result.account}
    assert account["rope_theta"].note == "rope_parameters"
    assert account["torch_dtype"].fate == account["transformers_version"].fate == "ignored"


def test_an_old_spelling_counts_as_written_even_where_it_equals_the_default():
    data = LLAMA | {"rope_theta": 10000.0}
    assert FAMILY.read_fields(context(data)).fields["rope_parameters"].literal


def test_an_alias_is_read_as_the_field_it_stands_for():
    data = {k: v for k, v in GPT2.items() if k != "n_embd"} | {"hidden_size": 16}
    assert config_of(data).n_embd == 16


def test_what_a_class_keeps_without_declaring_it_is_a_field_too():
    data = LLAMA | {"my_lab_marker": [1, 2]}
    config = config_of(data)
    assert config.my_lab_marker == (1, 2)
    assert list(config.hf_fields()["my_lab_marker"]) == [1, 2]


@pytest.mark.parametrize(
    "model_type",
    [
        "glm4_moe",  # declares a field and its alias
        "qwen3_vl_moe_text",  # declares an alias of what is not declared
        "upernet",  # a backbone with properties for fields
        "mamba2",  # infinity in a config
        "falcon",
        "gemma3n",
    ],
)
def test_configs_of_every_make_come_back_equal(model_type):
    cls = transformers.CONFIG_MAPPING[model_type]
    data = json.loads(cls().to_json_string())
    config = config_of(data)
    plain = {k: v for k, v in cls._decode_special_floats(data).items() if k != "model_type"}
    expected, found = cls(**plain).to_dict(), make_config(cls, config.hf_fields()).to_dict()
    changed = {k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)}
    assert not changed


def test_an_unknown_override_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError, match=r"model\.hiden_size.*Closest: 'hidden_size'"):
        merged(LLAMA, hiden_size=3)


def test_a_value_that_differs_from_the_checkpoint_is_a_problem_unless_it_is_listed():
    (problem,) = merged(LLAMA, num_attention_heads=2).problems
    assert problem.kind == "conflict" and problem.key == "num_attention_heads"
    config = config_of(
        LLAMA, num_attention_heads=2, override_parent_fields=("num_attention_heads",)
    )
    assert config.num_attention_heads == 2


def test_what_transformers_computes_is_computed_again_after_the_merge():
    data = LLAMA | {"head_dim": 4}  # what 16 and 4 heads give; nobody chose it
    config = config_of(data, num_attention_heads=2, override_parent_fields=("num_attention_heads",))
    assert config.head_dim == 8
    chosen = config_of(LLAMA | {"head_dim": 6})
    assert chosen.head_dim == 6


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (None, "LlamaForCausalLM"),
        ("causal_lm", "LlamaForCausalLM"),
        ("token_classification", "LlamaForTokenClassification"),
        ("sequence_classification", "LlamaForSequenceClassification"),
        ("regression", "LlamaForSequenceClassification"),
        ("body", "LlamaModel"),
        ("LlamaForQuestionAnswering", "LlamaForQuestionAnswering"),
    ],
)
def test_a_task_or_a_class_name_chooses_the_head(architecture, expected):
    assert config_of(LLAMA, architecture=architecture).model_class().__name__ == expected


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("LlamaForTokenClasification", "Closest: 'LlamaForTokenClassification'"),
        ("BertModel", "is a class for 'bert'"),
        ("masked_lm", "Choose one of: causal_lm"),
        ("LlamaConfig", "no such class"),
    ],
)
def test_a_head_that_the_model_type_does_not_have_is_refused(architecture, message):
    with pytest.raises(ConfigError, match=message):
        config_of(LLAMA, architecture=architecture).model_class()


def test_a_checkpoint_that_names_no_architecture_asks_for_one():
    data = {k: v for k, v in LLAMA.items() if k != "architectures"}
    with pytest.raises(ConfigError, match=r"Set model\.architecture"):
        config_of(data).model_class()


def test_labels_size_a_new_head_and_keep_out_of_the_merge():
    data = LLAMA | {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    named = config_of(data, architecture="token_classification", labels=("H", "E", "C"))
    assert named.hf_fields()["id2label"] == {0: "H", 1: "E", 2: "C"}
    counted = config_of(data, architecture="token_classification", num_labels=4)
    assert make_config(counted.hf_class, counted.hf_fields()).num_labels == 4
    kept = config_of(data, architecture="sequence_classification")
    assert kept.hf_fields()["id2label"] == {0: "no", 1: "yes"}


def test_regression_is_one_number_and_a_squared_error():
    config = config_of(LLAMA, architecture="regression")
    made = make_config(config.hf_class, config.hf_fields())
    assert made.num_labels == 1 and made.problem_type == "regression"


def test_a_config_inside_a_config_is_overridden_field_by_field():
    override = {
        "text_config": {"num_hidden_layers": 1},
        "override_parent_fields": ("text_config.num_hidden_layers",),
    }
    config = config_of(LLAVA, **override)
    with torch.device("meta"):
        model = FAMILY.build(config)
    assert len(model.model.language_model.layers) == 1
    assert config.text_config.hidden_size == 16, "the rest of it comes from the checkpoint"
    assert model.config.text_config.rope_parameters["rope_theta"] == 500000.0


def test_without_a_config_json_there_is_nothing_to_learn_from():
    with pytest.raises(ConfigError, match=r"config\.json"):
        FAMILY.config_for(None)


def test_an_unknown_model_type_is_refused_with_the_closest_one():
    with pytest.raises(ConfigError, match=r"no model type 'lama'.*Closest: .*'llama'"):
        FAMILY.config_for(context(LLAMA | {"model_type": "lama"}))


def test_a_value_that_transformers_refuses_is_our_error():
    with pytest.raises(ConfigError, match="hidden_size"):
        FAMILY.config_for(context(LLAMA | {"hidden_size": "many"}))


def test_one_kind_of_checkpoint_is_one_class():
    assert FAMILY.config_for(context(LLAMA)) is FAMILY.config_for(context(dict(LLAMA)))


def test_a_saved_context_of_ours_is_read_back(tmp_path):
    from bioinit.contexts import find
    from bioinit.record import save_context
    from bioinit.storage import Folder

    record = merged(GPT2, architecture="token_classification", num_labels=3).record
    save_context(record, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    saved = find((Folder.at(tmp_path),))
    assert saved.dialect == "bioinit" and FAMILY.recognizes(saved)
    fields = FAMILY.read_fields(saved).fields
    arguments = fdl.ordered_arguments(record)
    assert fields["n_embd"].value == arguments["n_embd"] == 16
    assert families.find(saved, ()) == "auto"


def test_a_backend_that_it_does_not_have_is_refused():
    cls = FAMILY.config_for(context(LLAMA))
    config = build(make_record(cls, {"backend": "megatron"}, {}, at="model"), at="model")
    with pytest.raises(ConfigError, match="named family"):
        FAMILY.backend(config)
