"""A folder that is a list: the files of a corridor, and what other packages add to it.

A file's name is the name of the one object that it defines for the corridor (``FORMAT``,
``FAMILY``, ...); packages add more through the entry-point group called like the corridor. A
sibling is imported when it is asked for, so a broken one harms nobody who does not need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from bioinit.errors import ConfigError
from bioinit.keys import suggestion

T = TypeVar("T")


class Siblings(Generic[T]):
    """The siblings of the corridor ``package``, each a ``kind`` under the name ``attribute``.

    ``word`` is what people call one of them. Files that begin with an underscore, ``protocol`` and
    those in ``apart`` are no siblings.
    """

    def __init__(
        self,
        package: str,
        path: Iterable[str],
        attribute: str,
        kind: type[T],
        word: str,
        apart: Collection[str] = (),
    ) -> None:
        self.package, self.attribute, self.kind, self.word = package, attribute, kind, word
        self._path, self._apart = tuple(path), {"protocol", *apart}

    @cached_property
    def own(self) -> tuple[str, ...]:
        """Those that are files of the folder."""
        found = {module.name for module in iter_modules(self._path)} - self._apart
        return tuple(sorted(name for name in found if not name.startswith("_")))

    @cached_property
    def plug_ins(self) -> dict[str, EntryPoint]:
        """Those that other packages bring."""
        return {entry.name: entry for entry in entry_points(group=self.package)}

    def names(self) -> tuple[str, ...]:
        """The names of all: files of the folder, then entry points.

        Raises:
            ConfigError: a plug-in takes the name of a file.
        """
        taken = [name for name in self.own if name in self.plug_ins]
        if taken:
            raise ConfigError(
                f"the entry point {self.plug_ins[taken[0]].value} in the group {self.package!r} "
                f"takes the name {taken[0]!r}, which bioinit has itself. Rename it, or uninstall "
                "its package."
            )
        return (*self.own, *sorted(self.plug_ins))

    def load(self, name: str) -> T:
        """The sibling called ``name``, imported now.

        Raises:
            ConfigError: there is none of that name, or a plug-in that has it is not usable.
        """
        if name not in self.names():
            raise ConfigError(
                f"there is no {self.word} {name!r}; there are {', '.join(self.names())}. "
                f"{suggestion(name, self.names())}".strip()
            )
        if name in self.own:
            found = getattr(import_module(f"{self.package}.{name}"), self.attribute)
        else:
            found = self._plugged(self.plug_ins[name])
        if not isinstance(found, self.kind):
            raise ConfigError(
                f"the {self.word} {name!r} is a {type(found).__name__}, not a "
                f"{self.kind.__name__}. Whoever brings it must name the {self.attribute} of a "
                "module."
            )
        return found

    def _plugged(self, entry: EntryPoint) -> object:
        try:
            found: object = entry.load()
        except Exception as error:  # whatever the code of somebody else raises
            raise ConfigError(
                f"the {self.word} {entry.name!r} ({entry.value}) does not import: "
                f"{type(error).__name__}: {error}. Repair or uninstall the package that brings it."
            ) from error
        return found

    def usable(self) -> Iterator[tuple[str, T]]:
        """All by name; a plug-in that is not usable is left out, with a warning."""
        for name in self.names():
            try:
                found = self.load(name)
            except ConfigError as error:
                if name in self.own:
                    raise
                warnings.warn(f"{error} It is left out.", RuntimeWarning, stacklevel=3)
            else:
                yield name, found
