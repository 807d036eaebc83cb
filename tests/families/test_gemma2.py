"""Gemma 2 under the field's names."""

import pytest

pytest.importorskip("transformers")

GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
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
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "attention_bias": False,
    "sliding_window": 7,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 40.0,
    "final_logit_softcapping": 20.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SAME = GEMMA2 | {"layer_types": ["full_attention", "full_attention"], "num_key_value_heads": 4}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"gemma2": GEMMA2, "without_windows": SAME}
