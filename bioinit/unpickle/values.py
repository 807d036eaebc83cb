"""What the closed unpickler builds in place of things it will not build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

CURE = (
    "Load it with the program that wrote it, where you trust it, and save the plain state dict, "
    "best as safetensors."
)


class Symbol:
    """A name that a pickle refers to. It is never looked up in Python.

    ``build`` is our own stand-in for calling it, or None: then calling it is refused. ``copies``
    says that it copies what it is given, which is counted.
    """

    __slots__ = ("build", "copies", "module", "name")

    def __init__(
        self,
        module: str,
        name: str,
        build: Callable[..., Any] | None = None,
        *,
        copies: bool = False,
    ) -> None:
        self.module = module
        self.name = name
        self.build = build
        self.copies = copies

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """An object of a class that is not on the list, as the plain state the pickle gave it.

    ``state`` is what its class would have been handed to restore it, ``args`` what it was made
    from, ``items`` what was put into it if it is a kind of list, set or dict.
    """

    __slots__ = ("args", "items", "module", "name", "state")

    def __init__(
        self, module: str, name: str, state: Any = None, args: tuple[Any, ...] = ()
    ) -> None:
        self.module = module
        self.name = name
        self.state = state
        self.args = args
        self.items: list[Any] | dict[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"Opaque({self.module}.{self.name})"


class Refused:
    """What a call that was not made would have returned, and what it would have been given."""

    __slots__ = ("args", "module", "name")

    def __init__(self, module: str, name: str, args: Any = ()) -> None:
        self.module = module
        self.name = name
        self.args = args

    def __repr__(self) -> str:
        return f"Refused({self.module}.{self.name})"


class StorageRef(NamedTuple):
    """A storage that lies elsewhere in the file: ``numel`` elements under ``key``.

    ``view`` is the part of it that is meant, first element and number of elements, where only a
    part is.
    """

    key: str
    dtype: torch.dtype
    numel: int
    view: tuple[int, int] | None = None


class TensorRef(NamedTuple):
    """A tensor over a storage. ``offset`` and ``stride`` count elements of ``dtype``."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
