"""State dicts that know what was read of them, or written into them."""

from __future__ import annotations

import logging
from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any

import torch

_log = logging.getLogger(__name__)


class Read(dict[str, Any]):
    """The source's state dict; knows what of it was asked for."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._asked.update(self)
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._asked.update(self)
        return super().values()

    def warn_of_rest(self) -> None:
        """Name the tensors that no line used, unless another name of the same memory was."""
        tensors = {k: v for k, v in super().items() if isinstance(v, torch.Tensor)}
        used = {_memory(tensors[key]) for key in self._asked if key in tensors}
        rest = [
            key
            for key, tensor in tensors.items()
            if not key.endswith("_extra_state") and _memory(tensor) not in used
        ]
        if rest:
            _log.warning("%d tensors of the source were not used: %s", len(rest), ", ".join(rest))


def _memory(tensor: torch.Tensor) -> object:
    """What two names of one tensor have in common."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class Written(MutableMapping[str, Any]):
    """The target's state dict; knows what was written into it, in place or as an item.

    Who asks for a tensor gets a copy, always the same one for one memory: the target changes only
    when all has been decided.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._held = dict(state)
        self._copies: dict[object, tuple[torch.Tensor, int]] = {}
        self._set: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._held[key]
        if key in self._set or not isinstance(value, torch.Tensor):
            return value
        memory = _memory(value)
        if memory not in self._copies:
            copied = value.detach().clone()
            self._copies[memory] = copied, _version(copied)
        return self._copies[memory][0]

    def __setitem__(self, key: str, value: Any) -> None:
        self._set.add(key)
        self._held[key] = value

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __repr__(self) -> str:
        return repr(self._held)

    def copy(self) -> dict[str, Any]:
        """A plain dict of the same."""
        return dict(self)

    def clear(self) -> None:
        """Let go of all, copies too."""
        self._held.clear()
        self._copies.clear()

    def has(self, key: str, now: Mapping[str, Any]) -> bool:
        """Whether ``key`` has got a value; ``now`` is the state dict that came out."""
        if key not in now:
            return False
        before = self._held.get(key)
        copied, version = None, 0
        if isinstance(before, torch.Tensor):
            copied, version = self._copies.get(_memory(before), (None, 0))
        if now is self:
            return key in self._set or (copied is not None and _version(copied) != version)
        value = now[key]
        if key in self._set or copied is None:
            return key in self._set or value is not before
        return value is not copied or _version(copied) != version


def _version(value: Any) -> int:
    """Counts the writes into a tensor."""
    return 0 if value.is_inference() else int(value._version)
