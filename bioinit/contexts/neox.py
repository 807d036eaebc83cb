"""GPT-NeoX's saved config: the YAML files in ``configs/``, or one beside the weights.

All files count together, as NeoX merges them; the same key with two values is an error, as it is
for NeoX. Keys are given with underscores (``num_layers``) whether they were written with dashes or
not. Savanna, which trained Evo 2, writes the same.
"""

from __future__ import annotations

import re
from typing import Any

from bioinit.contexts._yaml import LARGEST, read_fields
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import File, Folder

_FOLDER = "configs"
_SUFFIXES = (".yml", ".yaml")
_MOST_FILES = 64
_LAYERS = re.compile(r"(?<![\w-])num[-_]layers[\"']?\s*:")
_HIDDEN = re.compile(r"(?<![\w-])hidden[-_]size[\"']?\s*:")
_ITS_OWN = re.compile(
    r"(?<![\w-])((pipe|model)[-_]parallel[-_]size|num-layers|pos[-_]emb|operator[-_]config"
    r"|train_micro_batch_size_per_gpu)[\"']?\s*:"
)
_OF_OTHERS = ("model_config.yaml", "run_config.yaml", "hparams.yaml")
_TOKENIZERS = ("tokenizer.json", "20B_tokenizer.json")
_TOKENIZER = re.compile(r"[\w.-]*tokenizer[\w.-]*\.json")


def _read(folder: Folder) -> Context | None:
    if folder.is_file:
        return None
    place = folder.folder(_FOLDER) if _FOLDER in folder.folders() else None
    names = () if place is None else _yamls(place)
    if place is None or not _is_neox(place, names):
        place, names = folder, tuple(name for name in _yamls(folder) if _is_neox(folder, (name,)))
    if not names:
        return None
    data, said = _merged(place, names)
    where = str(place.path / said["num_layers"] if "num_layers" in said else place.path)
    return Context(
        dialect="neox",
        where=where,
        data=data,
        model=None,
        tree={"model": data},
        raw={"said": {key: str(place.path / name) for key, name in said.items()}},
        carried=_tokenizer(folder, data),
    )


def _yamls(folder: Folder) -> tuple[str, ...]:
    found = [n for n in folder.names() if n.endswith(_SUFFIXES) and n not in _OF_OTHERS]
    return tuple(found[:_MOST_FILES])


def _is_neox(folder: Folder, names: tuple[str, ...]) -> bool:
    """Whether the text of these files has the keys of NeoX. They are parsed after that."""
    missing = [_LAYERS, _HIDDEN, _ITS_OWN]
    for name in names:
        file = folder.file(name)
        text = file.read(0, min(file.size, LARGEST)).decode("utf-8", "replace")
        missing = [pattern for pattern in missing if pattern.search(text) is None]
    return not missing


def _merged(folder: Folder, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of all files, and by field the file that says it first."""
    data: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name in names:
        for key, value in read_fields(folder, name).items():
            field = key.replace("-", "_")
            if field not in said:
                data[field], said[field] = value, name
            elif data[field] != value:
                raise CorruptCheckpoint(
                    f"{folder.path / said[field]} says that {field:.80} is {_shown(data[field])}, "
                    f"and {folder.path / name} says that it is {_shown(value)}. Take out the one "
                    "that the weights were not trained with."
                )
    return data, said


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else f"{value!r:.80}"


def _tokenizer(folder: Folder, data: dict[str, Any]) -> dict[str, File]:
    """The tokenizer beside the weights, under the name that others look for."""
    named = data.get("vocab_file")
    last = named.rpartition("/")[2] if isinstance(named, str) else ""
    found = [name for name in folder.names() if _TOKENIZER.fullmatch(name)]
    likely = [last] if last.endswith(".json") else []
    likely += [*_TOKENIZERS, *(found if len(found) == 1 else ())]
    name = next((name for name in likely if name in found), None)
    return {} if name is None else {"tokenizer.json": folder.file(name)}


CONTEXT = ContextKind(read=_read, rank=4)
