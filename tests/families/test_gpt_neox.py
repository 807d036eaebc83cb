"""GPT-NeoX: files of a pipeline's layers, files of transformers, and the settings of both."""

import json

import numpy as np
import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")

import bioinit  # noqa: E402
from bioinit import families  # noqa: E402
from bioinit.contexts import find  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import BioinitError, ConfigError  # noqa: E402
from bioinit.families.gpt_neox import FAMILY, GptNeoxConfig  # noqa: E402
from bioinit.formats.neox import FORMAT  # noqa: E402
from bioinit.formats.protocol import WriteOptions  # noqa: E402
from bioinit.mapping import Mapping, Names  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402
from bioinit.storage import Folder  # noqa: E402
from tests.simulate import execute  # noqa: E402

NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "hidden_act": "gelu_fast",
    "layer_norm_eps": 1e-6,
    "hidden_dropout": 0.125,
    "attention_dropout": 0.25,
    "initializer_range": 0.03,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000.0,
        "partial_rotary_factor": 0.5,
    },
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "transformers_version": "5.23.0",
}
TIED = NEOX | {"tie_word_embeddings": True, "attention_bias": False, "use_parallel_residual": False}
YAML = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "seq_length": 18,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "norm": "layernorm",
    "make_vocab_size_divisible_by": 8,
    "model_parallel_size": 2,
}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"parallel": NEOX, "tied": TIED}


def context(data: dict) -> Context:
    return Context("hf", "config.json", data, data.get("model_type"))


def settings(**changes) -> Context:
    data = {k: v for k, v in (YAML | changes).items() if v is not None}
    return Context("neox", "configs/neox.yml", data, None, raw={"said": dict.fromkeys(data, "f")})


def config_of(saved: Context, shapes=None, **written) -> GptNeoxConfig:
    fields = FAMILY.read_fields(saved, shapes or {}).fields
    result = merge(make_record(GptNeoxConfig, written, {}, at="model"), fields, {})
    assert not result.problems, [str(p) for p in result.problems]
    return build(result.record, at="model")


def table(dialect: str, config: GptNeoxConfig, shapes=None, body: str = "") -> Mapping:
    return Mapping(FAMILY.dialects[dialect].rules(config, shapes or {}, body))


def spelled(dialect: str, config: GptNeoxConfig, body: str = "") -> dict[str, torch.Tensor]:
    """Tensors with the names and shapes that a dialect has for ``config``, all values different."""
    canonical = {key: each.shape for key, each in FAMILY.tensors(config).items()}
    names = table(dialect, config, body=body).spelled_out(canonical)
    last, made = 0, {}
    for key, shape in names.items():
        count = int(np.prod(shape))
        made[key] = torch.arange(last, last + count, dtype=torch.float64).reshape(shape)
        last += count
    return made


def logits(model, io) -> np.ndarray:
    with torch.no_grad():
        given = {name: torch.from_numpy(io[name]) for name in ("input_ids", "attention_mask")}
        return model.eval()(**given).logits.numpy()


HAND = [
    "model.num_layers=3",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.ffn_hidden_size=256",
    "model.vocab_size=128",
    "model.seq_length=128",
]
"""What the partitions do not say of themselves."""


@pytest.mark.parametrize(
    ("where", "given"),
    [("hf/gpt_neox/safetensors", []), ("hf/gpt_neox/bin_sharded", []), ("gpt_neox", HAND)],
)
def test_every_spelling_gives_the_logits_of_the_writer(fixtures_dir, where, given):
    io = np.load(fixtures_dir / "hf" / "gpt_neox" / "io.npz")
    asked = [f"model.initial_ckpt_path={fixtures_dir / where}", *given]
    done = bioinit.initialize(bioinit.compose("gpt_neox/causal_lm", asked))
    assert np.abs(logits(done.model, io) - io["logits"]).max() < 1e-5


def test_frequencies_that_a_partition_holds_are_left_out_and_it_is_said_why(fixtures_dir):
    asked = [f"model.initial_ckpt_path={fixtures_dir / 'gpt_neox'}", *HAND]
    planned = bioinit.plan(bioinit.compose("gpt_neox/causal_lm", asked))
    assert not planned.problems
    rules = FAMILY.dialects["neox"].rules(GptNeoxConfig(), {}, "")
    why = Mapping(rules).rule_for("3.attention.rotary_emb.inv_freq")
    assert why is not None and not why.parts and "computes it" in why.text


