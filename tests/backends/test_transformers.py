"""A transformers model: built without memory, initialized by its own code, saved as named."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from bioinit import backends  # noqa: E402
from bioinit.backends import transformers as backend  # noqa: E402
from bioinit.errors import ConfigError  # noqa: E402

ESM = {
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "position_embedding_type": "rotary",
}


def esm() -> nn.Module:
    return transformers.EsmForTokenClassification(transformers.EsmConfig(**ESM))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=64,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


class Listener:
    """Seeds every module by its path, as the real watch does by tensor."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def entering(self, path: str) -> None:
        self.paths.append(path)
        torch.manual_seed(len(path) + 1000 * sum(map(ord, path)))

    def stands_for(self, tensor: torch.Tensor, key: str) -> None:
        raise AssertionError("the live model is initialized in place")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def with_memory(make) -> nn.Module:
    """The model with left-over bytes everywhere, ties kept, as loading leaves it."""
    model = backend.build(make)
    for module in model.modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and tensor.is_meta:
                    memory = torch.full(tensor.shape, 7, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    registry[name] = nn.Parameter(memory) if is_parameter else memory
    model.tie_weights()
    return model


def initialized(make, loaded: set[str] | None = None) -> tuple[nn.Module, Listener]:
    model, listener = with_memory(make), Listener()
    left = backend.BACKEND.initialize(model, make, loaded or set(), listener)
    assert left == {}
    return model, listener


def test_building_takes_no_memory_and_ties_what_is_tied():
    model = backend.BACKEND.build(gpt2)
    assert all(tensor.is_meta for tensor in tensors(model).values())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_is_built_as_its_constructor_alone_would_build_it():
    ours, theirs = backend.build(esm), esm()
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert {k: v.shape for k, v in tensors(ours).items()} == {
        k: v.shape for k, v in tensors(theirs).items()
    }


def test_loaded_tensors_keep_their_values_and_the_others_get_real_ones():
    everything = set(tensors(backend.build(esm)))
    model, _ = initialized(esm, everything - {"classifier.weight", "classifier.bias"})
    values = tensors(model)
    assert 0.01 < values["classifier.weight"].std() < 0.03
    assert (values["classifier.bias"] == 0).all()
    changed = {k for k, v in values.items() if not (v == 7).all()}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_buffers_that_are_not_stored_are_computed():
    model, _ = initialized(esm, {k for k, _ in backend.build(esm).named_parameters()})
    reference = tensors(esm())
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, reference[key]), key


def test_a_value_does_not_depend_on_what_else_is_loaded():
    key = "transformer.h.1.attn.c_proj.weight"
    keys = set(tensors(backend.build(gpt2)))
    alone, _ = initialized(gpt2, keys - {key})
    among_others, _ = initialized(gpt2)
    assert torch.equal(tensors(alone)[key], tensors(among_others)[key])


def test_parents_that_initialize_children_have_the_last_word():
    model, _ = initialized(gpt2)
    values = tensors(model)
    assert values["transformer.h.0.attn.c_proj.weight"].std() < 0.012  # 0.02 / sqrt(2 * layers)
    assert values["transformer.h.0.attn.c_attn.weight"].std() > 0.015


def test_a_new_tied_weight_is_initialized_although_its_other_name_is_called_loaded():
    keys = set(tensors(backend.build(gpt2)))
    model, _ = initialized(gpt2, keys - {"transformer.wte.weight"})
    assert not (model.lm_head.weight == 7).any()


def test_the_watch_hears_every_module_by_its_path():
    model, listener = initialized(esm)
    assert set(listener.paths) == {path for path, _ in model.named_modules()}


def test_no_trace_is_left_but_the_one_that_any_construction_leaves():
    model, _ = initialized(esm)
    assert not any("_is_hf_initialized" in vars(t) for t in tensors(model).values())
    assert all("_initialize_weights" not in vars(m) for m in model.modules())
    before = {k: v.clone() for k, v in tensors(model).items()}
    model.init_weights()
    assert all(torch.equal(before[k], v) for k, v in tensors(model).items())


def test_flags_are_taken_off_when_an_initializer_fails(monkeypatch):
    model = with_memory(esm)

    def failing(self, module):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(type(model), "_init_weights", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        backend.initialize(model, esm, {"classifier.bias"}, Listener())
    assert not any("_is_hf_initialized" in vars(t) for t in tensors(model).values())
    assert all("_initialize_weights" not in vars(m) for m in model.modules())


def test_the_rule_of_an_initial_value_has_a_name():
    model = backend.build(esm)
    assert backend.describe_init(model, "classifier.weight") == (
        "EsmPreTrainedModel._init_weights on Linear"
    )
    assert backend.describe_init(model, "esm.rotary_embeddings.inv_freq") == (
        "EsmPreTrainedModel._init_weights on EsmRotaryEmbedding"
    )


def test_keys_that_the_architecture_keeps_in_float32_are_named():
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=32
    )
    model = backend.build(lambda: transformers.T5ForConditionalGeneration(config))
    kept = backend.float32_keys(model, torch.float16)
    assert kept == {k for k in tensors(model) if ".wo." in k}
    assert backend.float32_keys(model, torch.float32) == frozenset()


def test_saving_writes_what_transformers_reads_back(tmp_path: Path):
    model, _ = initialized(esm)
    backend.save(model, tmp_path, 10**9)
    again = transformers.EsmForTokenClassification.from_pretrained(tmp_path)
    assert all(torch.equal(v, tensors(again)[k]) for k, v in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "EsmForTokenClassification"
    ]


def test_saving_splits_files_at_the_size_asked_for(tmp_path: Path):
    model, _ = initialized(esm)
    backend.save(model, tmp_path, 8_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'bioinit\[hf\]'"):
        backend.imported()


def test_backends_are_found_by_their_file():
    assert backends.names() == ("megatron", "module", "transformers")
    assert backends.load("transformers") is backend.BACKEND
    with pytest.raises(ConfigError, match="Closest: 'transformers'"):
        backends.load("transformer")
