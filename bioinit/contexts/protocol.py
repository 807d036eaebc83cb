"""The seam for saved configs: how a checkpoint says what model it holds, as plain data.

A context is whatever the writer saved beside the weights (``config.json``, our ``context/``,
NeMo's ``io.json``, ...). It is parsed as data; nothing it names is imported. A new kind of context
is one new file in this folder that defines ``CONTEXT``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bioinit.storage import File, Folder


@dataclass(frozen=True)
class Context:
    """A saved config as plain data.

    ``dialect`` is whose spelling ``data`` uses (``hf``, ``bioinit``, ...); ``where`` is the file,
    for messages; ``model`` names the class or ``model_type`` that ``data`` describes, or None. The
    name is compared with names that we know and never imported.
    """

    dialect: str
    where: str
    data: Mapping[str, Any]
    """The model's fields by name."""
    model: str | None
    tree: Mapping[str, Any] = field(default_factory=dict)
    """Everything that was saved, the model's fields under ``model``."""
    raw: Any = None
    """The model's fields as the file writes them, where ``data`` says less."""
    carried: Mapping[str, File] = field(default_factory=dict)
    """Files that go along when the model is saved, by the name that they get: tokenizer, generation
    config."""
    beside: tuple[Context, ...] = ()
    """Other saved configs of the same checkpoint, which were not preferred."""
    sidecar: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By dialect, fields of its saved config that an earlier conversion carried along."""


@dataclass(frozen=True)
class ContextKind:
    """One kind of saved config.

    ``read`` is asked for every folder in which the checkpoint may keep one, that of the weights
    first. It returns None when the folder has none of this kind, and raises ``CheckpointError``
    when it has one that cannot be used. Where several kinds stand side by side, the one of higher
    ``rank`` says more about the model.
    """

    read: Callable[[Folder], Context | None]
    rank: int = 0
