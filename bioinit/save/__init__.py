"""A model, its context and its receipt on disk: whole or not at all.

Everything is written into a hidden folder beside the final one, synced, and renamed into place. A
receipt lists every file with its digest; ``verify`` computes them again.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from bioinit.backends.protocol import Backend
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.ranks import ALONE, World
from bioinit.record import Origin, save_context
from bioinit.report import dumps
from bioinit.save.across import Across
from bioinit.save.folder import common_folder
from bioinit.save.plain import BY_BACKENDS, Plain
from bioinit.save.writing import write_weights
from bioinit.storage import MADE_OF, File, Folder, Journal, outside, worker_count

RECEIPT = "receipt.json"
MAX_SHARD_BYTES = 5 * 10**9
_ADDED = ("output", "files")
_NOTHING: Mapping[str, str] = {}


def save(
    model: nn.Module,
    path: str | Path,
    *,
    backend: Backend,
    record: Any,
    receipt: Mapping[str, Any],
    origins: Mapping[str, Origin] | None = None,
    across: Across | Plain | None = None,
    keep: Iterable[Path] = (),
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    world: World = ALONE,
) -> dict[str, Any]:
    """Write ``model``, its context, what it carries along and the receipt to ``path``.

    All ranks of ``world`` call it, with a file system that they share. What is no tensor is written
    by the first of them, and so are the tensors in every format but ``torch_dist``; it asks the
    others for a slab at a time. If one rank fails, nothing is left.

    Args:
        model: real everywhere.
        path: the folder to make; an existing one must be empty, or ``overwrite`` set.
        backend: who knows how such a model is written.
        record: what the next run will read as the saved config.
        receipt: the report's JSON; the digests of the written files are added to it.
        origins: who set which dotted key of the run; kept in the context.
        across: how the model is written, and what goes along; as its backend does it if None.
        keep: the files and folders of the checkpoint; ``path`` may not touch them.
        overwrite: replace a folder that is not empty.
        max_shard_bytes: the most bytes of one weight file.
        world: the ranks that have the model together.

    Returns:
        The receipt as it was written, on every rank.

    Raises:
        StorageError: the folder exists, or cannot be written; nothing is left under its name.
        PlanError: ``across`` has no place for something that the model holds.
        ConfigError: it has no word for a field of the config.
    """
    located = backend.located(model)
    across = across or Plain(backend)
    document: dict[str, Any] = {}
    with common_folder(path, world, overwrite=overwrite, keep=keep) as folder:
        if not world.rank:
            save_context(record, folder, origins)
        if isinstance(across, Plain) and across.is_by_backend(model, located, world):
            if not world.rank:
                backend.save(model, folder, max_shard_bytes)
                carry(folder, across.homes, across.files)
                document = with_receipt(folder, receipt)
        else:
            # A file of ours that people read makes room for one of that world by the same name.
            side, mine = write_weights(across, model, folder, max_shard_bytes, located, world)
            known: dict[str, str] = {}
            if world.size > 1:
                parts = world.gathered({name: _digest(folder / name) for name in mine})
                known = {name: digest for part in parts for name, digest in part.items()}
            if not world.rank:
                if isinstance(across, Plain):
                    backend.save_beside(model, folder)
                carry(folder, side.homes, side.copied)
                told = dict(receipt)
                if not isinstance(across, Plain) or across.format != BY_BACKENDS[1]:
                    told["output"] = {"dialect": across.to, "format": across.format}
                document = with_receipt(folder, told, known)
    # When this is known, the folder has its name.
    added = world.gathered({name: document[name] for name in _ADDED if name in document})[0]
    return {**receipt, **added}


def carry(folder: Path, homes: Sequence[Folder], carried: Mapping[str, File]) -> None:
    """Write files of a checkpoint into ``folder`` as they are, by the names that they get.

    Raises:
        RefusedCheckpoint: one is a link to what is no file of the checkpoint.
        StorageError: one cannot be read.
    """
    for name, file in carried.items():
        _require_its_own(homes, file)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file.read(0, file.size))


def with_receipt(
    folder: Path, receipt: Mapping[str, Any], known: Mapping[str, str] = _NOTHING
) -> dict[str, Any]:
    """Write ``receipt`` with the digests of all files of ``folder`` into it, and return it.

    Args:
        folder: what will be the output.
        receipt: the rest of it.
        known: digests that were made while files were written, by their paths in ``folder``.

    Raises:
        StorageError: a file cannot be read.
    """
    document = {**receipt, "files": _digests(folder, known)}
    (folder / RECEIPT).write_text(dumps(document) + "\n", encoding="utf-8")
    # Libraries write through private temporary files; whoever may read one may read all.
    mode = stat.S_IMODE((folder / RECEIPT).stat().st_mode)
    for name in _files_in(folder):
        if not (folder / name).is_symlink():
            (folder / name).chmod(mode)
    return document


def verify(path: str | Path) -> list[dict[str, str]]:
    """Compute the digests of a receipt again.

    Returns:
        One entry per file, ``{"path", "status": "unchanged"}``, when nothing has changed.

    Raises:
        CorruptCheckpoint: a file of the receipt changed or is missing, one was added that it does
            not list, or the receipt is unusable.
        StorageError: there is no receipt.
    """
    folder = Folder.at(path)
    if not folder.has(RECEIPT):
        raise StorageError(
            f"{folder.path} has no {RECEIPT}. Point at a folder that `bioinit init` wrote."
        )
    receipt = folder.read_json(RECEIPT)
    listed = receipt.get("files") if isinstance(receipt, dict) else None
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and {"path", "sha256", "bytes"} <= entry.keys() for entry in listed
    ):
        raise CorruptCheckpoint(
            f"{folder.path / RECEIPT} lists no files with digests. Write the model again."
        )
    here = Path(os.path.realpath(folder.path))
    found: list[dict[str, str]] = []
    for entry in listed:
        name = str(entry["path"])
        if not folder.has(name):
            status = "missing"
        elif Path(os.path.realpath(folder.path / name)) != here / name:
            status = "changed"  # a link, to whatever holds the same bytes today
        else:
            digest = _digest(folder.path / name)
            status = "unchanged" if digest == entry["sha256"] else "changed"
        found.append({"path": name, "status": status})
    known = {RECEIPT, MADE_OF, *(entry["path"] for entry in found)}
    added = (name for name in _files_in(folder.path) if name not in known)
    found.extend({"path": name, "status": "added"} for name in added)
    wrong = [
        f"{entry['path']} {entry['status']}" for entry in found if entry["status"] != "unchanged"
    ]
    if wrong:
        raise CorruptCheckpoint(
            f"{folder.path} is not what its receipt says: {', '.join(wrong)}. "
            "Write the model again, or fetch it again from where it came."
        )
    return found


def _require_its_own(homes: Sequence[Folder], file: File) -> None:
    """Refuse a link out of the checkpoint.

    Raises:
        RefusedCheckpoint: what ``file`` leads to is no file of the checkpoint.
    """
    real = outside(file.path, [home.path for home in homes])
    if real is not None:
        raise RefusedCheckpoint(
            f"{file.path} is a link to {real}, which is no file of the checkpoint, and it would be "
            "copied into the output. Put the file itself in the link's place, or remove the link."
        )


def _files_in(folder: Path) -> Iterator[str]:
    """Everything below ``folder`` that is no folder of its own, links too, in order."""
    for directory, inner, names in os.walk(folder):
        inner.sort()
        links = (name for name in inner if os.path.islink(os.path.join(directory, name)))
        for name in sorted((*names, *links)):
            yield (Path(directory) / name).relative_to(folder).as_posix()


def _digests(folder: Path, known: Mapping[str, str]) -> list[dict[str, Any]]:
    names = [name for name in _files_in(folder) if name != Journal.NAME]  # it is gone in the end
    with ThreadPoolExecutor(worker_count(), thread_name_prefix="bioinit") as pool:
        found = pool.map(lambda name: known.get(name) or _digest(folder / name), names)
        return [
            {"path": name, "bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, found, strict=True)
        ]


def _digest(file: Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(
            f"cannot read {file}: {error.strerror}. Check its permissions."
        ) from error
