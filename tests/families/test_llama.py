"""Llama under the field's names."""

import pytest

pytest.importorskip("transformers")

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.01,
    "attention_dropout": 0.1,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
LLAMA31 = LLAMA | {
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 16,
    },
}
BIASED = LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}


def tiny_configs() -> dict[str, dict]:
    """What ``config.json`` says of small models, for the contract that every family keeps."""
    return {"llama2": LLAMA, "llama32": LLAMA31, "biased": BIASED}
