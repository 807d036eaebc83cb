"""The mapping that a person gives to ``load_weights``: patterns, rules in YAML, or tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bioinit import rulebook
from bioinit.errors import ConfigError
from bioinit.layout import Dims
from bioinit.mapping import Mapping as Table
from bioinit.mapping import Names
from bioinit.rules import rename
from bioinit.targets import Target
from bioinit.transforms.claims import expanded, require_single_claims

Given = str | Path | Mapping[str, Any] | Table | Names
"""A YAML file, what one says, patterns by pattern, a table for the stored names, or both tables."""


def names_given(given: Given, shapes: Mapping[str, Dims], targets: Mapping[str, Target]) -> Names:
    """Both tables, checked against the names that there are.

    Raises:
        ConfigError: ``given`` is no mapping at all.
        StorageError: the file that it names cannot be read.
        MappingError: it contradicts itself, or what is stored.
    """
    owners = {key: target.tied_to for key, target in targets.items() if target.persistent}
    names = expanded(_tables(given), shapes, owners)
    require_single_claims(names, shapes)
    return names


def _tables(given: Given) -> Names:
    if isinstance(given, Names):
        return given
    if isinstance(given, Table):
        return Names(given, Table.identity())
    if isinstance(given, Mapping):
        if all(isinstance(to, str) for to in given.values()):
            # A name that matches none of the patterns stays as it is.
            lines = [*map(rename, given, given.values()), rename("**", "**")]
            return Names(Table(lines), Table.identity())
        return rulebook.read(given)
    if isinstance(given, str | Path):
        return rulebook.read(given)
    raise ConfigError(
        f"mapping is a {type(given).__name__}. Give a bioinit.Mapping, a dict of patterns "
        "({'body.**': 'encoder.**'}), or the path of a YAML file of rules."
    )
