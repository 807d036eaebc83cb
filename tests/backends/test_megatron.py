"""Models of megatron-core: built on meta, initialized in place, equal to transformers on a CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bioinit.backends import megatron
from bioinit.errors import ConfigError
from bioinit.load.initial import Watching, own_random_state

pytest.importorskip("megatron", reason="megatron-core is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Its modules warn of their own ways, in forward too.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron")

LAYERS, HIDDEN, HEADS, GROUPS, CHANNELS, FFN, VOCAB, LENGTH = 2, 32, 4, 2, 16, 48, 37, 64
EXPERTS = 4
NO_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
LLAMA = NO_DROPOUT | {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "activation_func": "silu",
}
MIXTRAL = LLAMA | {"num_moe_experts": EXPERTS, "moe_router_topk": 2}
GEMMA = LLAMA | {"activation_func": "openai_gelu", "layernorm_zero_centered_gamma": True}
NEMOTRON = LLAMA | {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "gated_linear_unit": False,
    "activation_func": "squared_relu",
}
BERT = NO_DROPOUT | {"activation_func": "gelu", "layernorm_epsilon": 1e-12}
HF = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": CHANNELS,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
SCALING = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}

Make = Callable[[], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Whatever world the tests make is gone after them."""
    yield
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def config(**fields: Any) -> SimpleNamespace:
    """What a family's config would hold."""
    given = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "kv_channels": CHANNELS,
        "layernorm_epsilon": 1e-5,
        "vocab_size": VOCAB,
        "seq_length": LENGTH,
        "share_embeddings_and_output_weights": False,
    }
    return SimpleNamespace(**(given | fields))


def gpt(fields: Mapping[str, Any] = LLAMA, tied: bool = False, **kwargs: Any) -> Make:
    ours = config(share_embeddings_and_output_weights=tied)
    return lambda: megatron.gpt(ours, fields, **{"position_embedding_type": "rope"} | kwargs)


