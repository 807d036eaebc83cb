"""``config.json`` as a saved config."""

import json
from pathlib import Path

from bioinit.contexts.hf import CONTEXT
from bioinit.storage import Folder


def test_a_config_json_is_read_as_data_with_what_goes_along(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 4, "auto": {"nested": [1]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    for name in ("tokenizer.json", "vocab.txt", "notes.txt"):
        (tmp_path / name).write_text("")
    context = CONTEXT.read(Folder.at(tmp_path))
    assert context is not None
    assert (context.dialect, context.model, context.data) == ("hf", "bert", config)
    assert context.where == str(tmp_path / "config.json")
    assert context.tree == {"model": config, "generation": {"eos_token_id": 2}}
    assert list(context.carried) == ["generation_config.json", "tokenizer.json", "vocab.txt"]


def test_a_model_type_that_is_no_text_is_no_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ["bert"]}')
    context = CONTEXT.read(Folder.at(tmp_path))
    assert context is not None and context.model is None
