"""What a transform is given, and a bare state dict in the place of a model."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

_log = logging.getLogger(__name__)


@dataclass
class TransformCTX:
    """Both models and their state dicts: ``nemo.lightning.io.state.TransformCTX``.

    A transform whose function has a parameter named ``ctx`` gets it. ``target_state`` is what
    :func:`apply_transforms` reads afterwards, so a function may write into it.
    """

    source: Any
    source_state: MutableMapping[str, Any]
    target: Any
    target_state: MutableMapping[str, Any]


class _ModelState:
    """A state dict that is given as a source: ``nemo.lightning.io.state._ModelState``.

    Args:
        state_dict: kept, not copied; ``state_dict()`` gives it back.
        config: what functions find as ``ctx.source.config``.
    """

    def __init__(self, state_dict: MutableMapping[str, Any], config: Any = None) -> None:
        self._state_dict = state_dict
        self.config = config

    def state_dict(self) -> MutableMapping[str, Any]:
        """The state dict itself."""
        return self._state_dict

    def to(self, dtype: torch.dtype) -> None:
        """Cast every tensor, in the dict itself, and warn of each.

        The original casts integers too, so that indices lose digits in bfloat16; here they stay,
        as ``torch.nn.Module.to`` leaves them.
        """
        for key, value in self._state_dict.items():
            is_number = isinstance(value, torch.Tensor) and (
                value.is_floating_point() or value.is_complex()
            )
            if is_number and value.dtype != dtype:
                _log.warning(
                    "%s is cast from %s to %s, the target's dtype.", key, value.dtype, dtype
                )
                self._state_dict[key] = value.to(dtype)