def test_a_model_loaded_from_partitions_is_saved_as_transformers_spells_it(fixtures_dir, tmp_path):
    from safetensors.torch import load_file

    asked = [f"model.initial_ckpt_path={fixtures_dir / 'gpt_neox'}", *HAND]
    bioinit.initialize(bioinit.compose("gpt_neox/causal_lm", asked)).save(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(fixtures_dir / "hf" / "gpt_neox" / "safetensors" / "model.safetensors")
    assert written.keys() == original.keys()
    # Summing what was halved is exact, so every value comes back.
    assert all(torch.equal(written[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize("data", [NEOX, TIED], ids=["parallel", "tied"])
def test_partitions_are_counted_from_the_embedding_and_hold_a_padded_vocabulary(data):
    config = config_of(context(data), model_parallel_size=2, make_vocab_size_divisible_by=8)
    names = {key: tuple(value.shape) for key, value in spelled("neox", config).items()}
    is_tied = config.share_embeddings_and_output_weights
    assert names["0.word_embeddings.weight"] == (32, 16)
    assert names.get("6.final_linear.weight") == (None if is_tied else (32, 16))
    assert {key.partition(".")[0] for key in names} == {"0", "2", "3", "5"} | (
        set() if is_tied else {"6"}
    )
    assert ("2.attention.dense.bias" in names) is config.attention_bias
    assert not any("inv_freq" in key for key in names)


@pytest.mark.parametrize("data", [NEOX, TIED], ids=["parallel", "tied"])
@pytest.mark.parametrize("body", ["gpt_neox.", ""])
def test_there_and_back_nothing_changes_below_the_padding(data, body):
    config = config_of(context(data), make_vocab_size_divisible_by=16)
    there = spelled("hf", config, body)
    back = spelled("neox", config)
    names = Names(table("hf", config, body=body), table("neox", config))
    divided = execute(names, there, back)
    again = execute(Names(names.memory, names.disk), divided, there)
    assert all(torch.equal(again[key], tensor) for key, tensor in there.items())
    fused = f"{body}layers.1.attention.query_key_value.weight"
    assert torch.equal(divided["3.attention.query_key_value.weight"], there[fused])


def test_files_are_found_at_the_places_they_have_whatever_the_config_says():
    # As of a model from which layers were taken out by hand: its norm lies where it lay.
    shapes = {"47.norm.weight": (16,), "48.final_linear.weight": (29, 16)}
    names = table("neox", config_of(context(NEOX)), shapes)
    assert names.rule_for("47.norm.bias").parts[0].to == "decoder.final_layernorm.bias"
    assert names.rule_for("48.final_linear.weight").parts[0].to == "output_layer.weight"
    bare = table("neox", config_of(context(NEOX)), {"7.weight": (16,), "7.bias": (16,)})
    assert bare.rule_for("7.weight").parts[0].to == "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mlp.linear1", "mlp.dense_h_to_4h"),
        ("mlp.linear2", "mlp.dense_4h_to_h"),
    ],
)
def test_newer_names_lead_to_the_same_tensors(theirs, ours):
    names = table("neox", config_of(context(NEOX)))
    for kind in ("weight", "bias"):
        new = names.rule_for(f"3.{theirs}.{kind}").parts
        assert new == names.rule_for(f"3.{ours}.{kind}").parts


def test_buffers_of_older_versions_are_known_and_left_out():
    names = table("hf", config_of(context(NEOX)), body="gpt_neox.")
    for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        rule = names.rule_for(f"gpt_neox.layers.1.attention.{buffer}")
        assert rule is not None and not rule.parts and rule.text


def test_names_alone_tell_both_dialects():
    assert FAMILY.dialect_of(
        ["0.word_embeddings.weight", "2.attention.query_key_value.weight"]
    ) == ("neox")
    assert FAMILY.dialect_of(["sequential.2.attention.query_key_value.weight"]) == "neox"
    stored = ["gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.query_key_value.weight"]
    assert FAMILY.dialect_of(stored) == "hf" and families.find(None, stored) == "gpt_neox"
    assert FAMILY.dialect_of(["h.0.self_attention.query_key_value.weight"]) is None


def test_a_rotary_model_of_the_published_settings_is_read():
    config = config_of(settings(), {"0.word_embeddings.weight": (32, 16)})
    assert (config.num_layers, config.ffn_hidden_size, config.seq_length) == (2, 64, 20)
    assert config.use_parallel_residual and not config.share_embeddings_and_output_weights
    assert (config.rotary_percent, config.rotary_base, config.activation_func) == (
        0.25,
        10000.0,
        "gelu",
    )
    assert (config.vocab_size, config.make_vocab_size_divisible_by) == (32, 8)


def test_what_the_settings_leave_out_is_what_neox_takes():
    saved = settings(rotary_pct=None, no_weight_tying=None, gpt_j_residual=None)
    config = config_of(saved)
    assert config.rotary_percent == 1.0 and not config.use_parallel_residual
    assert config.share_embeddings_and_output_weights
    fields = FAMILY.read_fields(saved, {}).fields
    assert not fields["rotary_percent"].literal and fields["num_layers"].literal


def test_the_few_arguments_beside_the_weights_say_only_what_they_say():
    saved = Context("neox", "mp_rank_00_model_states.pt (args)", {"num_layers": 3}, None)
    assert FAMILY.recognizes(saved)
    assert FAMILY.read_fields(saved, {}).fields.keys() == {"num_layers"}


def test_the_fused_gelu_is_the_approximate_one():
    # bias_gelu_fusion computes tanh; the published 20B model says gelu_fast for the same.
    assert config_of(settings(bias_gelu_fusion=True)).activation_func == "gelu_fast"
    assert config_of(settings(activation="swish")).activation_func == "silu"
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    fused = x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
    assert torch.allclose(transformers.activations.ACT2FN["gelu_fast"](x), fused, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"intermediate_size": 24}, 24),
        ({"expansion_factor": 2.5}, 40),
        ({"expansion_factor": 2.5, "mlp_multiple_of": 32}, 64),
        ({}, 64),
    ],
)
def test_the_width_of_the_mlp_is_said_in_several_ways(given, size):
    assert config_of(settings(**given)).ffn_hidden_size == size


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("pos_emb", None, "rotary"),
        ("pos_emb", "alibi", "rotary"),
        ("norm", "rmsnorm", "layer norms"),
        ("gpt_j_tied", True, "two norms"),
        ("mlp_type", "llama", "without a gate"),
        ("use_bias_in_norms", False, "bias"),
        ("use_bias_in_mlp", False, "biases"),
        ("activation", "geglu", "geglu"),
        ("moe_num_experts", 8, "experts"),
        ("num_kv_heads", 2, "share keys"),
        ("sliding_window_width", 128, "window"),
        ("num_unique_layers", 1, "share their weights"),
        ("attention_config", [[["local", "global"], 1]], "local"),
        ("soft_prompt_tuning", {"enabled": True, "num_tokens": 3}, "prompt"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(field, value, what):
    with pytest.raises(ConfigError, match=what) as raised:
        FAMILY.read_fields(settings(**{field: value}), {})
    assert field in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {"attention_config": [[["global"], 2]]},
        {"attention_config": [[["flash"], "all"]], "num_kv_heads": 4, "num_unique_layers": 2},
        {"soft_prompt_tuning": {"enabled": False}, "norm": "te_layernorm"},
    ],
)
def test_what_makes_no_difference_is_ignored_for_a_reason(given):
    result = FAMILY.read_fields(settings(**given), {})
    fates = {f.name: f for f in result.account}
    assert all(fates[name].fate == "ignored" and fates[name].note for name in given)


