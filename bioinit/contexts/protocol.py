"""The seam for saved configs: how a checkpoint says what model it holds, as plain data.

A context is whatever the writer saved beside the weights (``config.json``, our ``context/``, later
NeMo's ``io.json``). It is parsed as data; nothing it names is imported. A new kind of context is
one new file in this folder that defines ``CONTEXT``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bioinit.storage import Folder


@dataclass(frozen=True)
class Context:
    """A saved config as plain data.

    ``dialect`` is whose spelling ``data`` uses (``hf``, ``bioinit``, ...); ``where`` is the file,
    for messages; ``model`` names the class or ``model_type`` that ``data`` describes, or None.
    """

    dialect: str
    where: str
    data: Mapping[str, Any]
    model: str | None


@dataclass(frozen=True)
class ContextKind:
    """One kind of saved config. ``read`` returns None when the folder has none of this kind."""

    read: Callable[[Folder], Context | None]
