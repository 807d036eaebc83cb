"""Initial values that depend on the seed and a tensor's name, and on nothing else.

The architecture's own initializer runs over the whole model, so that parents which initialize their
children come out right. While it runs, every random call is reseeded by the name of the tensor it
fills, writes into loaded tensors are dropped, and every tensor that was written is remembered: what
nobody wrote holds left-over memory, and that is a problem, never a value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from bioinit.backends.protocol import Watch
from bioinit.targets import local


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of an initializer. Implements ``backends.protocol.Watch``."""

    def __init__(
        self,
        live: Mapping[str, torch.Tensor],
        protected: Collection[str],
        seed: int,
        spelled: Callable[[str], str] = str,
    ) -> None:
        """``spelled`` is what the whole model calls a tensor of ``live``: it names the seeds."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._keys: dict[tuple[str, int], str] = {}
        for key, tensor in live.items():
            self._keys.setdefault(_memory(tensor), key)  # tied names follow the one that owns it
        self._kept: list[torch.Tensor] = []  # an address is a name only while its tensor lives
        self._protected = frozenset(protected)
        self._seed = seed
        self._spelled = spelled
        self._path = ""
        self._draws: dict[str, int] = {}
        self._made_for = WeakTensorKeyDictionary()
        """The key of the tensor that a nameless one was computed from."""
        self.written: set[str] = set()

    def entering(self, path: str) -> None:
        self._path = path
        self._draws[""] = 0

    def stands_for(self, tensor: torch.Tensor, key: str) -> None:
        self._kept.append(tensor)
        self._keys[_memory(tensor)] = key

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = _written_argument(func, args, kwargs)
        key = None if target is None else self._keys.get(_memory(target))
        if key is not None:
            if key in self._protected:
                return target
            self.written.add(key)
        about = key or next(filter(None, map(self._about, _tensors(args))), None)
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            if about is None and target is not None and target.is_meta:
                return func(*args, **kwargs)
            torch.manual_seed(_seed(self._seed, self._name(key, about)))
        made = func(*args, **kwargs)
        if about is not None and key is None:
            for tensor in _tensors((made,)):
                self._made_for[tensor] = about
        return made

    def _about(self, tensor: torch.Tensor) -> str | None:
        """The key of ``tensor``, or of the one that it was computed from."""
        named = self._keys.get(_memory(tensor))
        if named is None and tensor in self._made_for:
            named = self._made_for[tensor]
        return named

    def _name(self, key: str | None, about: str | None) -> str:
        """Of what is drawn into ``key``, or into a tensor without a name.

        That one is called by what it was computed from, or else by the module and its place in the
        order. What is drawn for other tensors has no say in it: they may be loaded, or be on meta,
        and many an initializer draws nothing for those.
        """
        if key is not None:
            return self._spelled(key)
        self._draws[about or ""] = self._draws.get(about or "", 0) + 1
        named = self._path if about is None else f"{self._spelled(about)}:"
        return f"{named}#{self._draws[about or '']}"


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves the caller's random state untouched."""
    devices: list[int] = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        yield


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    """What a tensor and all its views have in common."""
    storage = local(tensor).untyped_storage()
    return str(tensor.device), storage.data_ptr() or storage._cdata


def _written_argument(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """The tensor that ``func`` writes into, if it does so in place."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, torch.Tensor):
                return value
    return None


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for argument in args:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(tuple(argument))


def reset_parameters(
    model: nn.Module, make: Callable[[], nn.Module], loaded: Collection[str], watch: Watch
) -> Mapping[str, torch.Tensor]:
    """The initializer of a module that came without its constructor: torch's own convention.

    Every module that directly owns something new and has a ``reset_parameters`` runs it.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = [*module._parameters, *module._buffers]
        if isinstance(module, _Resets) and any(prefix + name not in loaded for name in own):
            watch.entering(path)
            module.reset_parameters()
    return {}


@runtime_checkable
class _Resets(Protocol):
    def reset_parameters(self) -> None: ...