def test_every_setting_has_a_fate():
    given = {"lr": 1e-4, "tokenizer_type": "HFTokenizer", "vocab_file": "20B.json", "odd": 1}
    result = FAMILY.read_fields(settings(**given), {})
    fates = {f.name: f.fate for f in result.account}
    assert fates.keys() == {*YAML, *given}
    assert fates["lr"] == "ignored" and fates["odd"] == fates["vocab_file"] == "carried"


def test_the_tokens_of_the_tokenizer_are_the_vocabulary(tmp_path):
    save_yaml(tmp_path, YAML | {"vocab_file": "20B_tokenizer.json"})
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 4, "content": "<e>"}]}
    (tmp_path / "20B_tokenizer.json").write_text(json.dumps(tokens))
    found = find((Folder.at(tmp_path),))
    vocab = FAMILY.read_fields(found, {"0.word_embeddings.weight": (32, 16)}).fields["vocab_size"]
    assert vocab.value == 5 and "20B_tokenizer.json" in vocab.where
    (tmp_path / "20B_tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(BioinitError, match=r"no tokenizer\.json whose tokens"):
        FAMILY.read_fields(find((Folder.at(tmp_path),)), {})


def save_yaml(folder, data: dict) -> None:
    (folder / "configs").mkdir()
    (folder / "configs" / "neox.yml").write_text(yaml.safe_dump(data))


@pytest.mark.parametrize("data", [NEOX, TIED], ids=["parallel", "tied"])
def test_the_settings_come_back_from_the_file_that_is_written(data, tmp_path):
    config = config_of(context(data), make_vocab_size_divisible_by=4, model_parallel_size=2)
    written = FAMILY.dialects["neox"].write(config, {}, ("tokenizer.json",))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "neox.yml").write_bytes(written.files["configs/neox.yml"])
    found = find((Folder.at(tmp_path),))
    assert found is not None and found.dialect == "neox" and FAMILY.recognizes(found)
    assert found.data["vocab_file"] == "tokenizer.json"
    again = config_of(found, vocab_size=config.vocab_size, architecture=config.architecture)
    # What only transformers reads has no place in these settings.
    again.extra, again.classifier_dropout = config.extra, config.classifier_dropout
    assert again == config


