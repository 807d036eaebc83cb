"""Valid checkpoints of every kind, small: what the fuzzer starts from.

A case is a checkpoint as data: the bytes of its files by name, the same in every run. What torch
writes is written by torch; the rest is spelled out here.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import binary, dcp

Case = dict[str, bytes]


def _state() -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": torch.arange(12.0).reshape(3, 4),
        "encoder.bias": torch.arange(3).half(),
        "odd": torch.tensor(7, dtype=torch.int64),
        "none": torch.zeros(0, 5, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }


def _saved(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def _safetensors(state: dict[str, torch.Tensor], **said: str) -> bytes:
    """The library writes what is ``said`` in another order every time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **said}}
    body = b""
    for name, tensor in state.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        span = [len(body), len(body) + len(data)]
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        body += data
    text = _json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


CONFIG = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "id2label": {"0": "A", "1": "B"},
    "layer_norm_eps": 1e-12,
    "torch_dtype": "float32",
}


def _hub() -> list[Case]:
    whole, state = _safetensors(_state()), _state()
    names = sorted(state)
    halves = [{n: state[n] for n in part} for part in (names[:2], names[2:])]
    files = [f"model-0000{n}-of-00002" for n in (1, 2)]
    placed = {n: f for half, f in zip(halves, files, strict=True) for n in half}
    tokens = {"generation_config.json": _json({"do_sample": True}), "vocab.txt": b"a\nb\n"}
    sharded = {
        suffix: {
            f"{stem}.{suffix}.index.json": _json(
                {
                    "metadata": {"total_size": 100},
                    "weight_map": {n: f"{stem}{f[5:]}.{suffix}" for n, f in placed.items()},
                }
            ),
            **{
                f"{stem}{f[5:]}.{suffix}": write(half)
                for half, f in zip(halves, files, strict=True)
            },
            "config.json": _json(CONFIG),
        }
        for stem, suffix, write in (
            ("model", "safetensors", _safetensors),
            ("pytorch_model", "bin", _saved),
        )
    }
    return [
        {"model.safetensors": whole, "config.json": _json(CONFIG), **tokens},
        sharded["safetensors"],
        sharded["bin"],
    ]


def _torch_zip() -> list[Case]:
    state = _state()
    lightning = {
        "state_dict": {**state, "shared": state["encoder.weight"].view(-1)},
        "pytorch-lightning_version": "2.5.0",
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-3, "dims": (1, 2), "path": Path("a/b")},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
    return [
        {"pytorch_model.bin": _saved(state)},
        {"epoch=3.ckpt": _saved(lightning)},
        {"model.pt": _saved({"model": {"w": torch.nn.Parameter(torch.ones(2))}, "args": range(3)})},
    ]


def _torch_legacy() -> list[Case]:
    """Storages are called, and put in order, by where they lie in memory: make that the same."""
    storages = sorted((torch.UntypedStorage(64) for _ in _state()), key=lambda one: str(one._cdata))
    state = {}
    for storage, (name, tensor) in zip(storages, _state().items(), strict=True):
        made = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
        storage.fill_(0)
        state[name] = made.copy_(tensor)
    keys: dict[bytes, bytes] = {}

    def numbered(found: re.Match[bytes]) -> bytes:
        key = keys.setdefault(found[2], b"k%d" % len(keys))
        is_key = int.from_bytes(found[1], "little") == len(found[2])
        return b"X" + len(key).to_bytes(4, "little") + key if is_key else found[0]

    data = _saved(state, legacy=True)
    return [{"pytorch_model.bin": re.sub(rb"(?s)X(....)(\d{9,})", numbered, data)}]


def _written(write: Callable[[Path], None]) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }


COMMON = {
    "iteration": 10,
    "checkpoint_version": 3.0,
    "global_step": 10,
    "pytorch-lightning_version": "2.5.0",
    "optimizer": {"param_groups": [{"lr": 0.1}]},
}
MEGATRON = _json({"sharded_backend": "torch_dist", "sharded_backend_version": 1})


