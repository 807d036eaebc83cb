"""A saved context: the folder ``context/`` beside the weights.

``record.json`` is read back; ``model.yaml`` is for people and shows every field, defaults included.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import fiddle as fdl
import yaml

from bioinit.errors import ConfigError, CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.record import names
from bioinit.record.door import record_of
from bioinit.record.fields import Origin, is_config, label, set_in, specs
from bioinit.record.live import build, changed_behind
from bioinit.record.notation import SET, decode_config, encode_config, require_readable
from bioinit.storage import Folder, disk_error

CONTEXT_FOLDER = "context"
RECORD_FILE = "record.json"
_MODEL_FILE = "model.yaml"
_VERSION = 1


def save_context(
    config: Any, folder: str | Path, origins: Mapping[str, Origin] | None = None
) -> Path:
    """Write ``context/`` into ``folder``: both files whole, or none.

    Args:
        config: a record or a live config, of a model or of a whole run.
        folder: where the weights lie; it is made if need be.
        origins: who set which dotted key of the run; the record of a run knows it by itself.

    Returns:
        The path of ``context/``.

    Raises:
        ConfigError: a value cannot be written down, or a field was assigned to directly, so that
            the record does not know it.
        StorageError: the file system refused.
    """
    for name, (recorded, held) in changed_behind(config).items():
        raise ConfigError(
            f"{type(config).__name__}.{name} is {held!r}, but the record says {recorded!r}: it was "
            f"assigned to directly. Use set_hparam({name!r}, {held!r}), which changes both."
        )
    record = record_of(config)
    is_run = _is_run(fdl.get_callable(record))
    model = record.model if is_run else record
    root = encode_config(record, "") if is_run else {"$config": None, SET: {}}
    if not is_run:
        root[SET]["model"] = encode_config(record, "model")
    origins = {**(record.origins if is_run else {}), **(origins or {})}
    document = {
        "bioinit_context": _VERSION,
        "record": root,
        "origins": {key: {"by": o.by, "where": o.where} for key, o in origins.items()},
    }
    texts = {
        RECORD_FILE: json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        _MODEL_FILE: _readable(model),
    }
    target = Path(folder) / CONTEXT_FOLDER
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            half = target / f".{name}.{os.getpid()}.partial"
            half.write_text(text, encoding="utf-8")
            half.replace(target / name)
    except OSError as error:
        raise disk_error(error, f"write {target}") from error
    return target


def load_record(folder: str | Path | Folder, cls: type, *, model: type | None = None) -> Any:
    """The record in a saved context, equal to the one that was saved.

    Args:
        folder: the folder that holds ``context/``, or that folder itself.
        cls: the config class of the model; or ``Run``, for the record of the whole run.
        model: the config class of the model, when ``cls`` is ``Run``.

    Raises:
        StorageError: there is no saved context.
        CorruptCheckpoint: it is not what bioinit writes.
        ConfigError: it holds fields or values that the class does not know.
    """
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    found = read_context(place)
    if found is None:
        raise StorageError(
            f"{place.path} holds no {CONTEXT_FOLDER}/{RECORD_FILE}. Give the folder that bioinit "
            "wrote, or the original recipe."
        )
    document, where = found
    if not _is_run(cls):
        return decode_config(model_node(document, where), cls, where)
    root = document["record"]
    if root.get("$config") is None:
        raise ConfigError(f"{where} holds a model's config and no run. Load it as that config.")
    node = model_node(document, where) if model is not None else None
    rest = {**root, SET: {k: v for k, v in root[SET].items() if k != "model" or node is None}}
    record = decode_config(rest, cls, where)
    if model is not None:
        record.model = decode_config(node, model, where)
    record.origins = {
        key: Origin(value["by"], value["where"]) for key, value in document["origins"].items()
    }
    return record


def read_context(folder: Folder) -> tuple[dict[str, Any], str] | None:
    """The parsed ``record.json`` of a folder and its path, or None if there is none.

    Raises:
        CorruptCheckpoint: it is not JSON, or not in our shape.
        RefusedCheckpoint: a newer bioinit wrote it.
    """
    place = folder
    if not folder.has(f"{CONTEXT_FOLDER}/{RECORD_FILE}"):
        if folder.is_file or folder.path.name != CONTEXT_FOLDER or not folder.has(RECORD_FILE):
            return None
    else:
        place = folder.folder(CONTEXT_FOLDER)
    where = str(place.path / RECORD_FILE)
    document = place.read_json(RECORD_FILE)
    if not isinstance(document, dict) or "bioinit_context" not in document:
        raise CorruptCheckpoint(f"{where} is no context of bioinit. Write it again with bioinit.")
    version = document["bioinit_context"]
    if version != _VERSION:
        raise RefusedCheckpoint(
            f"{where} is of version {version!r}, this bioinit reads version {_VERSION}. "
            "Install a newer bioinit."
        )
    node = model_node(document, where)
    if not isinstance(node, dict) or not isinstance(node.get("$config"), str | None):
        raise CorruptCheckpoint(f"{where}: the model is no config. Write it again with bioinit.")
    require_readable(document["record"], where)
    origins = document.get("origins")
    if not isinstance(origins, dict) or not all(_is_origin(o) for o in origins.values()):
        raise CorruptCheckpoint(f"{where}: 'origins' is not usable. Write it again with bioinit.")
    return document, where


def model_node(document: Mapping[str, Any], where: str) -> Any:
    """The node of the model's config in a parsed ``record.json``."""
    root = document.get("record")
    values = root.get(SET) if isinstance(root, Mapping) else None
    if not isinstance(values, Mapping) or "model" not in values:
        raise CorruptCheckpoint(f"{where} holds no model's config. Write it again with bioinit.")
    return values["model"]


def _is_origin(value: Any) -> bool:
    return isinstance(value, Mapping) and {"by", "where"} == value.keys()


def _is_run(cls: type) -> bool:
    known = specs(cls)
    return "model" in known and any(spec.marks.bookkeeping for spec in known.values())


def _readable(record: Any) -> str:
    live = build(record, at="model")
    kind = label(fdl.get_callable(record)) if isinstance(record, fdl.Config) else "a plain mapping"
    head = f"# {kind}\n# Every field and the value it had. {RECORD_FILE} is what is read back.\n"
    return head + yaml.safe_dump(shown(live), sort_keys=False, allow_unicode=True, width=100)


def shown(value: Any) -> Any:
    """``value`` as plain JSON data for people: names of dtypes and functions, lists of tuples."""
    if isinstance(value, fdl.Config):
        return {name: shown(item) for name, item in set_in(value).items()}
    if is_config(value) and not isinstance(value, type):
        return {s.name: shown(getattr(value, s.name)) for s in specs(type(value)).values()}
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple | list | set | frozenset):
        return [shown(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): shown(item) for key, item in value.items()}
    if callable(value) and not isinstance(value, PurePath):
        try:
            return names.name_of(value)
        except ConfigError:
            return label(value)
    return str(value).removeprefix("torch.")
