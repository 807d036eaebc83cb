"""Megatron-Bridge's ``run_config.yaml``."""

from pathlib import Path

import pytest

from bioinit.contexts import load_context
from bioinit.contexts.bridge import CONTEXT
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import Folder

AT = "megatron.bridge.models.llama.llama_provider"
TEXT = f"""
checkpoint:
  _target_: megatron.bridge.training.config.CheckpointConfig
  save: /results/x
model:
  _target_: {AT}.Llama32ModelProvider1B
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  attention_backend:
    _args_:
    - 5
    _call_: true
    _name_: auto
    _target_: megatron.core.transformer.enums.AttnBackend
  older_enum:
    _args_: [5]
    _call_: true
    _target_: megatron.core.transformer.enums.AttnBackend
  generation_config:
    _call_: true
    _target_: transformers.GenerationConfig.from_dict
    config_dict: {{eos_token_id: 2}}
  init_method:
    _args_: []
    _partial_: true
    _target_: torch.nn.init.normal_
    std: 0.02
  num_layers: 16
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
  rotary_base: 5.0e+05
  window_size: null
train:
  _target_: megatron.bridge.training.config.TrainingConfig
  train_iters: 100
"""


def test_the_provider_s_fields_are_the_model_s(tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text(TEXT)
    context = CONTEXT.read(Folder.at(tmp_path))
    assert context is not None
    assert context.dialect == "bridge" and context.model == f"{AT}.Llama32ModelProvider1B"
    assert context.raw["canonical"] == f"{AT}.LlamaModelProvider"
    backend = "megatron.core.transformer.enums.AttnBackend"
    assert context.data == {
        "activation_func": "torch.nn.functional.silu",
        "attention_backend": f"{backend}.auto",
        "older_enum": {"_target_": backend, "_args_": [5]},
        "generation_config": {
            "_target_": "transformers.GenerationConfig.from_dict",
            "config_dict": {"eos_token_id": 2},
        },
        "init_method": {
            "_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "std": 0.02,
        },
        "num_layers": 16,
        "params_dtype": "torch.bfloat16",
        "rotary_base": 5e5,
        "window_size": None,
    }  # fmt: skip
    assert load_context(tmp_path, "train.train_iters") == 100
    assert load_context(tmp_path, "model.config.num_layers") == 16


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", CorruptCheckpoint, "nothing"),
        ("train: {}", CorruptCheckpoint, "missing"),
        ("model: [1]", CorruptCheckpoint, "a list"),
        ("model: {_target_: a.b, _call_: false}", CorruptCheckpoint, "a str"),
        ("model: {1: 2}", CorruptCheckpoint, "a dict"),
        ("model: !!python/object:a.B {}", RefusedCheckpoint, "a.B"),
        ("_target_: a\n_call_: false\nmodel: {}", CorruptCheckpoint, "missing"),
    ],
)
def test_a_file_without_a_model_is_turned_down(
    tmp_path: Path, text: str, error: type[Exception], says: str
) -> None:
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(error, match=rf"run_config\.yaml.*{says}"):
        CONTEXT.read(Folder.at(tmp_path))
