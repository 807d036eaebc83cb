"""Mixtral: experts in every spelling that they have on disk and in memory."""

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

import bioinit  # noqa: E402
from bioinit.contexts import find  # noqa: E402
from bioinit.contexts.protocol import Context  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402
from bioinit.families.mixtral import FAMILY, GPT, MixtralConfig  # noqa: E402
from bioinit.mapping import Mapping, Names  # noqa: E402
from bioinit.merge import merge  # noqa: E402
from bioinit.record import build, make_record  # noqa: E402
from bioinit.storage import Folder  # noqa: E402
from tests.simulate import execute  # noqa: E402

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 10,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.003,
    "router_jitter_noise": 0.125,
    "max_position_embeddings": 20,
    "sliding_window": 12,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.25,
    "initializer_range": 0.03,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "output_router_logits": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "transformers_version": "5.23.0",
}
PLAIN = MIXTRAL | {
    "head_dim": 4,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "router_jitter_noise": 0.0,
    "num_key_value_heads": 4,
}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"grouped": MIXTRAL, "tied": PLAIN}


def context(data: dict) -> Context:
    return Context("hf", "config.json", data, data.get("model_type"))


def config_of(saved: Context, shapes=None, **written) -> MixtralConfig:
    fields = FAMILY.read_fields(saved, shapes or {}).fields
    result = merge(make_record(MixtralConfig, written, {}, at="model"), fields, {})
    assert not result.problems, [str(p) for p in result.problems]
    return build(result.record, at="model")


CONFIG = config_of(context(MIXTRAL))
EXPERTS, FFN, HIDDEN = 3, 10, 16


def table(dialect: str, config: MixtralConfig = CONFIG, body: str = "") -> Mapping:
    return Mapping(FAMILY.dialects[dialect].rules(config, {}, body))


