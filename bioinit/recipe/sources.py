"""Where recipes and presets lie, and which line of which file says what.

A *recipe* is one YAML file: ``recipes/<family>/<task>.yaml`` of ours, or a person's own. A *preset*
is one option of a config group, ``conf/<group>/<option>.yaml``. The folders are the lists.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bioinit.errors import ConfigError, StorageError
from bioinit.keys import suggestion

GROUPS = ("model", "init", "placement", "output")
_MOST_NODES = 100_000
_PACKAGE = Path(__file__).parents[1]


class Source(NamedTuple):
    """A recipe file: what a person calls it, where it lies, and whether a person wrote it."""

    name: str
    path: Path
    is_own: bool


class Document(NamedTuple):
    """A parsed YAML file and, for every dotted key in it, the line it stands on."""

    tree: DictConfig
    lines: dict[str, int]


def shipped(folder: str) -> Path:
    """``conf`` or ``recipes``: inside an installed wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "_data" / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def names() -> tuple[str, ...]:
    """The names of all shipped recipes, sorted."""
    folder = shipped("recipes")
    found = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return tuple(sorted(path.with_suffix("").as_posix() for path in found))


def options(group: str) -> tuple[str, ...]:
    """The presets of a config group, sorted."""
    return tuple(sorted(path.stem for path in (shipped("conf") / group).glob("*.yaml")))


def find(name: str) -> Source:
    """The recipe that ``name`` means: a path of a person's own file, or the name of one of ours."""
    if name.endswith((".yaml", ".yml")) or name.startswith((".", "/", "~")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise StorageError(
                f"there is no recipe file {name!r} (looked at {path.absolute()}). "
                "Give the path of a YAML file, or one of the names that `bioinit recipes` lists."
            )
        return Source(name, path.absolute(), is_own=True)
    path = shipped("recipes") / f"{name}.yaml"
    if name not in names():
        own = next((p for p in (f"{name}.yaml", f"{name}.yml", name) if Path(p).is_file()), None)
        cure = f"For your own file write recipe=./{own}." if own else suggestion(name, names())
        if "," in name:
            cure = "To run several recipes add --multirun."
        raise ConfigError(
            f"there is no recipe {name!r}. {cure} `bioinit recipes` lists all of them."
        )
    return Source(name, path, is_own=False)


@functools.cache
def ours() -> dict[str, Document]:
    """All shipped recipes by name, parsed once."""
    return {name: parse(find(name).path, name) for name in names()}


def parse(path: Path, shown: str) -> Document:
    """The YAML mapping in ``path``; ``shown`` is how messages call the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except OSError as error:
        raise StorageError(f"cannot read {shown}: {error.strerror}. Check the path.") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if _size(root, {}) > _MOST_NODES:
            raise ConfigError(
                f"{shown} stands for more than {_MOST_NODES} values once its aliases are written "
                "out, which no recipe does. Take aliases of aliases out of it."
            )
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except RecursionError:
        raise ConfigError(f"{shown} refers to itself without end. Write its aliases out.") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = "an alias refers to itself" if "recursion" in str(error) else error
        raise ConfigError(f"{shown} is not valid YAML: {reason}") from None
    if not isinstance(tree, DictConfig) or not isinstance(root, yaml.MappingNode | None):
        raise ConfigError(
            f"{shown} holds no keys. A recipe is a YAML mapping: family, model, init, placement, "
            "output, output_dir."
        )
    if "hydra" in tree:
        raise ConfigError(
            f"{shown} sets hydra: recipes are only composed by Hydra, so its own settings have no "
            "effect. Remove them; output_dir says where results go."
        )
    return Document(tree, dict(_lines(root, "")) if root is not None else {})


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values ``node`` stands for, each alias written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # an alias of itself ends here, and OmegaConf says what is wrong
        parts = (part for entry in node.value for part in _pair(entry))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _pair(entry: Any) -> tuple[yaml.Node, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _lines(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, key.start_mark.line + 1
        yield from _lines(value, f"{dotted}.")


def summary(source: Source) -> str:
    """What a recipe is for: the first comment in its file."""
    for line in source.path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""


def leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values in nested mappings; an empty mapping is a value."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{dotted}.")
        else:
            yield dotted
