"""Gemma under the field's names."""

import pytest

pytest.importorskip("transformers")

GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
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
    "hidden_act": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
BIASED = GEMMA | {"attention_bias": True, "num_key_value_heads": 1}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"gemma": GEMMA, "biased": BIASED}
