"""Saved configs as their writers spell them, for the corpus to spoil."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.hostile.craft import STATE, archive, pickled, saved, write_dcp

BUILDABLE = "fiddle._src.config"


def pyref(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}


def ref(key: str) -> dict[str, str]:
    return {"type": "ref", "key": key}


def leaf(value: Any) -> dict[str, Any]:
    return {"type": "leaf", "value": value, "paths": ["<root>"]}


def config(module: str, name: str, **fields: Any) -> dict[str, Any]:
    """An entry of fiddle's table for a ``Config`` of that class."""
    described = {
        "type": pyref(BUILDABLE, "BuildableTraverserMetadata"),
        "items": [
            ["Attr(name='fn_or_cls')", pyref(module, name)],
            [
                "Attr(name='argument_names')",
                {
                    "type": pyref("builtins", "tuple"),
                    "items": [[f"Index(index={i})", key] for i, key in enumerate(fields)],
                    "metadata": None,
                },
            ],
        ],
        "metadata": pyref(BUILDABLE, "BuildableTraverserMetadata"),
    }
    return {
        "type": pyref(BUILDABLE, "Config"),
        "items": [[f"Attr(name={key!r})", value] for key, value in fields.items()],
        "metadata": described,
        "paths": ["<root>"],
    }


def document(**objects: Any) -> dict[str, Any]:
    """``io.json`` with a model whose config is ``objects['config']``."""
    held = {
        "config": config("bionemo.esm2.model.model", "ESM2Config", num_layers=leaf(2)),
        "model": config("bionemo.llm.lightning", "BionemoLightningModule", config=ref("config")),
        "root": config(
            "nemo.lightning.io.pl", "TrainerContext", model=ref("model"), trainer=leaf(None)
        ),
        **objects,
    }
    return {"root": ref("root"), "objects": held, "refcounts": {}, "version": "0.0.1"}


MODEL_YAML = "_target_: bionemo.llm.lightning.M\nconfig:\n  _target_: x.Config\n  num_layers: 2\n"
RUN_CONFIG = "model:\n  _target_: megatron.bridge.models.X\n  num_layers: 2\ntrain:\n  a: 1\n"
NEOX = '{"num-layers": 2, "hidden-size": 4, "pipe-parallel-size": 1, "model-parallel-size": 2}'
NEMO_1 = "num_layers: 2\nhidden_size: 4\ntokenizer:\n  model: null\n"
ARGS = {"num_layers": 2, "hidden_size": 4}


def weights(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(STATE, folder / "model.safetensors")
    return folder


def as_bytes(content: Any) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def io_json(folder: Path, content: Any) -> None:
    write_dcp(folder / "weights", common={})
    (folder / "context").mkdir()
    (folder / "context" / "io.json").write_bytes(as_bytes(content))


def model_yaml(folder: Path, content: Any) -> None:
    io_json(folder, document())
    (folder / "context" / "model.yaml").write_bytes(as_bytes(content))


def run_config(folder: Path, content: Any) -> None:
    write_dcp(folder / "iter_0000001", common={})
    (folder / "iter_0000001" / "run_config.yaml").write_bytes(as_bytes(content))


def model_config(folder: Path, content: Any) -> None:
    (folder / "model_weights.ckpt").write_bytes(saved(STATE))
    (folder / "model_config.yaml").write_bytes(as_bytes(content))


def neox_yml(folder: Path, content: Any) -> None:
    weights(folder)
    (folder / "configs").mkdir()
    (folder / "configs" / "model.yml").write_bytes(as_bytes(content))


def config_json(folder: Path, content: Any) -> None:
    weights(folder)
    (folder / "config.json").write_bytes(as_bytes(content))


def common_args(folder: Path, content: Any) -> None:
    data = content if isinstance(content, bytes) else archive(pickled({"args": content}))
    write_dcp(folder, common=data)


def write_contexts() -> dict[str, Callable[[Path], None]]:
    """A good one of every kind."""
    kinds: dict[str, tuple[Callable[[Path, Any], None], Any]] = {
        "io_json": (io_json, document()),
        "model_yaml": (model_yaml, MODEL_YAML),
        "run_config": (run_config, RUN_CONFIG),
        "model_config": (model_config, NEMO_1),
        "neox_yml": (neox_yml, NEOX),
        "config_json": (config_json, {"model_type": "bert", "hidden_size": 4}),
        "common_args": (common_args, ARGS),
    }
    return {
        name: lambda folder, w=write, c=said: w(folder, c) for name, (write, said) in kinds.items()
    }
