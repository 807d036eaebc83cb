"""What lies beside weights in another dialect, and under which names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bioinit.config import TrainableModelConfig
from bioinit.contexts import CARRIED_FILES, SIDECAR, TOKENIZER_FILES
from bioinit.contexts.protocol import Context
from bioinit.families.protocol import Dialect, ReadFields, Written
from bioinit.record import same, specs
from bioinit.storage import File, Folder

SAYS_DTYPE: Mapping[str, Callable[[torch.dtype], Mapping[str, Any]]] = {
    "hf": lambda dtype: {"dtype": str(dtype).removeprefix("torch.")},
    "nemo2": lambda dtype: {
        "params_dtype": str(dtype),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    },
}
"""What the saved config of a dialect says of the weights' dtype, where it says anything."""

OURS = "bioinit"
"""The dialect of what bioinit itself says of a model."""

_AT_THE_TOP = ("hf",)
_CONTEXT = "context"
_FORGOTTEN = ("carried", "unknown")
_SCALAR = (str, int, float, bool, type(None))


class Beside(NamedTuple):
    """Files as bytes and files that are copied, by their paths in the output."""

    written: Written
    made: Mapping[str, bytes]
    copied: Mapping[str, File]
    homes: tuple[Folder, ...]


def beside(
    dialect: Dialect,
    to: str,
    config: TrainableModelConfig,
    dtype: torch.dtype | None,
    *,
    fields: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, File],
    homes: tuple[Folder, ...],
) -> Beside:
    """Everything but weights and receipt.

    Args:
        dialect: one that is written.
        to: its name.
        config: what the weights are, in the family's words.
        dtype: what most elements will be, for worlds whose saved config says it.
        fields: what only one world has a word for, by that world's dialect.
        files: files that go along, by their usual names.
        homes: the folders that these come from.

    Raises:
        ConfigError: the dialect ``to`` cannot express a field of the config.
    """
    names = [name for name in files if name in TOKENIZER_FILES]
    said = {} if dtype is None or to not in SAYS_DTYPE else SAYS_DTYPE[to](dtype)
    assert dialect.write is not None
    written = dialect.write(config, {**fields.get(to, {}), **said}, names)
    elsewhere = "" if to in _AT_THE_TOP else _CONTEXT
    places = {
        name: "/".join(filter(None, (written.tokenizer if name in names else elsewhere, name)))
        for name in files
    }
    carried = {world: found for world, found in fields.items() if world not in (to, OURS)}
    unsaid = _unsaid(config, dialect)
    if unsaid:
        carried[OURS] = unsaid
    moved = {n: place for n, place in places.items() if n != place and n in CARRIED_FILES}
    made = dict(written.files)
    if carried or moved:
        document = {"carried": carried, "files": moved}
        made[SIDECAR] = json.dumps(document, indent=1, default=str).encode() + b"\n"
    return Beside(written, made, {places[name]: file for name, file in files.items()}, homes)


def _unsaid(config: TrainableModelConfig, dialect: Dialect) -> dict[str, Any]:
    """Fields of ours that the dialect has no word for, or one word for several values."""
    said = {*dialect.says.difference(dialect.blurs), "extra"}
    found = {}
    for name, spec in specs(type(config)).items():
        value = getattr(config, name)
        if name in said or spec.marks.own or not isinstance(value, _SCALAR):
            continue
        # What the class derives all the same would only stand in the way of a change.
        if spec.marks.derive is None or not same(value, spec.marks.derive(config)):
            found[name] = value
    return found


def carried_fields(
    context: Context | None, saved: ReadFields | None
) -> dict[str, Mapping[str, Any]]:
    """What an earlier conversion carried along, and what of this saved config nobody maps."""
    if context is None or saved is None:
        return {}
    found = {dialect: dict(fields) for dialect, fields in context.sidecar.items()}
    if context.dialect == OURS:
        return dict(found)
    own = {
        field.name: context.data[field.name]
        for field in saved.account
        if field.fate in _FORGOTTEN and field.name in context.data
    }
    if own:
        found[context.dialect] = own
    return dict(found)


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into ``folder``."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
