"""The ranks that start one model, and how it is divided among them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bioinit.backends.protocol import Backend, built_class
from bioinit.config import Run, TrainableModelConfig
from bioinit.errors import ConfigError
from bioinit.families.protocol import Family
from bioinit.keys import suggestion
from bioinit.parallelize import Sharing, decided, divide, replicated
from bioinit.plan.evidence import Evidence, unite
from bioinit.ranks import ALONE, World
from bioinit.targets import Target, describe, is_divided, slots

Parallelize = Callable[[nn.Module], nn.Module | None]
"""Divides a model on meta, in place; a module that it gives takes the place of the model."""


@dataclass(frozen=True)
class Division:
    """The ranks that start one model, and what divides it: a strategy, or a function."""

    world: World = ALONE
    sharing: Sharing | None = None
    parallelize: Parallelize | None = None

    @classmethod
    def of(
        cls, run: Run, config: TrainableModelConfig, world: World, parallelize: Parallelize | None
    ) -> Division:
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

    def said(self) -> dict[str, Any]:
        """For the plan's JSON and the receipt: how the model is divided, and whose plan it is."""
        if self.is_alone:
            return {}
        sharing = self.sharing
        how = {"strategy": "parallelize"} if sharing is None else {"strategy": sharing.strategy}
        mesh = {} if sharing is None else dict(zip(sharing.axes, sharing.sizes, strict=True))
        return {"placement": {**how, "mesh": mesh, "rank": self.world.rank, "of": self.world.size}}

    def notes(self) -> list[str]:
        """The same for people; nothing for one process."""
        how = "the function that was given" if self.sharing is None else str(self.sharing)
        rank = f"this is rank {self.world.rank} of {self.world.size}"
        return [] if self.is_alone else [f"divided by {how}; {rank}"]

    def meet(self, backend: Backend) -> None:
        """Make the process groups that the model's own constructor asks for.

        Raises:
            ConfigError: the axes do not go into the world, or groups exist and are others.
        """
        if self.sharing is not None and self.sharing.strategy == "megatron":
            backend.meet(dict(zip(self.sharing.axes, self.sharing.sizes, strict=True)))

    def divided(
        self, module: nn.Module, whole: Mapping[str, Target], backend: Backend, family: Family
    ) -> tuple[nn.Module, Mapping[str, Target]]:
        """``module``, whole and on meta, as this rank will have it, and its targets.

        Where a strategy of ours divides it, they say which ranks hold the same.

        Args:
            module: what ``backend`` built; Megatron's constructors have divided it already.
            whole: its targets.
            backend: of the module.
            family: of the model; may know how tensor parallelism divides it.

        Raises:
            ConfigError: it does not divide so.
        """
        if self.parallelize is not None:
            given = _given_back(self.parallelize, module)
            targets = describe(given, backend.located(given))
            _require_known(targets, whole, given)
            require_alike(given, self.world)
            return given, targets
        if self.is_alone or self.sharing is None or self.sharing.strategy == "megatron":
            return module, whole
        divide(module, self.sharing, backend, family.tensor_parallel)
        return module, replicated(module, describe(module), self.sharing)

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


def _require_known(
    targets: Mapping[str, Target], whole: Mapping[str, Target], given: nn.Module
) -> None:
    """Refuse names that the model did not have: no table would lead anything to them."""
    new = [key for key in targets if key not in whole]
    if new:
        more = f" and {len(new) - 1} more" if new[1:] else ""
        raise ConfigError(
            f"parallelize gave a {built_class(given).__name__} that has {new[0]!r}{more}, which "
            f"the model does not have. {suggestion(new[0], whole)} Let it keep the names: divide "
            "in place, and wrap what is loaded afterwards."
        )


def require_alike(module: nn.Module, world: World) -> None:
    """Hold what ranks say of the same parameter over the same mesh against one another.

    Raises:
        ConfigError: on every rank; they place it differently, or keep it in another layout.
    """
    if world.size == 1:
        return
    divided: dict[str, Any] = {s.key: s.tensor for s in slots(module) if is_divided(s.tensor)}
    mine = {
        f"{key} over ranks {tensor.device_mesh.mesh.tolist()}": [_placed(tensor)]
        for key, tensor in divided.items()
    }
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    if len(world.united([digest], lambda low, high: sorted({*low, *high}))) == 1:
        return
    said = world.united(mine, _both)
    for name, ways in said.items():
        if len(ways) > 1:
            raise ConfigError(
                f"ranks do not divide {name} in the same way: {' and '.join(ways)}. Let all ranks "
                "of a mesh divide what they share alike."
            )


def _placed(tensor: Any) -> str:
    """Placements, and in which order dims follow one another in local memory."""
    strides = tensor._local_tensor.stride()
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    return f"{list(tensor.shape)} as {tensor.placements}, dims in the order {order}"


def _both(low: dict[str, list[str]], high: dict[str, list[str]]) -> dict[str, list[str]]:
    return low | {name: sorted({*low.get(name, ()), *ways}) for name, ways in high.items()}
