"""Names that are imported when somebody first asks for them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def found_later(module: str, name: str, homes: Mapping[str, str]) -> Any:
    """What ``name`` of ``module`` is: an attribute of its home, or that module itself.

    Raises:
        AttributeError: ``module`` has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home = importlib.import_module(homes[name])
    return home if homes[name].rpartition(".")[2] == name else getattr(home, name)