def arange(shapes: dict) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, all values different."""
    first, made = 0, {}
    for key, shape in shapes.items():
        count = int(np.prod(shape))
        made[key] = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
    return made


def spelled(dialect: str, config: MixtralConfig = CONFIG, body: str = "") -> dict:
    canonical = {key: each.shape for key, each in FAMILY.tensors(config).items()}
    return arange(table(dialect, config, body).spelled_out(canonical))


def there(source: dict, frm: Mapping, to: Mapping, like: dict) -> dict[str, torch.Tensor]:
    return execute(Names(frm, to), source, like)


@pytest.mark.parametrize("layout", ["safetensors", "bin_sharded"])
def test_files_give_the_logits_of_the_writer(fixtures_dir, layout):
    folder = fixtures_dir / "hf" / "mixtral"
    io = np.load(folder / "io.npz")
    asked = [f"model.initial_ckpt_path={folder / layout}"]
    model = bioinit.initialize(bioinit.compose("mixtral/causal_lm", asked)).model.eval()
    given = {name: torch.from_numpy(io[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert np.abs(model(**given).logits.numpy() - io["logits"]).max() < 1e-5


@pytest.mark.parametrize("body", ["model.", ""])
def test_what_is_written_for_transformers_names_each_expert(body):
    names = spelled("hf", body=body)
    at = f"{body}layers.1.block_sparse_moe"
    assert names[f"{at}.gate.weight"].shape == (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for name, shape in (("w1", (FFN, HIDDEN)), ("w3", (FFN, HIDDEN)), ("w2", (HIDDEN, FFN))):
            assert names[f"{at}.experts.{expert}.{name}.weight"].shape == shape
    assert not any("gate_up_proj" in key or ".mlp." in key for key in names)


def test_transformers_holds_what_is_stored_as_the_tables_say(tmp_path):
    from safetensors.torch import load_file

    model = FAMILY.build(CONFIG)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == spelled("hf", body="model.").keys()
    live = model.state_dict()
    names = table("hf", body="model.")
    made = there(stored, names, names, live)
    assert all(torch.equal(made[key], tensor) for key, tensor in live.items())


def in_memory_of_megatron(kind: str, stored: dict) -> dict[str, torch.Tensor]:
    """A layer's experts as a class of megatron-core holds them, from what it stores.

    From ``transformer/moe/experts.py``, and for GroupedMLP as its ``forward`` uses the weights.
    """
    made: dict[str, torch.Tensor] = {}
    for layer in range(2):
        at = f"decoder.layers.{layer}.mlp.experts"
        one = stored["decoder.layers.mlp.experts.experts.linear_fc1.weight"][layer]
        two = stored["decoder.layers.mlp.experts.experts.linear_fc2.weight"][layer]
        for expert in range(EXPERTS):
            first, second = one[expert].clone(), two[expert].clone()
            if kind == "SequentialMLP":
                made[f"{at}.local_experts.{expert}.linear_fc1.weight"] = first
                made[f"{at}.local_experts.{expert}.linear_fc2.weight"] = second
            elif kind == "TEGroupedMLP":
                made[f"{at}.linear_fc1.weight{expert}"] = first
                made[f"{at}.linear_fc2.weight{expert}"] = second
            elif kind == "kept apart":
                gate, up = (half.clone() for half in first.chunk(2))
                made[f"{at}.experts.{expert}.linear_fc1.weight_w"] = gate
                made[f"{at}.experts.{expert}.linear_fc1.weight_v"] = up
                made[f"{at}.experts.{expert}.linear_fc2.weight"] = second
            elif kind == "one by one":
                made[f"{at}.experts.{expert}.linear_fc1.weight"] = first
                made[f"{at}.experts.{expert}.linear_fc2.weight"] = second
        if kind == "GroupedMLP":
            # Declared (H, E * 2F), used as weight1.view(E, H, 2F).
            turned = torch.stack([each.T for each in one])
            made[f"{at}.weight1"] = turned.reshape(HIDDEN, EXPERTS * 2 * FFN)
            made[f"{at}.weight2"] = torch.cat([each.T for each in two])
    return made


KINDS = ["SequentialMLP", "TEGroupedMLP", "GroupedMLP", "kept apart", "one by one"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("front", ["nemo2", "megatron"])
def test_every_way_in_which_megatron_holds_experts_leads_to_the_same(kind, front):
    stored = spelled("nemo2")
    hf = {key: value for key, value in spelled("hf").items() if ".experts." in key}
    held = in_memory_of_megatron(kind, stored)
    expected = there(stored, table("nemo2"), table("hf"), hf)
    assert not any(value.isnan().any() for value in expected.values())
    found = there(held, table(front), table("hf"), hf)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    back = there(hf, table("hf"), table(front), held)
    again = there(back, table(front), table("hf"), hf)
    assert all(torch.equal(again[key], value) for key, value in hf.items())


@pytest.mark.parametrize("kind", ["GroupedMLP", "TEGroupedMLP"])
def test_a_slice_of_held_experts_lands_where_the_whole_would(kind):
    from bioinit.layout import Box, intersect

    held = in_memory_of_megatron(kind, spelled("nemo2"))
    for key, tensor in held.items():
        whole = table("megatron").place(key, (Box.contiguous(tuple(tensor.shape)),))
        rows = tensor.shape[0] // 2
        part = tensor[rows:].clone()
        box = Box((rows, 0), tuple(part.shape), 0, part.stride())
        for placed in table("megatron").place(key, (box,)):
            for other in whole:
                overlap = intersect(other.box, placed.box) if other.key == placed.key else None
                if overlap is not None:
                    expected = torch.as_strided(
                        tensor, overlap.sizes, overlap.source_strides, overlap.source_start
                    )
                    found = torch.as_strided(
                        part, overlap.sizes, overlap.target_strides, overlap.target_start
                    )
                    assert torch.equal(found, expected)


@pytest.mark.parametrize("data", [MIXTRAL, PLAIN], ids=["grouped", "tied"])
@pytest.mark.parametrize("other", ["nemo2", "nemo1", "bridge", "megatron"])
def test_there_and_back_nothing_changes(data, other):
    config = config_of(context(data))
    hf, stored = spelled("hf", config), spelled(other, config)
    ours, theirs = table("hf", config), table(other, config)
    again = there(there(hf, ours, theirs, stored), theirs, ours, hf)
    assert again.keys() == hf.keys()
    assert all(torch.equal(again[key], value) for key, value in hf.items())


def test_what_is_written_for_nemo_is_what_nemo_writes():
    config = config_of(context(MIXTRAL), make_vocab_size_divisible_by=16)
    shapes = {key: tuple(value.shape) for key, value in spelled("nemo2", config).items()}
    assert shapes == {
        "embedding.word_embeddings.weight": (32, HIDDEN),
        "output_layer.weight": (32, HIDDEN),
        "decoder.layers.self_attention.linear_qkv.weight": (2, 48, HIDDEN),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, HIDDEN),
        "decoder.layers.self_attention.linear_proj.weight": (2, HIDDEN, 24),
        "decoder.layers.pre_mlp_layernorm.weight": (2, HIDDEN),
        "decoder.layers.mlp.router.weight": (2, EXPERTS, HIDDEN),
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": (2, EXPERTS, 2 * FFN, HIDDEN),
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": (2, EXPERTS, HIDDEN, FFN),
        "decoder.final_layernorm.weight": (HIDDEN,),
    }


def test_the_norm_before_the_experts_is_read_where_the_local_spec_puts_it():
    names = table("nemo2")
    as_written = names.rule_for("decoder.layers.pre_mlp_layernorm.weight").parts
    local = names.rule_for("decoder.layers.mlp.linear_fc1.layer_norm_weight").parts
    assert as_written == local


def saved_by_nemo(tmp_path, config: MixtralConfig, carried=None) -> Context:
    written = FAMILY.dialects["nemo2"].write(config, carried or {}, ())
    for name, content in written.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = find((Folder.at(tmp_path),))
    assert found is not None and found.dialect == "nemo2" and FAMILY.recognizes(found)
    return found


@pytest.mark.parametrize("data", [MIXTRAL, PLAIN], ids=["grouped", "tied"])
def test_fields_come_back_from_nemos_own_config(data, tmp_path):
    config = config_of(context(data))
    found = saved_by_nemo(tmp_path, config)
    again = config_of(found, {}, architecture=config.architecture)
    again.extra = config.extra  # what only transformers reads has no place there
    assert again == config
    assert found.data["window_size"] == (None if data is PLAIN else [12, 0])
    assert found.data["max_position_embeddings"] == found.data["seq_length"] == 20
    assert found.data["moe_router_pre_softmax"] is False


def test_every_expert_of_every_layer_has_an_extra_state_of_its_own():
    written = FAMILY.dialects["nemo2"].write(CONFIG, {}, ())
    at = "module.decoder.layers.mlp.experts.experts.linear_fc1._extra_state"
    assert sorted(key for key in written.objects if key.startswith(at)) == [
        f"{at}/shard_{layer}.{expert}_2.3" for layer in range(2) for expert in range(EXPERTS)
    ]


def nemo2(**changes) -> Context:
    data = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 10,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "num_moe_experts": 3,
        "vocab_size": 29,
        **changes,
    }
    raw = {"canonical": "nemo.collections.llm.gpt.model.mixtral.MixtralConfig"}
    name = "nemo.collections.llm.gpt.model.mixtral.MixtralConfig8x22B"
    return Context("nemo2", "context/io.json", data, name, raw=raw)


def test_what_a_preset_leaves_out_is_what_its_class_sets_never_what_a_path_is_called():
    silent = nemo2()
    data = {"vocab_size": 29}
    large = config_of(Context("nemo2", "8x7b/context/io.json", data, silent.model, raw=silent.raw))
    assert (large.num_query_groups, large.rotary_base, large.moe_router_topk) == (8, 1e6, 2)
    assert (large.num_layers, large.hidden_size, large.ffn_hidden_size) == (56, 6144, 16384)


def test_the_width_of_experts_may_be_said_apart():
    assert config_of(nemo2(moe_ffn_hidden_size=14)).ffn_hidden_size == 14
    assert config_of(nemo2(moe_ffn_hidden_size=None)).ffn_hidden_size == 10


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("moe_router_pre_softmax", True, "sum to one"),
        ("moe_layer_freq", [0, 1], "every layer"),
        ("moe_layer_freq", 2, "every layer"),
        ("moe_shared_expert_intermediate_size", 8, "every layer"),
        ("moe_router_score_function", "sigmoid", "plain router"),
        ("moe_router_enable_expert_bias", True, "plain router"),
        ("qk_layernorm", True, "no such part"),
        ("window_size", [3, 3], "looks ahead"),
    ],
)
def test_another_mixture_of_experts_is_refused(field, value, what):
    with pytest.raises(ConfigError, match=what) as raised:
        FAMILY.read_fields(nemo2(**{field: value}), {})
    assert field in str(raised.value)


def test_a_model_without_experts_is_another_family():
    raw = {"canonical": "nemo.collections.llm.gpt.model.llama.LlamaConfig"}
    assert not FAMILY.recognizes(Context("nemo2", "io.json", dict(nemo2().data), "x", raw=raw))
    data = {"normalization": "rmsnorm", "activation": "fast-swiglu", "num_moe_experts": None}
    data |= {"position_embedding_type": "rope"}
    assert not FAMILY.recognizes(Context("nemo1", "model_config.yaml", data, None))
    assert FAMILY.recognizes(
        Context("nemo1", "model_config.yaml", data | {"num_moe_experts": 8}, None)
    )


def test_a_token_cannot_go_to_more_experts_than_there_are():
    with pytest.raises(ConfigError, match="moe_router_topk=9"):
        MixtralConfig(moe_router_topk=9)


def loaded(folder, tmp_path):
    """A model started from ``folder``, and what it writes when it is saved."""
    from safetensors.torch import load_file

    record = bioinit.compose("mixtral/causal_lm", [f"model.initial_ckpt_path={folder}"])
    done = bioinit.initialize(record)
    done.save(tmp_path / "saved")
    return done.model, load_file(tmp_path / "saved" / "model.safetensors")


@pytest.mark.parametrize("spelling", ["nemo2", "per expert", "as in memory"])
def test_a_model_is_saved_expert_by_expert_whatever_it_was_loaded_from(spelling, tmp_path):
    from safetensors.torch import save_file

    from tests.writing import write

    config = config_of(context(MIXTRAL))
    body = "model."
    source = {key: value.float() for key, value in spelled("hf", config, body).items()}
    folder = tmp_path / "in"
    folder.mkdir()
    if spelling == "nemo2":
        names = table("nemo2", config)
        stored = there(source, table("hf", config, body), names, spelled("nemo2", config))
        stored = {f"module.{key}": value.float() for key, value in stored.items()}
        write("torch_dist", folder / "weights", stored)
        saved_by_nemo(folder, config)
    else:
        (folder / "config.json").write_text(json.dumps(MIXTRAL))
        if spelling == "as in memory":
            live = FAMILY.build(config).state_dict()
            names = table("hf", config, body)
            source_live = there(source, names, names, live)
            save_file(source_live, folder / "model.safetensors")
        else:
            save_file(source, folder / "model.safetensors")
    model, written = loaded(folder, tmp_path)
    assert written.keys() == source.keys()
    assert all(torch.equal(written[key], value) for key, value in source.items())
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "saved")
    live = model.state_dict()
    assert all(torch.equal(live[key], value) for key, value in again.state_dict().items())


@pytest.fixture
def world():
    """The world of one process that megatron-core's models need is gone after the test."""
    parallel = pytest.importorskip("megatron.core.parallel_state")
    yield
    parallel.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")
