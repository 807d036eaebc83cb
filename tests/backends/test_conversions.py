"""Names from transformers' own tables, held against what from_pretrained loads."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402
from transformers import core_model_loading as library  # noqa: E402

import bioinit  # noqa: E402
from bioinit.backends import transformers as backend  # noqa: E402
from bioinit.backends.transformers import conversions  # noqa: E402
from bioinit.rules import Rule  # noqa: E402
from tests.simulate import execute  # noqa: E402

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
SMALL_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, "n_positions": 16}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}

MODELS = {
    "MixtralForCausalLM": lambda t: t.MixtralConfig(**TEXT, num_local_experts=4),
    "Qwen2MoeForCausalLM": lambda t: t.Qwen2MoeConfig(
        **TEXT, **MOE, num_experts=4, shared_expert_intermediate_size=20
    ),
    "DeepseekV3ForCausalLM": lambda t: t.DeepseekV3Config(
        **TEXT | {"num_hidden_layers": 3},
        **MOE,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    ),
    "GPT2LMHeadModel": lambda t: t.GPT2Config(**SMALL_GPT2, **ENDS),
    "T5ForConditionalGeneration": lambda t: t.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=32
    ),
    "ViTForImageClassification": lambda t: t.ViTConfig(**VISION),
    "Wav2Vec2ForCTC": lambda t: t.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=32,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    ),
    "GemmaForCausalLM": lambda t: t.GemmaConfig(**TEXT, head_dim=4),
    "Phi3ForCausalLM": lambda t: t.Phi3Config(**TEXT),
    "LlavaForConditionalGeneration": lambda t: t.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=5,
    ),
    "ModernBertForMaskedLM": lambda t: t.ModernBertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=32,
        pad_token_id=0,
        cls_token_id=3,
        sep_token_id=4,
        **ENDS,
    ),
}


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def written(folder: Path, name: str) -> nn.Module:
    """A model with different values everywhere, saved by transformers."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(MODELS[name](transformers))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    model.save_pretrained(folder)
    return model


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def on_meta(name: str) -> nn.Module:
    return backend.build(lambda: getattr(transformers, name)(MODELS[name](transformers)))


def shapes(stored):
    return {key: tuple(tensor.shape) for key, tensor in stored.items()}


def assert_same(model: nn.Module, found: dict[str, torch.Tensor], expected: nn.Module) -> None:
    wanted = expected.state_dict()
    aliases: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(tensor), []).append(key)
    wrong = [
        keys for keys in aliases.values() if not any(torch.equal(found[k], wanted[k]) for k in keys)
    ]
    assert not wrong


@pytest.mark.parametrize("name", MODELS)
def test_every_element_lands_where_from_pretrained_puts_it(tmp_path, name):
    expected = written(tmp_path, name)
    stored, model = stored_in(tmp_path), on_meta(name)
    names = backend.names(model, shapes(stored))
    assert not names.conversions, "a conversion of these architectures is no longer a view"
    assert_same(model, execute(names, stored, expected.state_dict()), expected)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "ViTForImageClassification"])
