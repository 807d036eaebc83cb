"""A model by its name on the Hugging Face hub, as a folder on this machine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from bioinit.errors import StorageError

_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".nemo", ".distcp", ".gguf", ".h5")


def local_folder(name: str, *, revision: str | None = None) -> Path:
    """Where the files of ``name`` lie: a path as it is, a name on the hub once it has been fetched.

    What the hub's own cache holds is taken without asking the network, if the weights are there:
    who asked for a tokenizer alone has left no model.

    Args:
        name: a path; or ``ORG/NAME``, also ``ORG/NAME@REVISION``.
        revision: a branch, a tag or a commit; what follows ``@`` in the name if None.

    Raises:
        StorageError: the path is not there; ``huggingface_hub`` is not installed; or the name is
            not in its cache and cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(("/", "~", ".")) or name.count("/") > 1:
        raise StorageError(f"cannot read {name}: there is no such file or folder. Check the path.")
    found = in_cache(name, revision=revision)
    if found is not None:
        return found
    hub = _library(name)
    repository, commit = _parted(name, revision)
    try:
        return Path(hub.snapshot_download(repository, revision=commit))
    except Exception as error:  # of the network, of the hub, of the disk: one cure for all
        said = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise StorageError(
            f"cannot fetch {name} from the Hugging Face hub: {said[0]} Check the name, your "
            "network and your access (huggingface-cli login), or fetch it on another machine and "
            "give the path of its folder."
        ) from error


def in_cache(name: str, *, revision: str | None = None, whole: bool = True) -> Path | None:
    """The folder of ``name`` in the hub's cache here; None without it, or without its weights.

    Args:
        name: as above.
        revision: as above.
        whole: whether the weights have to be there.
    """
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        return None
    repository, commit = _parted(name, revision)
    try:
        found = hub.snapshot_download(repository, revision=commit, local_files_only=True)
    except (OSError, ValueError):  # it is not there, or not a name of the hub's
        return None
    return Path(found) if not whole or _has_weights(Path(found)) else None


def _has_weights(folder: Path) -> bool:
    """Whether there are weights, and all that an index there tells of."""
    try:
        told = [json.loads(index.read_bytes()) for index in folder.glob("*.index.json")]
        files = {name for index in told for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = set()  # who reads it will say what is wrong with it
    if all((folder / name).exists() for name in files) and files:
        return True
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    return not files and not kinds.isdisjoint(_OF_WEIGHTS)


def _parted(name: str, revision: str | None) -> tuple[str, str | None]:
    repository, _, commit = name.partition("@")
    return repository, revision or commit or None


def _library(name: str) -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise StorageError(
            f"cannot fetch {name}: huggingface_hub is not installed. Install it (pip install "
            "huggingface_hub), or give the path of a folder on this machine."
        ) from error
