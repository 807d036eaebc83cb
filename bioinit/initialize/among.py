"""A run among others: the ranks that share its model, and how it is divided among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bioinit.backends.protocol import Backend
from bioinit.config import Run, TrainableModelConfig
from bioinit.errors import ConfigError
from bioinit.families.protocol import Family
from bioinit.parallelize import Sharing, decided, divide, replicated
from bioinit.plan.evidence import Evidence, unite
from bioinit.ranks import ALONE, World
from bioinit.targets import Target, describe

Parallelize = Callable[[nn.Module], nn.Module | None]
"""Divides a model on meta, in place; a module that it gives takes the place of the model."""


@dataclass(frozen=True)
class Among:
    """The ranks that start one model, and what divides it: a strategy, or a function."""

    world: World = ALONE
    sharing: Sharing | None = None
    parallelize: Parallelize | None = None

    @classmethod
    def of(
        cls, run: Run, config: TrainableModelConfig, world: World, parallelize: Parallelize | None
    ) -> Among:
        """What ``run`` asks for, for a model of ``config``.

        Raises:
            ConfigError: mesh or strategy do not fit the world, or a function was given as well.
        """
        placement = run.placement
        if parallelize is None:
            is_megatron = config.backend == "megatron"
            sharing = decided(placement, world.size, placement.device or "cpu", is_megatron)
            return cls(world, sharing)
        for name in ("mesh", "strategy"):
            if getattr(placement, name) is not None:
                raise ConfigError(
                    f"placement.{name}={getattr(placement, name)!r} is set, and parallelize= is "
                    "given as well: both divide the model. Leave one of them out."
                )
        return cls(world, None, parallelize)

    @property
    def is_alone(self) -> bool:
        return self.world.size == 1

    @property
    def is_divided(self) -> bool:
        """Whether a rank has less than the whole model."""
        is_whole = self.sharing is not None and self.sharing.strategy in ("single", "ddp")
        return not self.is_alone and not is_whole

    def meet(self, backend: Backend) -> None:
        """Make the process groups that the model's own constructor asks for.

        Raises:
            ConfigError: the axes do not go into the world, or groups exist and are others.
        """
        if self.sharing is not None and self.sharing.strategy == "megatron":
            backend.meet(dict(zip(self.sharing.axes, self.sharing.sizes, strict=True)))

    def divided(self, module: nn.Module, backend: Backend, family: Family) -> nn.Module:
        """``module``, whole and on meta, as this rank will have it.

        Raises:
            ConfigError: it does not divide so.
        """
        if self.parallelize is not None:
            return _given_back(self.parallelize, module)
        if self.sharing is not None:
            divide(module, self.sharing, backend, family.tensor_parallel)
        return module

    def described(self, module: nn.Module, backend: Backend) -> dict[str, Target]:
        """The targets of ``module``, with the ranks that hold the same where a strategy says so."""
        targets = describe(module, backend.located(module))
        if self.is_alone or self.sharing is None or self.sharing.strategy == "megatron":
            return targets
        return replicated(module, targets, self.sharing)

    @property
    def share(self) -> Callable[[Evidence], Evidence] | None:
        """Puts together what all ranks planned; None for one process."""
        return None if self.is_alone else functools.partial(unite, self.world)


def _given_back(parallelize: Parallelize, module: nn.Module) -> nn.Module:
    given: Any = parallelize(module)
    if given is None:
        return module
    if not isinstance(given, nn.Module):
        raise ConfigError(
            f"parallelize gave {given!r}, which is no module. Let it divide the model that it is "
            "given and return nothing, or return the module that takes its place."
        )
    return given
