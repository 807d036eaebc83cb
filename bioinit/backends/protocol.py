"""The seam for backends: who constructs a module, initializes what is new in it, and saves it.

A family says *what* is built; a backend says *how a module of that kind comes to be*. What differs
between a ``transformers`` model and a person's own ``nn.Module`` is how it is constructed without
memory, which code gives a new parameter its first value, and what its saved files look like.

Between ``build`` and ``initialize``, ``load`` gives memory to the parameters, and to the buffers
that ``build`` left on meta. A backend never allocates a parameter and never copies into one.

A new backend is one new file in this folder that defines ``BACKEND``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from bioinit.layout import Dims
from bioinit.targets import Located

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MOST_LABELS = 10**6
"""More outputs of a head than this are a mistake, and naming them all takes gigabytes."""

Make = Callable[[], nn.Module]
"""Constructs the module. Calling it twice gives two modules with the same names and shapes."""


class Watch(Protocol):
    """What ``load`` wants to hear while an initializer runs: whose values are being made.

    It reseeds every random call by the name of the tensor that the call fills, and sees which
    tensors were written. A tensor of the live model is known to it already.
    """

    def entering(self, path: str) -> None:
        """Code that initializes the module ``path`` ("" is the root), or below it, runs next."""

    def stands_for(self, tensor: torch.Tensor, key: str) -> None:
        """From now on, ``tensor`` is to be treated as if it were the live tensor ``key``."""


class Initialize(Protocol):
    """Runs the architecture's own initializer over the whole model, in its own order."""

    def __call__(
        self, model: nn.Module, make: Make, loaded: Collection[str], watch: Watch
    ) -> Mapping[str, torch.Tensor]:
        """Give every parameter and buffer that is not in ``loaded`` its initial value.

        Args:
            model: real memory everywhere; what is not in ``loaded`` holds left-over bytes.
            make: the constructor that ``build`` was given.
            loaded: state-dict keys (and names of non-persistent buffers) whose value must stay.
            watch: is told what is being initialized.

        Returns:
            Values by key that are not in the live model yet: ``load`` copies them there.
        """


def built_class(module: nn.Module) -> type[nn.Module]:
    """The class that was constructed: torch puts one of its own before it where FSDP2 divides."""
    return next(c for c in type(module).__mro__ if not c.__module__.startswith("torch.distributed"))


def _nobody_met(mesh: Mapping[str, int]) -> None:
    """Whatever divides the model brings its own."""


def _nothing_located(module: nn.Module) -> Mapping[str, Located]:
    return {}


def _as_they_are(model: nn.Module, shapes: Mapping[str, Dims]) -> Mapping[str, str]:
    return {key: key for key in shapes}


def _nothing_beside(model: nn.Module, folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Backend:
    """One way a module comes to be. The name of its file is its name."""

    build: Callable[[Make], nn.Module]
    """Calls the constructor. Parameters end on meta, tied ones are one object. Buffers are real
    where their constructor's value counts, and on meta where ``initialize`` will compute them."""

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

    located: Callable[[nn.Module], Mapping[str, Located]] = _nothing_located
    """Where the tensors of a divided model belong in the whole one, by their names in this process;
    those that are missing are whole, or DTensors, which say so themselves."""

    meet: Callable[[Mapping[str, int]], None] = _nobody_met
    """Makes the process groups of a mesh, by the names of its axes, before ``build``: for models
    that are divided by their own constructor."""

    divide: Callable[[nn.Module, DeviceMesh, Mapping[str, str]], None] | None = None
    """Divides a module on meta over a mesh of one axis for tensor parallelism, by the plan that its
    architecture has, or by the one given if that is not empty: module patterns to styles."""

    saved_names: Callable[[nn.Module, Mapping[str, Dims]], Mapping[str, str] | None] | None = (
        _as_they_are
    )
    """What ``save`` calls each tensor of these keys and shapes that it writes; None where it would
    convert some of them, and so must have them whole. Not given where it writes nothing at all."""

    save_beside: Callable[[nn.Module, Path], None] = _nothing_beside
    """Writes what ``save`` writes, but for the weights."""
