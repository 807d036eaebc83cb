"""The context of Hugging Face checkpoints: ``config.json``, and the files that go with it."""

from __future__ import annotations

import os
from typing import Any

from bioinit.contexts._artifacts import CARRIED_FILES
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CorruptCheckpoint
from bioinit.record.notation import require_shallow
from bioinit.storage import Folder

_CONFIG = "config.json"
_GENERATION = "generation_config.json"


def _read(folder: Folder) -> Context | None:
    if not folder.has(_CONFIG):
        if not folder.is_file and os.path.lexists(folder.path / _CONFIG):
            raise CorruptCheckpoint(
                f"{folder.path / _CONFIG} is there and cannot be read: it is no file. Put the "
                "checkpoint's config.json in its place."
            )
        return None
    data = _mapping(folder, _CONFIG)
    named = data.get("architectures")
    if isinstance(named, str):
        data["architectures"] = named = [named]
    if not isinstance(named, list | None) or not all(isinstance(name, str) for name in named or ()):
        raise CorruptCheckpoint(
            f"{folder.path / _CONFIG}: architectures is {named!r:.200}, not a list of class names. "
            'Correct it, as in ["EsmForMaskedLM"], or take it out.'
        )
    if not isinstance(data.get("id2label"), dict | None):
        raise CorruptCheckpoint(
            f"{folder.path / _CONFIG}: id2label is {data['id2label']!r:.200}, not a mapping of "
            "numbers to names. Correct it or take it out."
        )
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
        carried={name: folder.file(name) for name in CARRIED_FILES if folder.has(name)},
    )


def _mapping(folder: Folder, name: str) -> dict[str, Any]:
    data = folder.read_json(name)
    if not isinstance(data, dict):
        raise CorruptCheckpoint(
            f"{folder.path / name} holds a {type(data).__name__}, not a config. Fetch it again."
        )
    require_shallow(data, str(folder.path / name))
    return data


CONTEXT = ContextKind(read=_read)
