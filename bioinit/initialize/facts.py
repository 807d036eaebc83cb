"""What ranks that start one model must have in common, before any of them reads a weight."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bioinit.config import InitPolicy, Run
from bioinit.contexts import Checkpoint
from bioinit.version import __version__

_LIBRARIES = ("transformers", "megatron-core")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_OF_EACH = ("model.initial_ckpt_path", "output_dir")
"""Paths may be mounted elsewhere on another host: what lies there is compared instead."""


def facts(
    run: Run,
    checkpoint: Checkpoint | None,
    parallelize: Callable[..., Any] | None,
    kept: str | None = None,
) -> dict[str, str]:
    """Everything that decides what is planned, by a name that people know.

    Args:
        run: the run, with its model as it was given.
        checkpoint: is compared by its digest, which covers headers, sizes and modification times.
        parallelize: the caller's own way to divide the model.
        kept: what the checkpoint was made of, if it was converted once: on another host its files
            may have been made at another time.
    """
    found = {key: _said(value) for key, value in _fields("", run) if key not in _OF_EACH}
    # Where it lies may differ, whether it is there decides what ranks do together.
    found["output_dir"] = "not set" if run.output_dir is None else "set"
    found |= _common(checkpoint)
    if kept is not None:
        found["checkpoint"] = kept
    if parallelize is not None:
        found["parallelize"] = _said(parallelize)
    return found


def loading_facts(
    init: InitPolicy, skip_prefixes: tuple[str, ...], checkpoint: Checkpoint
) -> dict[str, str]:
    """As :func:`facts`, for weights that are loaded into a module that exists."""
    found = {key: _said(value) for key, value in _fields("", init)}
    return {**found, "skip_prefixes": _said(skip_prefixes), **_common(checkpoint)}


def _common(checkpoint: Checkpoint | None) -> dict[str, str]:
    found = {
        "checkpoint": "none" if checkpoint is None else checkpoint.digest,
        "bioinit": __version__,
        "torch": torch.__version__,
    }
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def _fields(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        inner = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name != "origins"
        }
    elif isinstance(value, Mapping):
        inner = dict(value)
    else:
        yield path, value
        return
    for name, held in inner.items():
        yield from _fields(f"{path}.{name}" if path else str(name), held)


def _said(value: Any) -> str:
    """Its repr without the address of an object, which is another one in every process."""
    return _ADDRESS.sub("", repr(value))
