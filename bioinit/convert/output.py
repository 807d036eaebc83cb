"""What lies beside the weights of a conversion's result, and under which names."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bioinit.contexts import SIDECAR, TOKENIZER_FILES
from bioinit.convert.source import OURS, Source
from bioinit.errors import StorageError
from bioinit.families.protocol import Written
from bioinit.record import specs
from bioinit.storage import File, Folder

_AT_THE_TOP = ("hf",)
_SAYS_DTYPE: Mapping[str, Callable[[torch.dtype], Mapping[str, Any]]] = {
    "hf": lambda dtype: {"dtype": str(dtype).removeprefix("torch.")},
    "nemo2": lambda dtype: {
        "params_dtype": str(dtype),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    },
}
_CONTEXT = "context"
_SCALAR = (str, int, float, bool, type(None))


class Beside(NamedTuple):
    """Files as bytes and files that are copied, by their paths in the output."""

    written: Written
    made: Mapping[str, bytes]
    copied: Mapping[str, File]
    homes: tuple[Folder, ...]


def beside(
    source: Source, to: str, tokenizer: str | Path | None, dtype: torch.dtype | None
) -> Beside:
    """Everything but weights and receipt.

    Args:
        source: what is converted.
        to: the dialect.
        tokenizer: a folder or file, whose tokenizer takes the place of the source's.
        dtype: what most elements will be, for worlds whose saved config says it.

    Raises:
        ConfigError: the dialect ``to`` cannot express a field of the config.
        StorageError: there is no tokenizer in the folder that was given.
    """
    context = source.context
    files: dict[str, File] = {} if context is None else dict(context.carried)
    homes = source.checkpoint.homes
    if tokenizer is not None:
        files, homes = _with_tokenizer(files, homes, tokenizer)
    names = [name for name in files if name in TOKENIZER_FILES]
    write = source.family.dialects[to].write
    assert write is not None
    said = {} if dtype is None or to not in _SAYS_DTYPE else _SAYS_DTYPE[to](dtype)
    written = write(source.config, {**source.carried.get(to, {}), **said}, names)
    elsewhere = "" if to in _AT_THE_TOP else _CONTEXT
    places = {
        name: "/".join(filter(None, (written.tokenizer if name in names else elsewhere, name)))
        for name in files
    }
    apart = (to, OURS)
    carried = {
        dialect: fields for dialect, fields in source.carried.items() if dialect not in apart
    }
    unsaid = _unsaid(source, to)
    if unsaid:
        carried[OURS] = unsaid
    moved = {name: place for name, place in places.items() if name != place}
    made = dict(written.files)
    if carried or moved:
        document = {"carried": carried, "files": moved}
        made[SIDECAR] = json.dumps(document, indent=1, default=str).encode() + b"\n"
    return Beside(written, made, {places[name]: file for name, file in files.items()}, homes)


def _unsaid(source: Source, to: str) -> dict[str, Any]:
    """Fields of ours that the dialect ``to`` has no word for."""
    said = {*source.family.dialects[to].fields.values(), "extra"}
    found = {}
    for name, spec in specs(type(source.config)).items():
        value = getattr(source.config, name)
        if name in said or spec.marks.own or not isinstance(value, _SCALAR):
            continue
        if spec.marks.derive is None:
            found[name] = value
    return found


def as_it_is(source: Source, tokenizer: str | Path | None, dtype: torch.dtype | None) -> Beside:
    """The saved config and what goes with it, unchanged but for the dtype and the tokenizer."""
    context = source.context
    files: dict[str, File] = {} if context is None else dict(context.carried)
    homes = source.checkpoint.homes
    if tokenizer is not None:
        files, homes = _with_tokenizer(files, homes, tokenizer)
    fields = {} if context is None else dict(context.data)
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields |= _SAYS_DTYPE["hf"](dtype)
    made = {"config.json": json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"}
    return Beside(Written({}), made, files, homes)


def _with_tokenizer(
    files: Mapping[str, File], homes: tuple[Folder, ...], tokenizer: str | Path
) -> tuple[dict[str, File], tuple[Folder, ...]]:
    """``files`` with the tokenizer in ``tokenizer`` for theirs, and whose files they all are."""
    given = Folder.at(tokenizer)
    others = {name: file for name, file in files.items() if name not in TOKENIZER_FILES}
    return others | _tokenizer(given), (*homes, given.around or given)


def _tokenizer(folder: Folder) -> dict[str, File]:
    names: Collection[str] = folder.names()
    if folder.is_file:
        [name] = names
        usual = name if name in TOKENIZER_FILES else _usual(name)
        return {usual: folder.file(name)}
    found = {name: folder.file(name) for name in names if name in TOKENIZER_FILES}
    if not found:
        raise StorageError(
            f"{folder.path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}. Point at the "
            "folder, or the file, that the tokenizer's own library reads."
        )
    return found


def _usual(name: str) -> str:
    suffix = name.rpartition(".")[2]
    return {"model": "tokenizer.model", "json": "tokenizer.json", "txt": "vocab.txt"}.get(
        suffix, name
    )


def put(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` into ``folder``."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
