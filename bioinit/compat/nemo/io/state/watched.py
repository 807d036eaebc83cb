"""State dicts that know what was read of them, or written into them."""

from __future__ import annotations

import logging
from collections.abc import ItemsView, Mapping, MutableMapping, ValuesView
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


class Written(dict[str, Any]):
    """The target's state dict; knows what was written into it, in place or as an item."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._before = {key: (value, _version(value)) for key, value in state.items()}
        self._set: set[str] = set()

    def __setitem__(self, key: str, value: Any) -> None:
        self._set.add(key)
        super().__setitem__(key, value)

    def has(self, key: str, now: MutableMapping[str, Any]) -> bool:
        """Whether ``key`` has got a value; ``now`` is the state dict that came out."""
        if key not in now:
            return False
        before, version = self._before.get(key, (None, 0))
        return key in self._set or now[key] is not before or _version(before) != version


def _version(value: Any) -> int:
    """Counts the writes into a tensor."""
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return 0
    return value._version
