"""NeMo 2's context, written without NeMo: fiddle itself loads it, and our reader reads it back."""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest
import torch
import yaml
from fiddle.experimental import serialization

from bioinit.contexts import nemo2
from bioinit.errors import ConfigError
from bioinit.families._nemo2 import Call, Ref, written
from bioinit.storage import Folder

LLAMA = "nemo.collections.llm.gpt.model.llama"
FIELDS = {
    "num_layers": 2,
    "layernorm_epsilon": 1e-6,
    "bias": False,
    "vocab": None,
    "name": 'it\'s "quoted"',
    "window": [4096, 0],
    "shape": (1, (2, 3)),
    "rope": {"factor": 8.0, "steps": [1, {"a": None}]},
    "activation_func": Ref("torch.nn.functional.silu"),
    "params_dtype": Ref("torch.bfloat16"),
}


@dataclass
class LlamaConfig:
    num_layers: int = 0
    layernorm_epsilon: float = 0.0
    bias: bool = True
    vocab: Any = 1
    name: str = ""
    window: Any = None
    shape: Any = None
    rope: Any = None
    activation_func: Any = None
    params_dtype: Any = None


@dataclass
class LlamaModel:
    config: Any
    optim: Any = None
    tokenizer: Any = None


@dataclass
class TrainerContext:
    model: Any
    trainer: Any
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Anything:
    pretrained_model_name: Any = None
    model_path: Any = None
    accelerator: Any = None
    devices: Any = None
    strategy: Any = None
    ckpt_save_optimizer: Any = None
    save_ckpt_format: Any = None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of NeMo's names that hold classes of ours."""
    tokenizers = "nemo.collections.common.tokenizers"
    for name, cls in {
        f"{LLAMA}.LlamaConfig": LlamaConfig,
        f"{LLAMA}.LlamaModel": LlamaModel,
        "nemo.lightning.io.pl.TrainerContext": TrainerContext,
        "nemo.lightning.pytorch.trainer.Trainer": Anything,
        "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy": Anything,
        f"{tokenizers}.huggingface.auto_tokenizer.AutoTokenizer": Anything,
        f"{tokenizers}.sentencepiece_tokenizer.SentencePieceTokenizer": Anything,
    }.items():
        module, _, last = name.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            if ".".join(parts[:end]) not in sys.modules:
                made = types.ModuleType(".".join(parts[:end]))
                monkeypatch.setitem(sys.modules, made.__name__, made)
        monkeypatch.setattr(sys.modules[module], last, cls, raising=False)


def write(tmp_path: Path, **given: Any) -> Any:
    found = written(
        given.pop("fields", FIELDS),
        config_class=f"{LLAMA}.LlamaConfig",
        model_class=given.pop("model_class", f"{LLAMA}.LlamaModel"),
        keys=given.pop("keys", ()),
        num_layers=2,
        **given,
    )
    for name, content in found.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return found


def test_fiddle_loads_and_builds_what_is_written(tmp_path: Path, stand_ins: None):
    write(tmp_path, tokenizer=["tokenizer.json"])
    config = serialization.load_json((tmp_path / "context/io.json").read_text())
    assert isinstance(config, fdl.Config)
    built = fdl.build(config)
    assert isinstance(built, TrainerContext) and isinstance(built.model, LlamaModel)
    wanted = FIELDS | {
        "activation_func": torch.nn.functional.silu,
        "params_dtype": torch.bfloat16,
    }
    assert vars(built.model.config) == wanted
    assert built.extra == {}
    assert built.trainer.strategy.save_ckpt_format == "torch_dist"
    assert built.model.tokenizer.pretrained_model_name == "nemo_tokenizer"


@pytest.mark.parametrize("subpath, kind", [("model", LlamaModel), ("model.config", LlamaConfig)])
def test_a_part_of_it_is_found_by_its_path_as_nemo_does(
    tmp_path: Path, stand_ins: None, subpath: str, kind: type
):
    write(tmp_path)
    document = json.loads((tmp_path / "context/io.json").read_text())
    at = [k for k, o in document["objects"].items() if f"<root>.{subpath}" in o.get("paths", ())]
    assert len(at) == 1
    document["root"]["key"] = at[0]
    part = serialization.load_json(json.dumps(document))
    assert isinstance(fdl.build(part), kind)


