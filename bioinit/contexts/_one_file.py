"""A saved config that lies alone, under whatever name: shown to its kind under the usual one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bioinit.contexts.protocol import Context, ContextKind
from bioinit.storage import File, Folder

_USUAL = {
    "config.json": "config.json",
    "io.json": "context/io.json",
    "model.yaml": "context/model.yaml",
    "model_config.yaml": "model_config.yaml",
    "run_config.yaml": "run_config.yaml",
    "record.json": "context/record.json",
    "common.pt": "common.pt",
}
_YAML = (".yml", ".yaml")
_TARGET = re.compile(rb"^_target_:", re.MULTILINE)
_TABLE = re.compile(rb'"objects"\s*:')
_LOOKED_AT = 1 << 20


def read(folder: Folder, kinds: Sequence[ContextKind]) -> Context | None:
    """The saved config in ``folder``, a folder of one file; None if no kind knows it."""
    [name] = folder.names()
    file = folder.file(name)
    for usual in _names(name, file):
        shown = Folder.over(folder.path.parent, {usual: file})
        for kind in sorted(kinds, key=lambda kind: -kind.rank):
            found = kind.read(shown)
            if found is not None:
                return replace(found, where=str(folder.path))
    return None


def _names(name: str, file: File) -> Iterator[str]:
    """The names under which ``file`` may be known, the likeliest first."""
    if name in _USUAL:
        yield _USUAL[name]
        return
    start = file.read(0, min(file.size, _LOOKED_AT))
    if name.endswith(".json"):
        yield _USUAL["io.json" if _TABLE.search(start) else "config.json"]
    elif name.endswith(_YAML) and _TARGET.search(start):
        yield _USUAL["model.yaml"]
    elif name.endswith(_YAML):
        yield name
        yield _USUAL["model_config.yaml"]
    elif name.endswith(".pt"):
        yield name
        yield _USUAL["common.pt"]
