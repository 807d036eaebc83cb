"""NeMo 1's saved config: ``model_config.yaml`` in the root of a ``.nemo`` archive.

References to files saved along, ``nemo:<checksum>_tokenizer.model``, become the name of the file
beside the config. An interpolation that means another value of the file, ``${hidden_size}`` or
``${.model}``, becomes that value; one that would ask a resolver, ``${oc.env:HOME}``, stays text.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from bioinit.contexts._artifacts import CARRIED_FILES, inside
from bioinit.contexts._yaml import read_fields
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import File, Folder

_FILE = "model_config.yaml"
_OF_NEMO_2 = "context"
_OF_TOKENIZERS = (".model", ".txt", ".vocab")
_PREFIX = "nemo:"
_CHECKSUM = re.compile(r"[0-9a-f]{32}_(?=.)")
_NAMES = {
    "merge_file": "merges.txt",
    "merges_file": "merges.txt",
    "model": "tokenizer.model",
    "tokenizer_model": "tokenizer.model",
}
_INTERPOLATION = re.compile(r"\$\{([^${}:]{1,200})\}")
_BRACKET = re.compile(r"\[(\w+)\]")
_ESCAPED = "\\$"
_DEEPEST = 16
_MOST_LETTERS = 1 << 20
_PER_LOOK_UP = 16
_LONGEST = 1000
_LONGEST_PATH = 250
_MISSING = object()
_SCALAR = (str, int, float, bool, type(None))

Path = tuple[Any, ...]


def _read(folder: Folder) -> Context | None:
    if folder.is_file or not folder.has(_FILE) or folder.path.name == _OF_NEMO_2:
        return None
    where = str(folder.path / _FILE)
    fields = read_fields(folder, _FILE)
    if isinstance(fields.get("_target_"), str):  # NeMo 2's, by another name
        return None
    artifacts = _Artifacts(folder, where)
    data = artifacts.of(_Interpolated(fields, where).of(fields, ()), ())
    target = data.get("target")
    return Context(
        dialect="nemo1",
        where=where,
        data=data,
        model=target if isinstance(target, str) else None,
        tree={"model": data},
        carried=artifacts.carried,
    )


class _Interpolated:
    """Puts values in place of what means them. Only scalars are: a config stays its own size."""

    def __init__(self, root: dict[str, Any], where: str) -> None:
        self.root = root
        self.where = where
        self.letters = 0

    def of(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self.of(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, (*path, i)) for i, item in enumerate(value)]
        return self.text(value, path, ()) if isinstance(value, str) else value

    def text(self, text: str, path: Path, active: tuple[Path, ...]) -> Any:
        if len(text) > _LONGEST or "${" not in text or _ESCAPED in text:
            return text
        if path in active or len(active) > _DEEPEST:
            way = " -> ".join(".".join(map(str, one)) for one in (*active, path))
            raise CorruptCheckpoint(
                f"{self.where}: the value of {'.'.join(map(str, path)):.80} means itself "
                f"({way:.300}). Correct it, or fetch it again."
            )
        active = (*active, path)
        whole = _INTERPOLATION.fullmatch(text)
        if whole is not None:
            found = self.meant(whole[1], path, active)
            return text if found is _MISSING else found

        def spelled(match: re.Match[str]) -> str:
            found = self.meant(match[1], path, active)
            said = match[0] if found is _MISSING else str(found)
            self.spend(len(said))
            return said

        return _INTERPOLATION.sub(spelled, text)

    def spend(self, letters: int) -> None:
        self.letters += letters
        if self.letters > _MOST_LETTERS:
            raise CorruptCheckpoint(
                f"{self.where}: its interpolations spell more than {_MOST_LETTERS} letters. "
                "Correct it, or fetch it again."
            )

    def meant(self, expression: str, path: Path, active: tuple[Path, ...]) -> Any:
        """The scalar that ``expression`` means at ``path``."""
        self.spend(_PER_LOOK_UP)
        name = expression.strip()
        steps = len(name) - len(name.lstrip("."))
        keys = [key for key in _BRACKET.sub(r".\1", name[steps:]).split(".") if key]
        if steps > len(path) or not keys:
            return _MISSING
        at = (*path[: len(path) - steps], *keys) if steps else tuple(keys)
        found = self.lookup(at)
        if found is _MISSING and not steps and keys[0] == "model":
            # The file is what stood under `model` when the run was set up.
            at = at[1:]
            found = self.lookup(at)
        if not isinstance(found, _SCALAR):
            return _MISSING
        return self.text(found, at, active) if isinstance(found, str) else found

    def lookup(self, path: Path) -> Any:
        found: Any = self.root if path else _MISSING
        for key in path:
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and str(key).isdecimal() and len(str(key)) < 9:
                index = int(key)
                found = found[index] if index < len(found) else _MISSING
            else:
                return _MISSING
        return found


class _Artifacts:
    """Turns references to files saved along into their names, and finds the tokenizer."""

    def __init__(self, folder: Folder, where: str) -> None:
        self.folder = folder
        self.where = where
        self.carried: dict[str, File] = {}

    def of(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self.of(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, str) and len(value) <= _LONGEST_PATH and value.startswith(_PREFIX):
            return self.followed(value, path)
        return value

    def followed(self, text: str, path: Path) -> str:
        name = text.removeprefix(_PREFIX)
        found = inside(name, self.where, ".".join(map(str, path)))
        plain = str(found)
        if not self.folder.has(plain):
            return text
        own = _CHECKSUM.sub("", found.name, count=1)
        key = path[-1] if path else ""
        named = _NAMES.get(key) if isinstance(key, str) and "tokenizer" in path else None
        fits = named is not None and PurePosixPath(named).suffix == PurePosixPath(own).suffix
        output = str(named) if fits else own
        # Another name could stand for weights, a config or code in what is written.
        if output in CARRIED_FILES or PurePosixPath(output).suffix in _OF_TOKENIZERS:
            self.carried.setdefault(output, self.folder.file(plain))
        return plain


CONTEXT = ContextKind(read=_read, rank=3)