def bert(tied: bool = True, **kwargs: Any) -> Make:
    ours = config(kv_channels=HIDDEN // HEADS, share_embeddings_and_output_weights=tied)
    del ours.num_query_groups, ours.layernorm_epsilon
    return lambda: megatron.bert(
        ours, BERT, **{"num_tokentypes": 2, "add_binary_head": True} | kwargs
    )


def with_memory(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """As ``load`` would do it: memory for everything, attributes kept; left-over bytes are 7."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                real = nn.Parameter(torch.full(parameter.shape, 7.0, dtype=dtype))
                vars(real).update(vars(parameter))
                module._parameters[name] = real
    return model


def initialized(
    make: Make,
    new: Collection[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The parameters after the initializer ran for ``new`` (None: all), and what was written."""
    model = with_memory(megatron.BACKEND.build(make), dtype)
    live = {key: p.detach() for key, p in model.named_parameters()}
    loaded = frozenset(live) - frozenset(live if new is None else new)
    watch = Watching(live, loaded, seed)
    with torch.no_grad(), own_random_state(torch.device("cpu")), watch:
        given = megatron.BACKEND.initialize(model, make, loaded, watch)
    assert not given
    return live, watch.written


# --- the same logits as transformers ---


def randomized(model: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model shows in its logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def holding(make: Make, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model = with_memory(megatron.BACKEND.build(make))
    model.load_state_dict(state, strict=True)
    return model.eval()


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.cat([t.unflatten(0, (groups, -1)) for t in (q, k, v)], dim=1).flatten(0, 1)


def decoder_state(hf: Mapping[str, torch.Tensor], groups: int = GROUPS) -> dict[str, torch.Tensor]:
    """What a decoder of transformers holds, under Megatron's names and in its layout."""
    state = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"]}
    norms = {"model.norm": "decoder.final_layernorm"}
    for layer in range(LAYERS):
        old, new = f"model.layers.{layer}", f"decoder.layers.{layer}"
        norms[f"{old}.input_layernorm"] = f"{new}.input_layernorm"
        norms[f"{old}.post_attention_layernorm"] = f"{new}.pre_mlp_layernorm"
        qkv = (hf[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv")
        state[f"{new}.self_attention.linear_qkv.weight"] = fused(*qkv, groups)
        state[f"{new}.self_attention.linear_proj.weight"] = hf[f"{old}.self_attn.o_proj.weight"]
        old, new = f"{old}.mlp", f"{new}.mlp"
        if f"{old}.gate.weight" in hf:
            state[f"{new}.router.weight"] = hf[f"{old}.gate.weight"]
            for expert in range(EXPERTS):
                to = f"{new}.experts.local_experts.{expert}"
                state[f"{to}.linear_fc1.weight"] = hf[f"{old}.experts.gate_up_proj"][expert]
                state[f"{to}.linear_fc2.weight"] = hf[f"{old}.experts.down_proj"][expert]
            continue
        up = [hf[key] for part in ("gate", "up") if (key := f"{old}.{part}_proj.weight") in hf]
        state[f"{new}.linear_fc1.weight"] = torch.cat(up)
        state[f"{new}.linear_fc2.weight"] = hf[f"{old}.down_proj.weight"]
    for old, new in norms.items():
        state |= {f"{new}.{p}": hf[f"{old}.{p}"] for p in ("weight", "bias") if f"{old}.{p}" in hf}
    return state


def hf_model(name: str, **fields: Any) -> nn.Module:
    hf_config = getattr(transformers, f"{name}Config")(**HF | fields)
    return randomized(getattr(transformers, f"{name}ForCausalLM")(hf_config))


IDS = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "hf_fields", "fields", "kwargs"),
    [
        ("Llama", {}, LLAMA, {}),
        ("Llama", {"rope_theta": 500.0}, LLAMA, {"rotary_base": 500.0}),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "llama3", **SCALING}, "tie_word_embeddings": True},
            LLAMA,
            {"rope_scaling": SCALING, "share_embeddings_and_output_weights": True},
        ),
        ("Mistral", {"sliding_window": None}, LLAMA, {}),
        # A window counts what is before a token here, and the token as well there.
        ("Mistral", {"sliding_window": 4}, LLAMA | {"window_size": (3, 0)}, {}),
        (
            "Mixtral",
            {"sliding_window": None, "num_local_experts": EXPERTS, "rope_theta": 1e4},
            MIXTRAL,
            {},
        ),
        (
            "Gemma",
            {"tie_word_embeddings": True},
            GEMMA,
            {"embedding_scale": HIDDEN**0.5, "share_embeddings_and_output_weights": True},
        ),
        (
            "Nemotron",
            {"partial_rotary_factor": 0.5, "norm_eps": 1e-5},
            NEMOTRON,
            {"rotary_percent": 0.5},
        ),
    ],
    ids=["llama", "llama-theta", "llama3.1-tied", "mistral", "mistral-window", "mixtral", "gemma",
         "nemotron"],
)  # fmt: skip
def test_a_decoder_gives_the_logits_of_transformers(name, hf_fields, fields, kwargs):
    theirs = hf_model(name, **hf_fields)
    stored = theirs.state_dict()
    state = decoder_state(stored)
    if not hf_fields.get("tie_word_embeddings"):
        state["output_layer.weight"] = stored["lm_head.weight"]
    ours = holding(gpt(fields, **kwargs), state)
    places = torch.arange(IDS.shape[1]).expand(IDS.shape)
    # Some activations of Megatron are compiled, which takes longer than all else here.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = ours(IDS, places, None)
    torch.testing.assert_close(logits, theirs(IDS).logits, atol=1e-4, rtol=0)
    assert logits.std() > 0.1


@pytest.mark.parametrize("groups", [1, HEADS])
def test_query_groups_are_shared_as_in_transformers(groups):
    theirs = hf_model("Llama", num_key_value_heads=groups)
    stored = theirs.state_dict()
    state = decoder_state(stored, groups) | {"output_layer.weight": stored["lm_head.weight"]}
    ours = holding(gpt(LLAMA | {"num_query_groups": groups}), state)
    places = torch.arange(IDS.shape[1]).expand(IDS.shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS, places, None), theirs(IDS).logits, atol=1e-4, rtol=0)


