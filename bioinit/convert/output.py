"""What lies beside the weights of a conversion's result, and under which names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from bioinit.contexts import TOKENIZER_FILES
from bioinit.convert.source import Source
from bioinit.errors import StorageError
from bioinit.families.protocol import Written
from bioinit.save.beside import SAYS_DTYPE, Beside
from bioinit.save.beside import beside as beside_weights
from bioinit.storage import File, Folder


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
    return beside_weights(
        source.family.dialects[to],
        to,
        source.config,
        dtype,
        fields=source.carried,
        files=files,
        homes=homes,
    )


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
        fields |= SAYS_DTYPE["hf"](dtype)
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
