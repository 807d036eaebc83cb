"""Nemotron under the field's names."""

import pytest

pytest.importorskip("transformers")

NEMOTRON = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.03,
    "attention_dropout": 0.1,
    "head_dim": 16,
    "hidden_act": "relu2",
    "norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
BIASED = NEMOTRON | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"nemotron4": NEMOTRON, "biased": BIASED}
