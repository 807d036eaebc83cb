"""Paths that say more than where they lead: of an adapter and its base, and of another machine."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, Self

from bioinit.errors import ConfigError

MSC = "msc://"


class MissingClient(ConfigError, ValueError):
    """A ``msc://`` address was given, and the library that follows it is not installed."""


class AdapterPath(PosixPath):
    """The folder of an adapter, which also says on which model it was trained.

    Stands in for ``nemo.lightning.resume.AdapterPath``. There a path that was made from one with
    ``/`` forgot the model; here it keeps it. ``adapter_path`` is what the first generation of
    ``AutoResume`` gave: there the path itself is the model, and the adapter stands beside it.
    """

    base_model_path: Path | None = None
    adapter_path: Path | None = None

    def __new__(
        cls, *args: Any, base_model_path: Any = None, adapter_path: Any = None, **kwargs: Any
    ) -> Self:
        made = super().__new__(cls, *args)
        if sys.version_info >= (3, 12):  # where it is the constructor that takes the segments
            PosixPath.__init__(made, *args)
        made.base_model_path = None if base_model_path is None else as_path(base_model_path)
        made.adapter_path = None if adapter_path is None else as_path(adapter_path)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __truediv__(self, key: Any) -> Self:
        made = super().__truediv__(key)
        return made if made is NotImplemented else self.with_base(self.base_model_path, made)

    def with_base(self, base_model_path: Path | None, path: Path | None = None) -> Self:
        """The same adapter, or that at ``path``, on another model."""
        return type(self)(
            str(self if path is None else path),
            base_model_path=base_model_path,
            adapter_path=self.adapter_path,
        )

    def __reduce__(self) -> Any:
        return _adapter, (type(self), str(self), self.base_model_path, self.adapter_path)

    def __repr__(self) -> str:
        said = f"base_model_path={self.base_model_path}"
        if self.adapter_path is not None:
            said = f"adapter_path={self.adapter_path}"
        return f"{type(self).__name__}({self.as_posix()!r}, {said})"


def _adapter(cls: type[AdapterPath], path: str, base: Path | None, adapter: Path | None) -> Any:
    return cls(path, base_model_path=base, adapter_path=adapter)


class Address(PurePosixPath):
    """A ``msc://`` address as a name only: for joining parts, where nothing is looked at."""

    def __str__(self) -> str:
        text = super().__str__()
        return text.replace(":/", "://", 1) if "://" not in text else text

    def __fspath__(self) -> str:
        return str(self)


def as_path(value: Any, *, only_the_name: bool = False) -> Any:
    """``value`` as a path; one that is a path already comes back as it is.

    Args:
        value: a text, a path, or a path of ``multistorageclient``.
        only_the_name: nothing will be looked at, so a ``msc://`` address needs no library.

    Raises:
        MissingClient: it is a ``msc://`` address, and ``multistorageclient`` is not installed.
    """
    if not isinstance(value, str):
        return Path(value) if _is_foreign(value) else value
    if not value.startswith(MSC):
        return Path(value)
    try:
        client: Any = importlib.import_module("multistorageclient")
    except ImportError as error:
        if only_the_name:
            return Address(value)
        raise MissingClient(
            f"cannot look at {value}: the Multi-Storage Client is not installed. Install it with "
            "pip install multi-storage-client, or give a path on this machine."
        ) from error
    return client.Path(value)


def _is_foreign(value: Any) -> bool:
    """Whether ``value`` leads somewhere, but is no path to join parts to, as ``py.path`` is not."""
    is_path = isinstance(value, PurePosixPath) or type(value).__module__.startswith("multistorage")
    return isinstance(value, os.PathLike) and not is_path
