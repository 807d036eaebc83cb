"""Whether the biases of GPT-NeoX's row-parallel layers are summands, or copies of one bias.

Its own tools, which others follow, add them up in every checkpoint. That is right where attention
and MLP are reduced together (``gpt_j_residual``), as in the 20B model; otherwise each partition
keeps a copy. What the tensors are is told by the settings alone, and often by nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bioinit.formats._partitions.said import argument
from bioinit.storage import File, Folder

_SETTING = "gpt_j_residual"
_CONFIGS = "configs"
_SUFFIXES = (".yml", ".yaml")
_MOST_FILES = 64
_MOST_TEXT = 1 << 20
# Every quantifier ends at what it may not hold or at the end of the line, so a line takes time in
# proportion to its length. A quote that is never closed holds the rest of the line.
_TOKEN = re.compile(r""""(?:[^"\\]|\\.)*"?|'[^']*'?|(?:(?<=\s)|^)\#.*|[\w.-]+|[^\s\w.-]""")
_NO = frozenset(("false", "no", "off", "n"))


def biases_are_copies(folder: Folder, said: Mapping[str, Any]) -> str:
    """What to tell people if a saved setting says that they are copies; empty if none does.

    The engine's saved arguments count first, then the YAML files beside the weights and in
    ``configs/`` here or next to this folder.
    """
    value = argument(said, _SETTING)
    if isinstance(value, bool):
        return "" if value else _doubt("the engine's saved arguments say")
    for name, file in _configs(folder):
        if any(_denies(file)):
            return _doubt(f"{name} says")
    return ""


def _doubt(who_says: str) -> str:
    return (
        "biases of row-parallel layers are the sum of their partitions, as in GPT-NeoX's own tools,"
        f" but {who_says} {_SETTING}: false, with which training keeps a copy in each"
    )


def _configs(folder: Folder) -> Iterator[tuple[str, File]]:
    outer = folder.parent
    places = [folder]
    for place in (folder, outer):
        if place is not None and _CONFIGS in place.folders():
            places.append(place.folder(_CONFIGS))
    left = _MOST_TEXT
    for place in places:
        names = [name for name in place.names() if name.endswith(_SUFFIXES)]
        for name in names[:_MOST_FILES]:
            file = place.file(name)
            if file.size <= left:
                left -= file.size
                yield name, file


def _denies(file: File) -> Iterator[bool]:
    """For each time the setting is given in a YAML or JSON text, whether it is switched off."""
    for line in file.read(0, file.size).decode("utf-8", "replace").splitlines():
        if "residual" not in line:
            continue
        tokens = [token.strip("\"'") for token in _TOKEN.findall(line)]
        for key, colon, value in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if colon == ":" and key.replace("-", "_") == _SETTING:
                yield value.lower() in _NO