def bert_state(hf: Mapping[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    pairs = {
        "bert.encoder.ln": "encoder.final_layernorm",
        "bert.pooler.dense": "pooler.dense",
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
        "cls.seq_relationship": "binary_head",
    }
    state = {
        f"embedding.{new}.weight": hf[f"bert.embeddings.{old}.weight"]
        for old, new in (
            ("word_embeddings", "word_embeddings"),
            ("position_embeddings", "position_embeddings"),
            ("token_type_embeddings", "tokentype_embeddings"),
        )
    }
    for layer in range(LAYERS):
        old, new = f"bert.encoder.layer.{layer}", f"encoder.layers.{layer}"
        pairs |= {
            f"{old}.attention.ln": f"{new}.input_layernorm",
            f"{old}.attention.output.dense": f"{new}.self_attention.linear_proj",
            f"{old}.ln": f"{new}.pre_mlp_layernorm",
            f"{old}.intermediate.dense": f"{new}.mlp.linear_fc1",
            f"{old}.output.dense": f"{new}.mlp.linear_fc2",
        }
        for part in ("weight", "bias"):
            qkv = (hf[f"{old}.attention.self.{n}.{part}"] for n in ("query", "key", "value"))
            state[f"{new}.self_attention.linear_qkv.{part}"] = fused(*qkv, HEADS)
    for old, new in pairs.items():
        state |= {f"{new}.{part}": hf[f"{old}.{part}"] for part in ("weight", "bias")}
    # Without a tie, transformers has two biases and uses this one.
    state["output_layer.bias"] = hf["cls.predictions.decoder.bias"]
    if not tied:
        state["output_layer.weight"] = hf["cls.predictions.decoder.weight"]
    return state


@pytest.mark.parametrize("tied", [True, False])
def test_a_bert_gives_the_logits_of_transformers(tied):
    fields = {key: HF[key] for key in HF if key not in ("head_dim", "rms_norm_eps")}
    hf_config = transformers.MegatronBertConfig(
        **fields, layer_norm_eps=1e-12, tie_word_embeddings=tied
    )
    theirs = randomized(transformers.MegatronBertForPreTraining(hf_config))
    ours = holding(bert(tied), bert_state(theirs.state_dict(), tied))
    seen = torch.ones_like(IDS)
    seen[1, 6:] = 0
    types = torch.zeros_like(IDS)
    types[:, 5:] = 1
    with torch.no_grad():
        words, order = ours(IDS, seen, tokentype_ids=types)
        wanted = theirs(IDS, attention_mask=seen, token_type_ids=types)
    at = seen.bool()
    torch.testing.assert_close(words[at], wanted.prediction_logits[at], atol=1e-4, rtol=0)
    torch.testing.assert_close(order, wanted.seq_relationship_logits, atol=1e-4, rtol=0)


def test_a_model_on_a_cpu_trains():
    model = with_memory(megatron.BACKEND.build(gpt(MIXTRAL | {"attention_dropout": 0.1})))
    randomized(model).train()
    places = torch.arange(IDS.shape[1]).expand(IDS.shape)
    model(IDS, places, None, labels=IDS).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- constructing and initializing ---


def test_everything_is_on_meta_and_bears_megatrons_marks():
    model = megatron.BACKEND.build(gpt())
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    row_parallel = model.decoder.layers[0].self_attention.linear_proj.weight
    assert row_parallel.tensor_model_parallel and row_parallel.partition_dim == 1


def test_building_takes_no_memory_for_weights_and_no_random_numbers():
    before = torch.get_rng_state()
    huge = {"hidden_size": 2**17, "ffn_hidden_size": 2**19, "num_layers": 1}  # 1 TB
    megatron.BACKEND.build(gpt(LLAMA | huge))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_parameter_gets_megatrons_first_value():
    live, written = initialized(gpt(LLAMA | {"add_bias_linear": True, "init_method_std": 0.1}))
    assert written == set(live)
    for key, value in live.items():
        if key.endswith("layernorm.weight"):
            assert (value == 1).all(), key
        elif key.endswith("bias"):
            assert (value == 0).all(), key
        else:
            inner = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.1 / (2 * LAYERS) ** 0.5 if inner else 0.1
            assert abs(value.std() / std - 1) < 0.1, key


def test_a_zero_centered_norm_starts_at_zero():
    live, _ = initialized(gpt(NEMOTRON))
    assert not live["decoder.layers.0.input_layernorm.weight"].any()
    assert not live["decoder.final_layernorm.weight"].any()


@pytest.mark.parametrize("make", [gpt(MIXTRAL), bert()], ids=["mixtral", "bert"])
def test_a_first_value_depends_on_the_seed_and_the_name_alone(make):
    every, _ = initialized(make)
    random = [key for key, value in every.items() if value.std() > 0]
    starts = {tuple(every[key].flatten()[:8].tolist()) for key in random}
    assert len(starts) == len(random)
    for key in random:
        alone, written = initialized(make, {key})
        assert written == {key}
        assert torch.equal(alone[key], every[key])
        assert all((value == 7).all() for other, value in alone.items() if other != key)
    other_seed, _ = initialized(make, seed=1)
    assert not torch.equal(other_seed[random[0]], every[random[0]])


def test_a_first_value_in_bfloat16_is_the_rounded_one():
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    whole, _ = initialized(gpt(), {key})
    rounded, _ = initialized(gpt(), {key}, dtype=torch.bfloat16)
    assert torch.equal(rounded[key], whole[key].bfloat16())


def test_nothing_is_constructed_when_everything_is_loaded():
    model = with_memory(megatron.BACKEND.build(gpt()))
    loaded = [key for key, _ in model.named_parameters()]

    def never() -> nn.Module:
        raise AssertionError

    watch = Watching({}, (), 0)
    assert megatron.BACKEND.initialize(model, never, loaded, watch) == {}


def test_a_constructor_that_gives_another_model_the_second_time_is_refused():
    model = with_memory(megatron.BACKEND.build(gpt()))
    other = gpt(LLAMA | {"ffn_hidden_size": FFN + 1})
    with pytest.raises(ConfigError, match="not repeatable"):
        megatron.BACKEND.initialize(model, other, (), Watching({}, (), 0))


def test_the_rule_that_initializes_is_named():
    model = megatron.BACKEND.build(gpt())
    said = megatron.BACKEND.describe_init(model, "decoder.layers.0.mlp.linear_fc2.weight")
    assert said == "the constructor of GPTModel (RowParallelLinear)"


# --- what is stored ---


def stored_keys(model: nn.Module) -> set[str]:
    return {part.key for part in model.sharded_state_dict().values()}


def test_experts_store_the_norm_before_them_under_its_own_name():
    keys = stored_keys(megatron.BACKEND.build(gpt(MIXTRAL)))
    assert "decoder.layers.pre_mlp_layernorm.weight" in keys
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" not in keys
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys


def test_a_dense_model_stores_its_norms_where_transformer_engine_fuses_them():
    keys = stored_keys(megatron.BACKEND.build(gpt()))
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys
    assert not any("pre_mlp_layernorm" in key for key in keys)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_megatron_opens_what_nemo_wrote_in_a_model_that_was_built_here(fixtures_dir):
    from megatron.core import dist_checkpointing

    hf = json.loads((fixtures_dir / "hf/llama/safetensors/config.json").read_text())
    ours = config(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"],
        layernorm_epsilon=hf["rms_norm_eps"],
        vocab_size=hf["vocab_size"],
    )
    model = megatron.BACKEND.build(
        lambda: megatron.gpt(ours, LLAMA, position_embedding_type="rope")
    )
    wanted = with_memory(model).sharded_state_dict(prefix="module.")
    weights = fixtures_dir / "nemo2/llama_tp1/weights"
    found = dist_checkpointing.load(wanted, str(weights))
    model.load_state_dict({key.removeprefix("module."): found[key] for key in wanted}, strict=True)
    io = {
        key: torch.from_numpy(v) for key, v in numpy.load(fixtures_dir / "hf/llama/io.npz").items()
    }
    places = torch.arange(io["input_ids"].shape[1]).expand(io["input_ids"].shape)
    with torch.no_grad():
        logits = model.eval()(io["input_ids"], places, None)
    at = io["attention_mask"].bool()
    torch.testing.assert_close(logits[at], io["logits"][at], atol=1e-5, rtol=0)


def test_it_writes_no_files_of_its_own(tmp_path):
    model = megatron.BACKEND.build(gpt())
    with pytest.raises(ConfigError, match=r"GPTModel.*no tables"):
        megatron.BACKEND.save(model, tmp_path, 10**9)


# --- what cannot be built ---


def test_a_field_that_megatron_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'gated_linear_unit'"):
        megatron.BACKEND.build(gpt(LLAMA | {"gated_linear_units": True}))


def test_values_that_megatron_refuses_are_a_config_error():
    with pytest.raises(ConfigError, match="megatron-core cannot build this model"):
        megatron.BACKEND.build(gpt(MIXTRAL | {"moe_router_topk": 1}))


def test_an_activation_of_another_name_is_refused():
    with pytest.raises(ConfigError, match="no activation 'swish2'"):
        megatron.BACKEND.build(gpt(LLAMA | {"activation_func": "swish2"}))


def test_a_bert_without_plain_layer_norms_is_refused():
    ours = config(kv_channels=HIDDEN // HEADS)
    with pytest.raises(ConfigError, match="layer norms with a plain weight"):
        megatron.BACKEND.build(lambda: megatron.bert(ours, BERT | {"normalization": "RMSNorm"}))


def test_megatron_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'bioinit\[megatron\]'"):
        megatron.BACKEND.build(gpt())


@pytest.mark.parametrize("axis", ["tp", "pp", "ep", "cp"])
def test_a_mesh_that_is_not_as_the_groups_are_is_refused(monkeypatch, axis):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match=rf"says {axis}: 2, .* exist already, with {axis} 1"):
        megatron.require_world({axis: 2})


@pytest.mark.parametrize(
    ("axis", "fields", "said"),
    [
        ("tensor_model_parallel", {"num_attention_heads": 3}, "num_attention_heads=3 .* for tp"),
        ("tensor_model_parallel", {"ffn_hidden_size": 9}, "ffn_hidden_size=9 .* for tp"),
        ("pipeline_model_parallel", {"num_layers": 3}, "num_layers=3 .* for pp"),
        ("expert_model_parallel", {"num_moe_experts": 3}, "num_moe_experts=3 .* for ep"),
        ("expert_model_parallel", {}, "has ep: 2, and this model has no experts"),
        ("context_parallel", {}, "has cp: 2, and only Transformer Engine"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_by_its_name(monkeypatch, axis, fields, said):
    from megatron.core import parallel_state

    megatron.BACKEND.build(gpt())
    monkeypatch.setattr(parallel_state, f"get_{axis}_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=said):
        megatron.BACKEND.build(gpt(LLAMA | fields))


def test_processes_that_nobody_has_told_megatron_of_are_refused(monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match="4 processes"):
        megatron.BACKEND.build(gpt())


def test_a_process_that_has_not_met_its_peers_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="WORLD_SIZE=8"):
        megatron.BACKEND.build(gpt())


def test_rotary_positions_are_computed_where_the_hidden_states_are():
    model = megatron.BACKEND.build(gpt())
    rotary = model.rotary_pos_emb
    assert rotary(5).device.type == "cpu"
    hidden = torch.empty(5, 1, HIDDEN, device="meta")
    length = rotary.get_rotary_seq_len(None, model.decoder, hidden, model.config, None)
    assert rotary(length).device.type == "meta"


def test_the_environment_is_as_it_was():
    megatron.BACKEND.build(gpt())
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_importing_the_backend_does_not_import_megatron():
    code = "import bioinit.backends.megatron, sys; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
