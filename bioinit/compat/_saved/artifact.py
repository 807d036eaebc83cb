"""Files that an argument names and that are saved along with it."""

from __future__ import annotations

import filecmp
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import fiddle as fdl

from bioinit.compat._saved.names import register, write_as

ValueT = TypeVar("ValueT")
_HOME = "nemo.lightning.io.artifact"


class Artifact(ABC, Generic[ValueT]):
    """Stands in for ``nemo.lightning.io.artifact.Artifact``: says that an argument is a file.

    Args:
        attr: the name of the argument.
        required: whether saving without it is an error.
        skip: leave the argument as it is.
    """

    def __init__(self, attr: str, required: bool = True, skip: bool = False) -> None:
        self.attr = attr
        self.required = required
        self.skip = skip

    @abstractmethod
    def dump(self, instance: Any, value: Any, absolute_dir: Path, relative_dir: Path) -> Any:
        """Copy what ``value`` names into ``absolute_dir``; what is written in its place."""

    @abstractmethod
    def load(self, path: Any) -> Any:
        """What the argument is, given where the file lies now."""

    def __repr__(self) -> str:
        words = f"skip= {self.skip}, attr= {self.attr}, required= {self.required}"
        return f"{type(self).__name__}({words})"


class PathArtifact(Artifact[Path]):
    """Stands in for ``nemo.lightning.io.artifact.PathArtifact``: the argument is a file's path."""

    def dump(self, instance: Any, value: Any, absolute_dir: Path, relative_dir: Path) -> Path:
        return _copied(Path(value), Path(absolute_dir), Path(relative_dir))

    def load(self, path: Any) -> Any:
        return path


class FileArtifact(Artifact[str]):
    """Stands in for ``nemo.lightning.io.artifact.FileArtifact``: a file's path, or plain text."""

    def dump(self, instance: Any, value: Any, absolute_dir: Path, relative_dir: Path) -> Any:
        if not Path(value).exists():
            return fdl.Config(FileArtifact, attr=value, skip=True)
        return str(_copied(Path(value), Path(absolute_dir), Path(relative_dir)))

    def load(self, path: Any) -> Any:
        return path


class DirArtifact(Artifact[str]):
    """Stands in for ``nemo.lightning.io.artifact.DirArtifact``: a folder of files.

    Folders inside of it are copied too, where the original failed.
    """

    def dump(self, instance: Any, value: Any, absolute_dir: Path, relative_dir: Path) -> Any:
        folder = Path(value)
        if not folder.is_dir():
            return value
        place = Path(relative_dir) / folder.name
        shutil.copytree(folder, Path(absolute_dir) / place, dirs_exist_ok=True)
        return str(place)

    def load(self, path: Any) -> Any:
        return path


class DirOrStringArtifact(DirArtifact):
    """Stands in for ``nemo.lightning.io.artifact.DirOrStringArtifact``: a folder, or plain text."""

    def dump(self, instance: Any, value: Any, absolute_dir: Path, relative_dir: Path) -> Any:
        if not Path(value).exists():
            return fdl.Config(DirOrStringArtifact, attr=value, skip=True)
        return super().dump(instance, value, absolute_dir, relative_dir)


def artifacts_of(target: Any) -> tuple[Artifact[Any], ...]:
    """Which arguments of a class are files: what ``track_io`` or its ``io_artifacts`` says."""
    said = getattr(target, "__io_artifacts__", None) or ()
    ask = getattr(target, "io_artifacts", None)
    return tuple(said or (ask() if isinstance(target, type) and callable(ask) else ()))


def _copied(source: Path, folder: Path, inside: Path) -> Path:
    """Copy a file; where another one has its name already, into a numbered folder beside it."""
    place = inside / source.name
    number = 1
    while (folder / place).exists() and not filecmp.cmp(source, folder / place, shallow=False):
        number += 1
        place = inside / str(number) / source.name
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    if not (folder / place).exists():
        shutil.copy2(source, folder / place)
    return place


for _kind in (PathArtifact, FileArtifact, DirArtifact, DirOrStringArtifact):
    register(_kind, f"{_HOME}.{_kind.__name__}")
    write_as(_kind, f"{_HOME}.file", _kind.__name__)