@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("data", [MIXTRAL, PLAIN], ids=["window", "tied"])
def test_megatrons_model_computes_what_transformers_does(data, tmp_path):
    # Megatron's router jitters when it is not trained, too.
    data = data | {"head_dim": 4, "intermediate_size": 12, "router_jitter_noise": 0.0}
    data["sliding_window"] = data["sliding_window"] and 5
    config = config_of(context(data))
    torch.manual_seed(3)
    FAMILY.build(config).save_pretrained(tmp_path)
    asked = [f"model.initial_ckpt_path={tmp_path}"]
    theirs = bioinit.initialize(bioinit.compose("mixtral/causal_lm", asked)).model.eval()
    asked.append("model.backend=megatron")
    model = bioinit.initialize(bioinit.compose("mixtral/causal_lm", asked)).model.eval()
    ids = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand_as(ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = model(ids, positions, None)[..., : config.vocab_size]
    assert expected.abs().max() > 0.01
    assert (found - expected).abs().max() < 1e-4


def test_the_tables_of_all_worlds_of_megatron_are_one():
    assert {name: table(name).rules for name in GPT.dialects()} == {
        name: table("nemo2").rules for name in ("nemo2", "nemo1", "bridge", "megatron")
    }


def test_a_conversion_to_nemo_and_back_gives_every_expert_again(fixtures_dir, tmp_path):
    from safetensors.torch import load_file

    source = fixtures_dir / "hf" / "mixtral" / "safetensors"
    bioinit.convert(source, tmp_path / "nemo", "nemo2")
    bioinit.convert(tmp_path / "nemo", tmp_path / "back", "hf")
    again = load_file(tmp_path / "back" / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], value) for key, value in stored.items())
