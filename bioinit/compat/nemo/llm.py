"""Stands in for two functions of ``nemo.collections.llm``: checkpoints in, checkpoints out.

They differ from those of :mod:`bioinit.compat.nemo.io` in one thing: a place that a person named
and where something stands is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bioinit.compat.nemo.io import _registry
from bioinit.compat.nemo.io._registry import load_connector_from_trainer_ckpt
from bioinit.errors import StorageError

__all__ = ["AlreadyThere", "export_ckpt", "import_ckpt", "load_connector_from_trainer_ckpt"]


class AlreadyThere(StorageError, FileExistsError):
    """Something stands at a place that a person named."""


def import_ckpt(
    model: Any,
    source: str,
    output_path: str | Path | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Convert ``source`` for ``model``: stands in for ``nemo.collections.llm.import_ckpt``.

    Nothing is printed. See :func:`bioinit.compat.nemo.io.import_ckpt`.

    Raises:
        AlreadyThere: ``output_path`` exists, and ``overwrite`` is not set; it is a
            ``FileExistsError`` too.
    """
    _require_free(output_path, overwrite)
    return _registry.import_ckpt(model, source, output_path, overwrite, **kwargs)


def export_ckpt(
    path: str | Path,
    target: str,
    output_path: str | Path | None = None,
    overwrite: bool = False,
    load_connector: Callable[[Path, str], Any] = load_connector_from_trainer_ckpt,
    modelopt_export_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write ``path`` as ``target``: stands in for ``nemo.collections.llm.export_ckpt``.

    Nothing is printed. What differs: an ``output_path`` that is a ``Path`` is looked at too, not
    only a text. See :func:`bioinit.compat.nemo.io.export_ckpt`.

    Raises:
        AlreadyThere: ``output_path`` exists, and ``overwrite`` is not set.
    """
    _require_free(output_path, overwrite)
    return _registry.export_ckpt(
        path, target, output_path, overwrite, load_connector, modelopt_export_kwargs, **kwargs
    )


def _require_free(place: str | Path | None, overwrite: bool) -> None:
    if place and Path(place).exists() and not overwrite:
        raise AlreadyThere(
            f"Output path {place} exists. Use overwrite=True to force overwrite, or choose another."
        )


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}. Of nemo.collections.llm only the ways of "
        "checkpoints in and out are here; its models are families of bioinit, which a recipe "
        "names: see docs/migration.md."
    )
