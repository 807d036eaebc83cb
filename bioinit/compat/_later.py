"""Names that are imported when somebody first asks for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def later(
    module: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of ``module``.

    Args:
        module: its ``__name__``.
        homes: the names that it has from others, with blanks between, by the module that has them:
            a dotted name, or ``.name`` for one within ``module``. The home itself is there too, by
            its last name, if it lies within ``module``.
    """
    found: dict[str, str] = {}
    for home, names in homes.items():
        place = f"{module}{home}" if home.startswith(".") else home
        found.update(dict.fromkeys(names.split(), place))
        if place.rpartition(".")[0] == module:
            found[place.rpartition(".")[2]] = place

    def get(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home = importlib.import_module(found[name])
        value = home if found[name] == f"{module}.{name}" else getattr(home, name)
        setattr(sys.modules[module], name, value)
        return value

    def names_there() -> list[str]:
        public = (name for name in found if not name.startswith("_"))
        return sorted({*vars(sys.modules[module]), *public})

    return get, names_there