def test_our_reader_gives_the_same_fields_from_either_file_alone(tmp_path: Path):
    write(tmp_path)
    wanted = FIELDS | {
        "activation_func": "torch.nn.functional.silu",
        "params_dtype": "torch.bfloat16",
        "shape": [1, [2, 3]],
    }
    both = nemo2.CONTEXT.read(Folder.at(tmp_path))
    assert both is not None and both.data == wanted
    assert both.raw["canonical"] == f"{LLAMA}.LlamaConfig"
    (tmp_path / "context/io.json").unlink()
    alone = nemo2.CONTEXT.read(Folder.at(tmp_path))
    assert alone is not None
    assert {name: alone.data[name] for name in wanted} == wanted


def test_what_our_reader_gave_is_written_as_what_it_was(tmp_path: Path, stand_ins: None):
    write(tmp_path, fields={"rope": Call(f"{LLAMA}.LlamaModel", {"config": 3}, partial=True)})
    context = nemo2.CONTEXT.read(Folder.at(tmp_path))
    assert context is not None
    read = {"params_dtype": "torch.float16", "name": "a.b", "rope": context.data["rope"]}
    write(tmp_path, fields=read)
    built = fdl.build(serialization.load_json((tmp_path / "context/io.json").read_text()))
    config = built.model.config
    assert (config.params_dtype, config.name) == (torch.float16, "a.b")
    assert config.rope() == LlamaModel(3)


@pytest.mark.parametrize(
    "names, folder, carried",
    [
        (["tokenizer.model"], "context", {"tokenizer.model"}),
        (
            ["tokenizer.model", "tokenizer.json", "vocab.txt"],
            "context/nemo_tokenizer",
            {"tokenizer.model", "tokenizer.json", "vocab.txt"},
        ),
    ],
)
def test_a_tokenizer_in_its_folder_is_found_again(
    tmp_path: Path, names: list[str], folder: str, carried: set[str]
):
    found = write(tmp_path, tokenizer=names)
    assert found.tokenizer == folder
    (tmp_path / folder).mkdir(exist_ok=True)
    for name in names:
        (tmp_path / folder / name).write_text("x")
    context = nemo2.CONTEXT.read(Folder.at(tmp_path))
    assert context is not None and set(context.carried) == carried


def test_a_model_that_takes_no_tokenizer_gets_none(tmp_path: Path):
    found = write(
        tmp_path,
        model_class="bionemo.llm.lightning.BionemoLightningModule",
        tokenizer=["vocab.txt"],
        arguments={"optimizer": Call("pkg.Optimizer", {"lr": 1.0}), "model_transform": None},
    )
    assert found.tokenizer == "context/nemo_tokenizer"
    shown = yaml.safe_load(found.files["context/model.yaml"])
    assert set(shown) == {"_target_", "config", "optimizer", "model_transform"}
    assert shown["optimizer"] == {"_target_": "pkg.Optimizer", "lr": 1.0}


def test_linear_layers_have_an_empty_extra_state_each(tmp_path: Path):
    keys = [
        "decoder.layers.mlp.linear_fc1.weight",
        "decoder.layers.mlp.linear_fc1.bias",
        "decoder.final_layernorm.weight",
    ]
    found = write(tmp_path, keys=keys, unlayered=["output_layer"])
    assert found.objects == {
        "module.decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": b"",
        "module.decoder.layers.mlp.linear_fc1._extra_state/shard_1_2": b"",
        "module.output_layer._extra_state/shard_0_1": b"",
    }
    assert (found.weights, found.front) == ("weights", "module.")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("torch.bfloat16", ("torch", "bfloat16")),
        ("torch.nn.functional.silu", ("torch.nn.functional", "silu")),
        ("pkg.enums.Color.RED", ("pkg.enums", "Color.RED")),
        ("pkg.llama.LlamaConfig", ("pkg.llama", "LlamaConfig")),
    ],
)
def test_a_name_is_divided_where_its_module_ends(name: str, parts: tuple[str, str]):
    assert Ref(name).parts == parts


def test_what_a_context_cannot_hold_is_refused_by_its_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.config\.activation_func is .*silu"):
        write(tmp_path, fields={"activation_func": torch.nn.functional.silu})


def test_references_of_the_functions_we_name_are_importable():
    for name in ("torch.nn.functional.silu", "torch.nn.functional.gelu", "torch.bfloat16"):
        module, attribute = Ref(name).parts
        assert hasattr(importlib.import_module(module), attribute)
