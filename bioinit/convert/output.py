"""What lies beside the weights of a conversion's result, and under which names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from bioinit.contexts import SIDECAR, TOKENIZER_FILES
from bioinit.convert.source import Source
from bioinit.errors import StorageError
from bioinit.families.protocol import Written
from bioinit.storage import File, Folder

_AT_THE_TOP = ("hf",)
_CONTEXT = "context"


class Beside(NamedTuple):
    """Files as bytes and files that are copied, by their paths in the output."""

    written: Written
    made: Mapping[str, bytes]
    copied: Mapping[str, File]
    homes: tuple[Folder, ...]


def beside(source: Source, to: str, tokenizer: str | Path | None) -> Beside:
    """Everything but weights and receipt.

    Raises:
        ConfigError: the dialect ``to`` cannot express a field of the config.
        StorageError: there is no tokenizer in the folder that was given.
    """
    context = source.context
    files: dict[str, File] = {} if context is None else dict(context.carried)
    homes = source.checkpoint.homes
    if tokenizer is not None:
        given = Folder.at(tokenizer)
        files = {name: file for name, file in files.items() if name not in TOKENIZER_FILES}
        files |= _tokenizer(given)
        homes = (*homes, given)
    names = [name for name in files if name in TOKENIZER_FILES]
    write = source.family.dialects[to].write
    assert write is not None
    written = write(source.config, source.carried.get(to, {}), names)
    elsewhere = "" if to in _AT_THE_TOP else _CONTEXT
    places = {
        name: "/".join(filter(None, (written.tokenizer if name in names else elsewhere, name)))
        for name in files
    }
    carried = {dialect: fields for dialect, fields in source.carried.items() if dialect != to}
    moved = {name: place for name, place in places.items() if name != place}
    made = dict(written.files)
    if carried or moved:
        document = {"carried": carried, "files": moved}
        made[SIDECAR] = json.dumps(document, indent=1, default=str).encode() + b"\n"
    return Beside(written, made, {places[name]: file for name, file in files.items()}, homes)


def as_it_is(source: Source) -> Beside:
    """The saved config and what goes with it, unchanged."""
    context = source.context
    found = next((home for home in source.checkpoint.homes if home.has("config.json")), None)
    files: dict[str, File] = {} if context is None else dict(context.carried)
    if found is not None:
        files["config.json"] = found.file("config.json")
    return Beside(Written({}), {}, files, source.checkpoint.homes)


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
