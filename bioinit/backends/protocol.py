"""The seam for backends: who constructs a module, initializes what is new in it, and saves it.

A family says *what* is built; a backend says *how a module of that kind comes to be*. The three things
that differ between a ``transformers`` model and a person's own ``nn.Module`` are how it is constructed
without memory, which code gives a new parameter its first value, and what its saved files look like.

Between ``build`` and ``initialize`` the parameters (and the buffers that ``build`` left on meta) are
given memory by ``load``; a backend never allocates or copies a parameter itself.

A new backend is one new file in this folder that defines ``BACKEND``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


class Initialize(Protocol):
    """Runs the architecture's own initializer over the whole model, in its own order."""

    def __call__(
        self, model: nn.Module, loaded: Collection[str], entering: Callable[[str], None]
    ) -> None:
        """Give every parameter and buffer that is not in ``loaded`` its initial value.

        Args:
            model: real memory everywhere; what is not in ``loaded`` holds left-over bytes.
            loaded: state-dict keys that already have their value and must keep it.
            entering: called with the dotted path of a module ("" is the root) just before code
                that initializes that module, or its direct children, runs.
        """


@dataclass(frozen=True)
class Backend:
    """One way a module comes to be. The name of its file is its name."""

    build: Callable[[Callable[[], nn.Module]], nn.Module]
    """Calls the constructor; parameters end on meta, tied ones are one object, none has memory."""

    initialize: Initialize

    describe_init: Callable[[nn.Module, str], str | None]
    """Which rule initializes the parameter or buffer of this key; None if nothing would."""

    float32_keys: Callable[[nn.Module, torch.dtype], frozenset[str]]
    """Keys that the architecture keeps in float32 when the rest is asked for in this dtype."""

    remember: Callable[[nn.Module, Collection[str]], None]
    """Told the names the weights were stored under, so that ``save`` can write the same ones."""

    save: Callable[[nn.Module, Path, int], None]
    """Writes weights and config into an existing empty folder; the last argument is the most bytes
    that one weight file may hold."""