def _torch_dist() -> list[Case]:
    plain = _written(lambda folder: dcp.write(folder, _state()))
    optimizer = {f"optimizer.state.exp_avg.{name}": t for name, t in _state().items()}
    extra = {"decoder.layers.attention._extra_state/shard_0_2": io.BytesIO(b"x")}
    cut = _written(lambda folder: dcp.write_cut(folder, {**_state(), **optimizer, **extra}))
    megatron = {**cut, "common.pt": _saved(COMMON), "metadata.json": MEGATRON}
    nemo2 = {f"weights/{name}": data for name, data in megatron.items()}
    return [plain, megatron, {**nemo2, "context/io.json": _json(FIDDLE)}]


def _hf_dcp() -> list[Case]:
    def part(state: dict[str, torch.Tensor], at: dict[str, list[int]]) -> bytes:
        note = _json({name: {"saved_offsets": offsets} for name, offsets in at.items()}).decode()
        return _safetensors(state, DCP_VERSION="1.0", DCP_SHARDING_INFO=note)

    name = "shard-0000{}-model-0000{}-of-0000{}.safetensors".format
    half, two = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    at = ({"w": [0, 0], "b": [0]}, {"w": [2, 0], "b": [2]})
    whole = {name(n + 1, 1, 1): part({"w": half, "b": two}, at[n]) for n in (0, 1)}
    split = {
        name(n + 1, number + 1, 2): part({key: tensor}, {key: at[n][key]})
        for n in (0, 1)
        for number, (key, tensor) in enumerate((("w", half), ("b", two)))
    }
    return [whole, {f"sharded/{name}": data for name, data in split.items()}]


def _zarr() -> list[Case]:
    def array(shape: list[int], chunks: list[int], dtype: str, **more: Any) -> bytes:
        said = {"zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": dtype}
        return _json(
            {**said, "order": "C", "compressor": None, "fill_value": 0, "filters": None, **more}
        )

    numbers = bytes(range(48))
    blosc = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
    raw = {
        "module.w/.zarray": array([4, 3], [2, 3], "<f4", fill_value=None),
        "module.w/0.0": numbers[:24],
        "module.w/1.0": numbers[24:],
        "module.b/.zarray": array([5], [2], "bfloat16"),
        "module.b/0": b"abcd",
        "module.b/2": b"abcd",
        "module.s/.zarray": array([], [], "<i8"),
        "module.s/0": bytes(8),
        "module.x._extra_state/shard_0_1.pt": _saved({"a": 1}),
        "common.pt": _saved(COMMON),
        "metadata.json": _json({"sharded_backend": "zarr", "sharded_backend_version": 1}),
    }
    packed = {
        "m.z/.zarray": array([4, 3], [2, 3], "<f4", compressor={"id": "zlib", "level": 1}),
        "m.z/0.0": zlib.compress(numbers[:24]),
        "m.z/1.0": zlib.compress(numbers[24:]),
        "m.g/.zarray": array([12], [12], "<f4", compressor={"id": "gzip", "level": 1}, order="F"),
        "m.g/0": gzip.compress(numbers, mtime=0),
        "m.l/.zarray": array([12], [12], "<f4", compressor=blosc),
        # Blosc 2.1, lz4 in format 1, not compressed: flags say that the bytes follow as they are.
        "m.l/0": b"\x02\x01\x02\x04" + b"".join(n.to_bytes(4, "little") for n in (48, 48, 64))
        + numbers,
        "metadata.json": _json({"sharded_backend": "zarr", "sharded_backend_version": 1}),
        "common.pt": _saved({}),
    }  # fmt: skip
    return [raw, packed, {f"weights/{name}": data for name, data in raw.items()}]


