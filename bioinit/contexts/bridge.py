"""Megatron-Bridge's saved config: ``run_config.yaml`` beside the weights of a step.

The file holds the whole run: ``model`` (a provider of a model, every field of it), ``train``,
``checkpoint`` and the rest. A class stands under ``_target_``; functions, dtypes and members of
enums become their dotted names. ``Context.raw["canonical"]`` is the name of the provider's class
after moves and renames.
"""

from __future__ import annotations

from typing import Any

from bioinit.contexts._aliases import canonical
from bioinit.contexts._yaml import read_fields, unfolded
from bioinit.contexts.protocol import Context, ContextKind
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import Folder

_FILE = "run_config.yaml"
_MARKS = ("_target_", "_partial_")


def _read(folder: Folder) -> Context | None:
    if not folder.has(_FILE):
        return None
    where = str(folder.path / _FILE)
    tree = unfolded(read_fields(folder, _FILE))
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
        raise CorruptCheckpoint(
            f"{where} describes no model: 'model' is {_shown(model)}, not a mapping of fields. "
            "Fetch or write it again."
        )
    name = model.get("_target_")
    name = name if isinstance(name, str) else None
    return Context(
        dialect="bridge",
        where=where,
        data={key: value for key, value in model.items() if key not in _MARKS},
        model=name,
        tree=tree,
        raw={"canonical": None if name is None else canonical(name)},
    )


def _shown(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


CONTEXT = ContextKind(read=_read, rank=5)