def test_the_tables_lead_back_to_the_stored_tensors(tmp_path, name):
    expected = written(tmp_path, name)
    stored, model = stored_in(tmp_path), on_meta(name)
    names = backend.names(model, shapes(stored))
    back = execute(
        names._replace(disk=names.memory, memory=names.disk), expected.state_dict(), stored
    )
    assert all(torch.equal(back[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlavaForConditionalGeneration"])
def test_the_transforms_to_undo_are_those_that_from_pretrained_remembers(tmp_path, name):
    written(tmp_path, name)
    reference = getattr(transformers, name).from_pretrained(tmp_path)
    model = on_meta(name)
    backend.remember(model, stored_in(tmp_path))
    assert list(map(str, model._weight_conversions)) == list(
        map(str, reference._weight_conversions)
    )


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "bin_sharded"])
@pytest.mark.parametrize("family", ["bert", "esm2", "gpt_neox", "llama", "mixtral"])
def test_checkpoints_of_both_transformers_generations_load_alike(fixtures_dir, family, layout):
    folder = fixtures_dir / "hf" / family / layout
    stored = stored_in(folder)
    for file in sorted(folder.glob("*.bin")):
        stored |= torch.load(file, weights_only=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    expected = cls.from_pretrained(folder)
    model = backend.build(lambda: cls(config))
    names = backend.names(model, shapes(stored))
    assert_same(model, execute(names, stored, expected.state_dict()), expected)


def test_experts_are_one_rule_for_all_layers_not_one_per_tensor(tmp_path):
    written(tmp_path, "MixtralForCausalLM")
    stored = stored_in(tmp_path)
    names = backend.names(on_meta("MixtralForCausalLM"), shapes(stored))
    assert len(names.disk.rules) < len(stored) / 2
    fused = [r for r in names.memory.rules if r.pattern_text.endswith("gate_up_proj")]
    assert [r.pattern_text for r in fused] == ["model.layers.*.mlp.experts.gate_up_proj"]


def test_a_missing_expert_leaves_its_place_empty_and_moves_no_other(tmp_path):
    expected = written(tmp_path, "MixtralForCausalLM").state_dict()
    stored = stored_in(tmp_path)
    del stored["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    names = backend.names(on_meta("MixtralForCausalLM"), shapes(stored))
    assert not names.conversions
    key = "model.layers.1.mlp.experts.down_proj"
    found = execute(names, stored, expected)
    assert found[key][2].isnan().all()
    for expert in (0, 1, 3):
        assert torch.equal(found[key][expert], expected[key][expert])


def test_layouts_of_memory_that_were_stored_as_they_are_stay_as_they_are(tmp_path):
    model = written(tmp_path / "one", "MixtralForCausalLM")
    model.save_pretrained(tmp_path / "two", save_original_format=False)
    stored = stored_in(tmp_path / "two")
    names = backend.names(on_meta("MixtralForCausalLM"), shapes(stored))
    assert_same(model, execute(names, stored, model.state_dict()), model)


def test_a_body_saved_alone_is_renamed_like_the_whole_model(tmp_path):
    expected = written(tmp_path / "whole", "MixtralForCausalLM")
    expected.model.save_pretrained(tmp_path / "body")
    stored = stored_in(tmp_path / "body")
    found = execute(
        backend.names(on_meta("MixtralForCausalLM"), shapes(stored)), stored, expected.state_dict()
    )
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(found[key], expected.state_dict()[key])


def test_tensors_that_are_not_counted_from_zero_are_taken_in_order(tmp_path):
    model = written(tmp_path, "MixtralForCausalLM")

    def shifted(key: str) -> str:
        before, dot, after = key.partition(".experts.")
        return f"{before}{dot}{int(after[0]) + 1}{after[1:]}" if dot else key

    stored = {shifted(key): tensor for key, tensor in stored_in(tmp_path).items()}
    names = backend.names(on_meta("MixtralForCausalLM"), shapes(stored))
    assert not names.conversions
    assert_same(model, execute(names, stored, model.state_dict()), model)


def test_a_conversion_outside_of_any_layer_is_a_view_too(monkeypatch):
    original = conversions._fresh
    special = library.WeightConverter(
        ["wte.old", "wte.new"], "model.embed_tokens.weight", [library.Concatenate(0)]
    )
    monkeypatch.setattr(conversions, "_fresh", lambda model: [special, *original(model)])
    model = on_meta("GemmaForCausalLM")
    stored = {"wte.old": torch.arange(480.0).view(30, 16), "wte.new": torch.ones(2, 16)}
    names = backend.names(model, shapes(stored))
    assert not names.conversions
    live = {"model.embed_tokens.weight": torch.empty(32, 16)}
    found = execute(names, stored, live)["model.embed_tokens.weight"]
    assert torch.equal(found, torch.cat([stored["wte.old"], stored["wte.new"]]))


def test_a_conversion_that_is_no_view_is_run_by_transformers(tmp_path, monkeypatch):
    expected = written(tmp_path, "MixtralForCausalLM")
    stored = stored_in(tmp_path)

    def unknown(*args):
        raise conversions.Inexpressible("for the test")

    monkeypatch.setattr(conversions, "run", unknown)
    names = backend.names(on_meta("MixtralForCausalLM"), shapes(stored))
    assert {t.rpartition(".")[2] for c in names.conversions for t in c.targets} == {
        "gate_up_proj",
        "down_proj",
    }
    assert all("MergeModulelist" in c.text and "for the test" in c.text for c in names.conversions)
    assert_same(expected, execute(names, stored, expected.state_dict()), expected)


def test_a_rule_that_tells_layers_apart_is_not_generalized(tmp_path, monkeypatch):
    from transformers.core_model_loading import WeightRenaming

    original = conversions._fresh
    special = WeightRenaming(r"layers\.1\.strange_norm", "layers.1.input_layernorm")
    monkeypatch.setattr(conversions, "_fresh", lambda model: [special, *original(model)])
    model = on_meta("GemmaForCausalLM")
    stored = {f"model.layers.{i}.strange_norm.weight": (16,) for i in range(2)} | {
        "model.norm.weight": (16,)
    }
    rules = {r.pattern_text: r for r in backend.names(model, stored).disk.rules}
    assert rules["model.layers.1.strange_norm.weight"].parts[0].to == (
        "model.layers.1.input_layernorm.weight"
    )
    assert rules["model.layers.0.strange_norm.weight"].parts[0].to == (
        "model.layers.0.strange_norm.weight"
    )


def test_every_rule_says_what_it_does(tmp_path):
    written(tmp_path, "MixtralForCausalLM")
    names = backend.names(on_meta("MixtralForCausalLM"), shapes(stored_in(tmp_path)))
    texts = {rule.text for rule in names.memory.rules if isinstance(rule, Rule)}
    assert any("MergeModulelist(dim=0), Concatenate(dim=1)" in t and "views" in t for t in texts)


@pytest.fixture
def never_a_view(monkeypatch):
    """Every conversion is run on tensors, as those are that compute new values."""

    def unknown(*args):
        raise conversions.Inexpressible("for the test")

    monkeypatch.setattr(conversions, "run", unknown)


def record_for(folder, *overrides):
    return bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={folder}", *overrides])


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_conversion_that_is_run_reads_stored_names_whatever_is_in_front(
    tmp_path, never_a_view, prefix
):
    expected = written(tmp_path / "plain", "MixtralForCausalLM")
    stored = stored_in(tmp_path / "plain")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text((tmp_path / "plain/config.json").read_text())
    save_file({prefix + k: v for k, v in stored.items()}, tmp_path / "in" / "model.safetensors")
    done = bioinit.initialize(record_for(tmp_path / "in"))
    assert any(c.rule.startswith("run MergeModulelist") for c in done.report.claims)
    assert done.plan.bytes_to_read == sum(t.numel() * t.itemsize for t in stored.values())
    state = expected.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in done.model.state_dict().items())


@pytest.mark.parametrize("field", ["intermediate_size=20", "num_local_experts=5"])
def test_a_conversion_that_would_make_another_shape_is_a_problem_of_the_plan(
    tmp_path, never_a_view, field
):
    written(tmp_path, "MixtralForCausalLM")
    overrides = [f"model.{field}", "init.on_conflict=recipe"]
    plan = bioinit.plan(record_for(tmp_path, *overrides))
    kinds = {p.key.rpartition(".")[2]: p.kind for p in plan.problems}
    assert kinds["gate_up_proj"] == kinds["down_proj"] == "mismatch"
    plan = bioinit.plan(record_for(tmp_path, *overrides, "init.on_mismatch=init"))
    assert not [p for p in plan.problems if "_proj" in p.key]


def test_a_conversion_that_fails_on_such_tensors_is_a_problem_of_the_plan(tmp_path, never_a_view):
    written(tmp_path, "MixtralForCausalLM")
    stored = stored_in(tmp_path)
    key = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    save_file(stored | {key: torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    [problem] = bioinit.plan(record_for(tmp_path)).problems
    assert problem.kind == "mismatch" and problem.key == "model.layers.1.mlp.experts.down_proj"
    assert "MergeModulelist" in problem.message


def test_a_conversion_with_several_targets_is_run_once(tmp_path, never_a_view, monkeypatch):
    original = conversions._fresh
    fused = library.WeightConverter(
        "mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [library.Chunk(0)]
    )
    monkeypatch.setattr(conversions, "_fresh", lambda model: [fused, *original(model)])
    ran = []
    convert = library.WeightConverter.convert
    monkeypatch.setattr(
        library.WeightConverter, "convert", lambda self, live, **k: ran.append(live)
        or convert(self, live, **k),
    )  # fmt: skip
    expected = written(tmp_path, "GemmaForCausalLM").state_dict()
    stored = dict(expected)
    for i in range(2):
        gate, up = (stored.pop(f"model.layers.{i}.mlp.{n}_proj.weight") for n in ("gate", "up"))
        stored[f"model.layers.{i}.mlp.gate_up.weight"] = torch.cat([gate, up])
    stored.pop("lm_head.weight", None)
    save_file(stored, tmp_path / "model.safetensors")
    ran.clear()
    done = bioinit.initialize(record_for(tmp_path))
    assert len(ran) == 4, "once on meta for the plan and once for the values, per layer"
    size = sum(t.numel() * t.itemsize for t in stored.values())
    assert done.report.bytes_read == done.plan.bytes_to_read == size
    assert all(torch.equal(t, expected[k]) for k, t in done.model.state_dict().items())
