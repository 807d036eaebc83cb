"""Checkpoints of the original software, every tensor, with none of that software importable."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("without_writers.py")
MEGATRON = (
    "nemo2/llama_tp1 nemo2/esm2_tp1 zarr/bert_fp32_tp1_mcore0.12.3 zarr/gpt_fp32_tp1_mcore0.15.3 "
    "nemo1/bert_torch_dist.nemo nemo1/bert_legacy_model_weights_ckpt.nemo"
).split()
HF = [
    f"hf/{family}/{kind}"
    for family in ("esm2", "bert", "llama", "mixtral", "gpt_neox")
    for kind in ("safetensors", "sharded", "bin", "bin_sharded")
]
FUSED = (  # Transformer Engine keeps the norm in the linear that follows it
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
LEGACY = (  # NeMo 1's names for megatron-core's
    ("language_model.", ""),
    ("self_attention.dense", "self_attention.linear_proj"),
    ("query_key_value", "linear_qkv"),
    ("post_attention_layernorm", "pre_mlp_layernorm"),
    ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
    ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
    ("lm_head.layernorm", "lm_head.layer_norm"),
    ("lm_head.bias", "output_layer.bias"),
)
RENAMED_LATER = (
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
    ("layer.0.attention.self.rotary_embeddings", "layer.*.attention.self.rotary_embeddings"),
)
NEOX = (
    ("word_embeddings", "gpt_neox.embed_in"),
    ("final_linear", "embed_out"),
    ("norm.", "gpt_neox.final_layer_norm."),
)


@pytest.fixture(scope="module")
def opened(fixtures_dir):
    paths = [str(fixtures_dir / name) for name in (*MEGATRON, *HF, "gpt_neox", "nemo2/esm2_tp2")]
    done = subprocess.run(
        [sys.executable, SCRIPT, *paths], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(fixtures_dir, name):
    folder = fixtures_dir / name
    while not (folder / "expected.json").exists():
        folder = folder.parent
    said = json.loads((folder / "expected.json").read_text())["tensors"]
    return {key: entry["sha256_f32"] for key, entry in said.items()}


def replaced(name, pairs):
    for old, new in pairs:
        if old in name:
            name = name.replace(old, new)
    return name


def test_none_of_the_writing_software_was_imported(opened):
    assert opened["imported"] == []


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_and_nemo_tensors_are_bit_equal(opened, fixtures_dir, name):
    found = opened[str(fixtures_dir / name)]["tensors"]
    undone = {
        replaced(re.sub(r"^(module|model)\.", "", key), (*FUSED, *LEGACY)): value
        for key, value in found.items()
    }
    assert expected(fixtures_dir, name).items() <= undone.items()


@pytest.mark.parametrize("name", HF)
def test_hugging_face_tensors_are_bit_equal(opened, fixtures_dir, name):
    found = opened[str(fixtures_dir / name)]["tensors"]
    said = expected(fixtures_dir, name)
    # expected.json has the names of transformers 5; the .bin files were written by transformers 4.
    later = {replaced(key, RENAMED_LATER): value for key, value in found.items()} | found
    assert {key: later.get(key) for key in said} == said


def test_partitions_of_gpt_neox_are_bit_equal(opened, fixtures_dir):
    found = opened[str(fixtures_dir / "gpt_neox")]["tensors"]
    undone = {}
    for key, value in found.items():
        number, _, rest = key.partition(".")
        is_layer = rest.startswith(("attention.", "mlp.", "input_layernorm", "post_attention"))
        spelled = f"gpt_neox.layers.{int(number) - 2}.{rest}" if is_layer else replaced(rest, NEOX)
        undone[spelled] = value
    assert expected(fixtures_dir, "gpt_neox").items() <= undone.items()


def test_two_tensor_ranks_give_the_tensors_of_one_model(opened, fixtures_dir):
    one, two = (opened[str(fixtures_dir / f"nemo2/esm2_tp{n}")] for n in (1, 2))
    assert two["tensors"].keys() == one["tensors"].keys()


LLAMA = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "layernorm_epsilon": 1e-06,
    "share_embeddings_and_output_weights": False,
    "activation_func": "torch.nn.functional.silu",
    "params_dtype": "torch.float32",
    "normalization": "RMSNorm",
}


def test_the_context_of_nemo_2_gives_the_exact_values(opened, fixtures_dir):
    data = opened[str(fixtures_dir / "nemo2/llama_tp1")]["context"]["data"]
    assert {key: data[key] for key in LLAMA} == LLAMA