def test_settings_that_were_carried_along_are_written_again():
    carried = {"seq_length": 18, "tokenizer_type": "SPMTokenizer", "pipe_parallel_size": 4}
    config = config_of(settings())
    files = FAMILY.dialects["neox"].write(config, carried, ()).files
    found = yaml.safe_load(files["configs/neox.yml"])
    assert found.items() >= carried.items() and found["max_position_embeddings"] == 20


def test_settings_that_older_versions_refuse_are_written_only_where_they_matter():
    found = yaml.safe_load(
        FAMILY.dialects["neox"].write(config_of(settings()), {}, ()).files["configs/neox.yml"]
    )
    assert not {"intermediate_size", "use_bias_in_attn_linear", "gpt_j_tied"} & found.keys()


def test_a_vocabulary_is_not_padded_unless_somebody_asks_for_it():
    config = config_of(context(NEOX))
    assert spelled("neox", config)["0.word_embeddings.weight"].shape == (29, 16)
    assert GptNeoxConfig().make_vocab_size_divisible_by == 128
    written = FAMILY.dialects["neox"].write(config, {}, ())
    assert {f.name for f in written.account} >= {"vocab_size", "classifier_dropout", "num_layers"}


def test_a_scaled_rotation_cannot_be_written_for_neox():
    config = config_of(settings(), rope_type="linear")
    with pytest.raises(ConfigError, match=r"rope_type is 'linear', which neox cannot express"):
        FAMILY.dialects["neox"].write(config, {}, ())
    unknown = config_of(settings(), activation_func="tanh")
    with pytest.raises(ConfigError, match="activation_func='tanh'"):
        FAMILY.dialects["neox"].write(unknown, {}, ())


def test_worlds_without_parallel_residuals_say_so():
    for world in ("nemo2", "nemo1", "bridge", "megatron"):
        assert world not in FAMILY.dialects and "use_parallel_residual" in FAMILY.absent[world]
    with pytest.raises(ConfigError, match=r"megatron-core cannot.*Leave model.backend out"):
        FAMILY.build(GptNeoxConfig(backend="megatron"))


def test_partitions_that_are_written_are_read_back_and_loaded(tmp_path):
    from bioinit.storage import Journal
    from tests.writing import Source

    config = config_of(context(NEOX), model_parallel_size=2, make_vocab_size_divisible_by=8)
    config.extra.clear()
    whole = {key: value.float() for key, value in spelled("neox", config).items()}
    written = FAMILY.dialects["neox"].write(config, {}, ())
    out = tmp_path / "out"
    (out / "configs").mkdir(parents=True)
    (out / "configs" / "neox.yml").write_bytes(written.files["configs/neox.yml"])
    with Journal(out, "the same work") as journal:
        FORMAT.write(out, Source(whole).outgoing, WriteOptions(partitions=2), journal)
    recipe = bioinit.compose(
        "gpt_neox/causal_lm", [f"model.initial_ckpt_path={out}", "model.vocab_size=29"]
    )
    model = bioinit.initialize(recipe).model
    live = dict(model.state_dict())
    expected = execute(
        Names(table("neox", config), table("hf", config, body="gpt_neox.")),
        spelled("neox", config),
        live,
    )
    assert all(torch.equal(live[key], expected[key]) for key in live)


def test_a_conversion_into_partitions_pads_the_vocabulary_and_comes_back(tmp_path):
    from safetensors.torch import load_file, save_file

    whole = {
        key: value.float()
        for key, value in spelled("hf", config_of(context(NEOX)), "gpt_neox.").items()
    }
    (tmp_path / "hf").mkdir()
    save_file(whole, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(NEOX))
    there, back = tmp_path / "neox", tmp_path / "back"
    bioinit.convert(tmp_path / "hf", there, "neox", partitions=2)
    said = yaml.safe_load((there / "configs" / "neox.yml").read_text())
    assert said["model_parallel_size"] == 2  # 29 rows become 30, so that each half has 15
    bioinit.convert(there, back, "hf", set={"vocab_size": 29})
    again = load_file(back / "model.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    with pytest.raises(ConfigError, match=r"NeMo 2 cannot"):
        bioinit.convert(tmp_path / "hf", tmp_path / "nemo", "nemo2")
