"""Who builds the model: one sibling per kind of module, imported only when it is asked for.

The folder is the list and a file's name is its name; there is nothing to register.
"""

from __future__ import annotations

import importlib
import pkgutil

from bioinit.backends.protocol import Backend
from bioinit.errors import ConfigError
from bioinit.keys import suggestion

__all__ = ["Backend", "load", "names"]


def names() -> tuple[str, ...]:
    """The backends there are, by file name."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "protocol"))


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    if name not in names():
        raise ConfigError(
            f"there is no backend {name!r}; there are {', '.join(names())}. "
            f"{suggestion(name, names())}".strip()
        )
    backend = importlib.import_module(f"bioinit.backends.{name}").BACKEND
    if not isinstance(backend, Backend):
        raise ConfigError(f"bioinit/backends/{name}.py must define BACKEND, a Backend.")
    return backend
