"""The context of Hugging Face checkpoints: ``config.json``, and the files that go with it."""

from __future__ import annotations

from typing import Any

from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import Folder

_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_CARRIED = (
    _GENERATION,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def _read(folder: Folder) -> Context | None:
    if not folder.has(_CONFIG):
        return None
    data = _mapping(folder, _CONFIG)
    tree: dict[str, Any] = {"model": data}
    if folder.has(_GENERATION):
        tree["generation"] = _mapping(folder, _GENERATION)
    model = data.get("model_type")
    return Context(
        dialect="hf",
        where=str(folder.path / _CONFIG),
        data=data,
        model=model if isinstance(model, str) else None,
        tree=tree,
        carried=tuple(name for name in _CARRIED if folder.has(name)),
    )


def _mapping(folder: Folder, name: str) -> dict[str, Any]:
    data = folder.read_json(name)
    if not isinstance(data, dict):
        raise CorruptCheckpoint(
            f"{folder.path / name} holds a {type(data).__name__}, not a config. Fetch it again."
        )
    return data


CONTEXT = ContextKind(read=_read)