NEMO1 = b"""\
# written by NeMo
target: nemo.collections.nlp.models.language_modeling.megatron_bert_model.MegatronBertModel
nemo_version: 1.22.0
tensor_model_parallel_size: 1
hidden_size: 8
init_method_std: 0.02
layernorm_epsilon: 1e-5
tokenizer: &tokenizer
  library: megatron
  type: BertWordPieceLowerCase
  model: nemo:0123_tokenizer.model
  vocab_file: nemo:vocab.txt
  merge_file: null
data:
  data_prefix: [a, b]
  also: *tokenizer
"""


def _nemo() -> list[Case]:
    weights = _saved({"model.language_model.encoder.final_layernorm.weight": torch.ones(4)})
    tree = {"model_config.yaml": NEMO1, "vocab.txt": b"a\n", "0123_tokenizer.model": b"x"}
    plain = binary.tarred({f"./{n}": d for n, d in {**tree, "model_weights.ckpt": weights}.items()})
    shards = {f"model_weights/{n}": d for n, d in _torch_dist()[1].items()}
    return [
        {"a.nemo": plain},
        {"a.nemo": gzip.compress(plain, 1, mtime=0)},
        {"a.nemo": binary.tarred({**tree, **shards})},
        {**tree, **shards},
        {
            "a.nemo": binary.tarred(
                {**tree, **{f"mp_rank_0{n}/model_weights.ckpt": weights for n in (0, 1)}}
            )
        },
    ]


NEOX = b'{\n  "hidden_size": 4, "num-layers": 1,\n  # a remark\n  "gpt_j_residual": false,\n}\n'


