"""Checkpoints in the four layouts of the hub, written by transformers and torch for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

LAYOUTS = ("safetensors", "sharded", "bin", "bin_sharded")
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS = {
    "esm2": (
        transformers.EsmForMaskedLM,
        transformers.EsmConfig(
            **{**SMALL, "vocab_size": 33},
            mask_token_id=32,
            pad_token_id=1,
            position_embedding_type="rotary",
            token_dropout=True,
        ),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    ),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3),
    ),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SMALL)),
}


def write(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write model ``name`` in every layout; returns inputs and the logits of the model itself."""
    cls, config = MODELS[name]
    torch.manual_seed(11)
    model = cls(config).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder / "safetensors")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    state = load_file(folder / "safetensors" / "model.safetensors")
    tied = {k: v for k, v in model.all_tied_weights_keys.items() if v in state}
    state |= {alias: state[owner] for alias, owner in tied.items()}
    for layout in ("bin", "bin_sharded"):
        (folder / layout).mkdir()
        for extra in ("config.json", "generation_config.json"):
            source = folder / "safetensors" / extra
            if source.exists():
                (folder / layout / extra).write_text(source.read_text())
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    names = sorted(state)
    parts = [names[i::3] for i in range(3)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"pytorch_model-{number:05d}-of-00003.bin"
        torch.save({n: state[n] for n in part}, folder / "bin_sharded" / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "bin_sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ids = torch.randint(
        4, config.vocab_size - 4, (2, 9), generator=torch.Generator().manual_seed(5)
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return {**inputs, "logits": model(**inputs).logits}
