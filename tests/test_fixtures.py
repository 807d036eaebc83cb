"""Checkpoints of the original software, every tensor, with none of that software importable."""

import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    ("layer.1.attention.self.rotary_embeddings", "layer.*.attention.self.rotary_embeddings"),
)
TIED = (  # transformers 4 stores these twice
    ("lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
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
    return json.loads((folder / "expected.json").read_text())["tensors"]


def assert_alike(found, said):
    """There is every tensor that was written and no other, each as it was written.

    ``found`` is pairs: two tensors of one name are the same one, stored twice.
    """
    assert {key for key, _ in found} == said.keys()
    for key, entry in found:
        assert {field: entry[field] for field in said[key]} == said[key], key


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
    undone = [
        (replaced(re.sub(r"^(module|model)\.", "", key), (*FUSED, *LEGACY)), entry)
        for key, entry in found.items()
    ]
    assert_alike(undone, expected(fixtures_dir, name))


@pytest.mark.parametrize("name", HF)
def test_hugging_face_tensors_are_bit_equal(opened, fixtures_dir, name):
    found = opened[str(fixtures_dir / name)]["tensors"]
    said = expected(fixtures_dir, name)
    # expected.json has the names of transformers 5; the .bin files were written by transformers 4.
    later = [
        (key if key in said else replaced(key, (*RENAMED_LATER, *TIED)), entry)
        for key, entry in found.items()
    ]
    assert_alike(later, said)


def test_partitions_of_gpt_neox_are_bit_equal(opened, fixtures_dir):
    found = opened[str(fixtures_dir / "gpt_neox")]["tensors"]
    undone = []
    for key, entry in found.items():
        number, _, rest = key.partition(".")
        is_layer = rest.startswith(("attention.", "mlp.", "input_layernorm", "post_attention"))
        spelled = f"gpt_neox.layers.{int(number) - 2}.{rest}" if is_layer else replaced(rest, NEOX)
        if spelled.endswith("attention.rotary_emb.inv_freq"):  # computed, and no weight
            assert entry["sha256_f32"] == hashlib.sha256(struct.pack("<2f", 1, 0.01)).hexdigest()
        else:
            undone.append((spelled, entry))
    assert_alike(undone, expected(fixtures_dir, "gpt_neox"))


def test_two_tensor_ranks_give_the_tensors_of_one_model(opened, fixtures_dir):
    one, two = (opened[str(fixtures_dir / f"nemo2/esm2_tp{n}")] for n in (1, 2))
    assert two["tensors"].keys() == one["tensors"].keys()
    padded = {key for key, entry in one["tensors"].items() if "rows" in entry}
    assert {key.partition(".")[2] for key in padded} == {
        "embedding.word_embeddings.weight",
        "output_layer.bias",
    }
    for key, entry in one["tensors"].items():
        other = two["tensors"][key]
        if key in padded:
            assert (len(entry["rows"]), len(other["rows"])) == (40, 48)
            assert other["rows"][:40] == entry["rows"], key
        else:
            assert other == entry, key


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
    data = opened[str(fixtures_dir / "nemo2/llama_tp1")]["data"]
    assert {key: data[key] for key in LLAMA} == LLAMA


def fields_of(context):
    """The fields of a NeMo 2 model's config and its class, read plainly from the two files."""
    fields = yaml.safe_load((context / "model.yaml").read_text())["config"]
    name = fields.pop("_target_")
    for key, value in list(fields.items()):
        if isinstance(value, dict) and value["_call_"] is False:
            fields[key] = value["_target_"]
        elif isinstance(value, dict) and value["_target_"].startswith("dataclasses."):
            del fields[key]  # a default that its writer did not spell out
        elif isinstance(value, dict):
            fields[key] = {"_target_": value["_target_"]}
    objects = json.loads((context / "io.json").read_text())["objects"].values()
    (config,) = (item for item in objects if "<root>.model.config" in item.get("paths", ()))
    for spelled, value in config["items"]:
        key = re.fullmatch(r"Attr\(name='(\w+)'\)", spelled)[1]
        is_name = value["type"] == "pyref"
        fields[key] = f"{value['module']}.{value['name']}" if is_name else value["value"]
    return fields, name


@pytest.mark.parametrize("name", ["llama_tp1", "esm2_tp1", "esm2_tp2"])
def test_every_field_of_a_nemo_2_context_is_what_its_files_say(name, opened, fixtures_dir):
    fields, model = fields_of(fixtures_dir / "nemo2" / name / "context")
    found = opened[str(fixtures_dir / "nemo2" / name)]
    assert len(fields) > 200 and found["model"] == model
    assert typed(found["data"]) == typed(fields)
    assert typed(found["config"]) == typed({**fields, "_target_": model})


def typed(fields):
    """With the types beside the values: 1, 1.0 and True are equal, and not the same field."""
    return {key: (type(value), value) for key, value in fields.items()}