def _partitions() -> list[Case]:
    layer, half = "layer_{:02}-model_{:02}-model_states.pt".format, torch.arange(8.0).reshape(2, 4)
    norm = {"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)}
    block = {
        "input_layernorm.weight": torch.ones(4),
        "attention.query_key_value.weight": torch.ones(6, 4),
        "attention.dense.weight": torch.ones(4, 2),
        "attention.dense.bias": torch.ones(4),
    }
    neox = {"latest": b"global_step10\n", "configs/a.yml": NEOX}
    for part in (0, 1):
        for number, state in ((0, {"word_embeddings.weight": half}), (2, block), (4, norm)):
            neox[f"global_step10/{layer(number, part)}"] = _saved(state)
        engine = {"args": {"hidden_size": 4}, "iteration": 10, "mp_world_size": 2, "module": None}
        neox[f"global_step10/mp_rank_0{part}_model_states.pt"] = _saved(engine)
    module = {f"layers.0.{name}": tensor for name, tensor in block.items()}
    deepspeed = {
        f"mp_rank_0{part}_model_states.pt": _saved({"module": module, "mp_world_size": 2})
        for part in (0, 1)
    }
    inner = {"language_model": {"embedding": {"word_embeddings": {"weight": half}}}}
    ranks: Case = {"latest_checkpointed_iteration.txt": b"5"}
    for part in (0, 1):
        said = {"model": inner, "iteration": 5, "checkpoint_version": 3.0, "args": {"n": 1}}
        ranks[f"iter_0000005/mp_rank_0{part}/model_optim_rng.pt"] = _saved(said)
    return [neox, deepspeed, ranks]


def _ref(key: str) -> dict[str, Any]:
    return {"type": "ref", "key": key}


def _leaf(value: Any) -> dict[str, Any]:
    return {"type": "leaf", "value": value, "paths": []}


def _name(module: str, name: str) -> dict[str, Any]:
    return {"type": "pyref", "module": module, "name": name}


def _config(module: str, name: str, **fields: Any) -> dict[str, Any]:
    described = {
        "type": _name("fiddle._src.config", "BuildableTraverserMetadata"),
        "items": [["Attr(name='fn_or_cls')", _name(module, name)]],
    }
    return {
        "type": _name("fiddle._src.config", "Config"),
        "items": [[f"Attr(name='{key}')", value] for key, value in fields.items()],
        "metadata": described,
        "paths": ["<root>"],
    }


_ARTIFACT = ("nemo.lightning.io.artifact.file", "FileArtifact")
FIDDLE = {
    "objects": {
        "context_1": _config(
            "nemo.lightning.io.pl", "TrainerContext", model=_ref("model_1"), trainer=_leaf(None)
        ),
        "model_1": _config(
            "bionemo.llm.lightning",
            "Module",
            config=_ref("config_1"),
            tokenizer=_ref("tokenizer_1"),
        ),
        "config_1": _config(
            "bionemo.esm2.api",
            "ESM2Config",
            hidden_size=_leaf(8),
            layernorm_epsilon=_leaf(1e-5),
            params_dtype=_name("torch", "bfloat16"),
            activation_func=_name("torch.nn.functional", "gelu"),
            names=_ref("list_1"),
            table=_ref("dict_1"),
        ),
        "list_1": {
            "type": _name("builtins", "list"),
            "items": [["Index(index=0)", _leaf(1)], ["Index(index=1)", _ref("dict_1")]],
            "metadata": _leaf(None),
        },
        "dict_1": {
            "type": _name("builtins", "dict"),
            "items": [["Key(key='a')", _leaf(True)]],
            "metadata": {
                "type": _name("builtins", "list"),
                "items": [["Index(index=0)", _leaf("a")]],
                "metadata": _leaf(None),
            },
        },
        "tokenizer_1": _config("transformers", "AutoTokenizer", model_path=_ref("artifact_1")),
        "artifact_1": _config(*_ARTIFACT, attr=_leaf("tokenizer.model"), skip=_leaf(False)),
    },
    "root": _ref("context_1"),
    "version": "0.0.1",
}
MODEL_YAML = b"""\
_target_: bionemo.llm.lightning.Module
config:
  _target_: bionemo.esm2.api.ESM2Config
  hidden_size: 8
  num_layers: 2
  init_method_std: 0.02
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
  attention_backend:
    _args_: [2]
    _call_: true
    _name_: flash
    _target_: megatron.core.transformer.enums.AttnBackend
tokenizer: &tokenizer
  _target_: transformers.AutoTokenizer
  model_path: tokenizer.model
also: *tokenizer
"""
BRIDGE = b"""\
checkpoint:
  _target_: megatron.bridge.training.config.CheckpointConfig
  save: /checkpoints
model:
  _target_: megatron.bridge.models.llama.llama_provider.LlamaModelProvider
  hidden_size: 8
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  params_dtype: &dtype
    _call_: false
    _target_: torch.bfloat16
  pipeline_dtype: *dtype
tokenizer:
  _target_: megatron.bridge.training.tokenizers.config.TokenizerConfig
  tokenizer_model: a/b
"""


def _contexts() -> list[Case]:
    weights = {"model.safetensors": _safetensors({"w": torch.ones(2)})}
    both = {"context/io.json": _json(FIDDLE), "context/model.yaml": MODEL_YAML}
    tokenizer = {"context/tokenizer.model": b"x"}
    return [
        {**weights, **both, **tokenizer},
        {**weights, "context/model.yaml": MODEL_YAML},
        {**weights, "model_config.yaml": NEMO1, "vocab.txt": b"a"},
        {**weights, "run_config.yaml": BRIDGE},
        {**weights, "configs/a.yml": NEOX, "configs/b.yml": b"rotary_pct: 0.25\n"},
        {**weights, "config.json": _json(CONFIG), "generation_config.json": _json({"a": [1]})},
    ]


CASES: dict[str, Callable[[], list[Case]]] = {
    "contexts": _contexts,
    "hf_dcp": _hf_dcp,
    "hub": _hub,
    "nemo": _nemo,
    "partitions": _partitions,
    "torch_dist": _torch_dist,
    "torch_legacy": _torch_legacy,
    "torch_zip": _torch_zip,
    "zarr": _zarr,
}


@cache
def valid(target: str) -> list[Case]:
    """The checkpoints that the target starts from."""
    return CASES[target]()
