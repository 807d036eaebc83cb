"""Strategies: how a model on meta is divided among ranks, before any of it has memory.

``decided`` says what a placement means for so many processes, and refuses meshes that cannot be;
``divide`` carries it out. Meshes and FSDP2 are torch's; tensor parallelism is the backend's, by the
plan of the architecture or the one that its family brings. A ``ddp`` model is not divided, and a
Megatron model comes divided from its own constructor.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import distributed, nn

from bioinit.backends.protocol import Backend, built_class
from bioinit.config import Placement
from bioinit.errors import ConfigError
from bioinit.keys import suggestion
from bioinit.targets import Target, slots

__all__ = ["AXES", "Sharing", "decided", "divide", "replicated", "units"]

AXES: Mapping[str, tuple[str, ...]] = {
    "single": (),
    "ddp": ("dp",),
    "fsdp2": ("replicate", "dp"),
    "tp": ("tp",),
    "fsdp2+tp": ("replicate", "dp", "tp"),
    "megatron": ("tp", "pp", "vpp", "ep", "cp", "dp"),
}
"""The axes of each strategy, outermost first; Megatron orders its own."""

_TORCH = ("replicate", "dp", "tp")
_OPTIONAL = ("replicate",)
_LEFT_OVER = "dp"
"""The axis that takes what remains of the world."""

_WITHIN = ("vpp", "ep")
"""Axes of Megatron along which there are no more ranks than the other axes have."""

_DIVIDES = ("fsdp2", "tp", "fsdp2+tp")


@dataclass(frozen=True)
class Sharing:
    """How so many processes share one model: a strategy, and how many ranks along each axis."""

    strategy: str
    axes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def size(self, axis: str) -> int:
        """How many ranks there are along ``axis``; 1 for an axis that is not there."""
        return dict(zip(self.axes, self.sizes, strict=True)).get(axis, 1)

    @property
    def divides(self) -> bool:
        """Whether ``divide`` has anything to do."""
        return self.strategy in _DIVIDES and (math.prod(self.sizes) > 1 or _have_met())

    def __str__(self) -> str:
        mesh = _shown(dict(zip(self.axes, self.sizes, strict=True)))
        return f"{self.strategy} {mesh}" if self.axes else self.strategy


def decided(
    placement: Placement, world_size: int, device: str | torch.device, is_megatron: bool = False
) -> Sharing:
    """What ``placement`` means for ``world_size`` processes.

    Args:
        placement: strategy and mesh; what is left open follows from the other and the world.
        world_size: how many processes share the model.
        device: where each puts its part; without an index, it is the one of its local rank.
        is_megatron: whether the model is built by Megatron.

    Raises:
        ConfigError: no such mesh can be, or none that the strategy has a use for.
    """
    device = torch.device(device)
    _require_devices(device, world_size)
    strategy = placement.strategy or _implied(placement.mesh, world_size, is_megatron)
    if placement.strategy is None and strategy == "single":
        return Sharing("single", device=str(device), dtype=placement.dtype)
    _require_fitting(strategy, world_size, is_megatron)
    given = _by_name(strategy, placement.mesh)
    _require_axes(strategy, given)
    sizes = _completed(strategy, given, world_size)
    axes = tuple(axis for axis in AXES[strategy] if axis in sizes)
    return Sharing(strategy, axes, tuple(sizes[a] for a in axes), str(device), placement.dtype)


def divide(module: nn.Module, sharing: Sharing, backend: Backend, plan: Mapping[str, str]) -> None:
    """Divide ``module``, which is on meta, in place. Process groups are made, and no memory.

    Args:
        module: what ``backend`` built.
        sharing: what was decided for it.
        backend: who knows how modules of its kind are divided for tensor parallelism.
        plan: what the family says about that, styles by module pattern; empty where the
            architecture has a plan of its own.

    Raises:
        ConfigError: it cannot be divided so.
    """
    if not sharing.divides:
        return
    divides_tensors, shards = sharing.size("tp") > 1, sharing.strategy != "tp"
    if divides_tensors and backend.divide is None:
        raise ConfigError(
            f"tensor parallelism (tp: {sharing.size('tp')}) is asked for, and nobody says how a "
            f"{built_class(module).__name__} is divided. Pass initialize(..., parallelize=fn) with "
            "a function that does it, or write strategy: fsdp2."
        )
    if shards:
        _require_shardable(module)
    if not _have_met():
        raise ConfigError(
            f"{sharing} needs processes that have met, and torch.distributed is not initialized. "
            "Start with torchrun, or call torch.distributed.init_process_group before."
        )
    # They cost a second to import, and one process needs neither.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = torch.device(sharing.device)
    if device.type == "cuda" and device.index is not None:
        # A mesh takes the device of the local rank where nobody has chosen one.
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, sharing.sizes, mesh_dim_names=sharing.axes)
    if divides_tensors and backend.divide is not None:
        backend.divide(module, mesh["tp"], plan)
    if shards:
        fsdp = mesh[tuple(axis for axis in sharing.axes if axis != "tp")]
        apart = () if sharing.dtype is None else backend.float32_keys(module, sharing.dtype)
        for unit in units(module, apart):
            fully_shard(unit, mesh=fsdp)


def replicated(
    module: nn.Module, targets: Mapping[str, Target], sharing: Sharing
) -> dict[str, Target]:
    """``targets`` with every rank that holds the same, also along axes that a tensor knows not of.

    Tensor parallelism leaves some parameters whole: FSDP2 divides them over its own axes, and every
    rank of ``tp`` has the same part; without FSDP2 every rank has all of them.

    Args:
        module: after ``divide``.
        targets: of ``module``, as ``describe`` gives them.
        sharing: of ``module``, by torch's strategies.
    """
    everybody, width = tuple(range(math.prod(sharing.sizes))), sharing.size("tp")
    meshes = {slot.key: getattr(slot.tensor, "device_mesh", None) for slot in slots(module)}

    def holders(target: Target) -> tuple[int, ...]:
        mesh = meshes[target.slot]
        if mesh is None:
            return everybody
        if "tp" in mesh.mesh_dim_names or width == 1:
            return target.replicas
        # The axis tp is the innermost one.
        groups = {rank // width for rank in target.replicas or (distributed.get_rank(),)}
        return tuple(rank for rank in everybody if rank // width in groups)

    return {key: target._replace(replicas=holders(target)) for key, target in targets.items()}


def units(root: nn.Module, apart: Collection[str] = ()) -> Iterator[nn.Module]:
    """What FSDP2 gathers at once: each block, and the root with all that is left, last.

    A block is what stands several times in a ``ModuleList``, or what a ``transformers`` model names
    as indivisible. One that shares a parameter with the rest of the model stays with the root.

    Args:
        root: the model.
        apart: keys of another dtype than the rest; a unit has one, so their owners are units.
    """
    owners = {key.rpartition(".")[0] for key in apart}
    named = dict(root.named_modules())
    blocks = {id(block) for block in _blocks(root)}
    found = [m for path, m in named.items() if path and (path in owners or id(m) in blocks)]
    uses = Counter(id(p) for m in named.values() for p in m._parameters.values() if p is not None)
    for unit in reversed(found):
        inside = Counter(
            id(p) for m in unit.modules() for p in m._parameters.values() if p is not None
        )
        if all(uses[parameter] == count for parameter, count in inside.items()):
            yield unit
    yield root


def _blocks(root: nn.Module) -> Iterator[nn.Module]:
    """Outermost first seen; a list inside a block divides it no further."""
    names = getattr(root, "_no_split_modules", None) or ()
    pending = [root]
    while pending:
        module = pending.pop()
        kinds = Counter(type(child) for child in module.children())
        for child in module.children():
            is_listed = isinstance(module, nn.ModuleList) and any(child.children())
            if is_listed and (kinds[type(child)] > 1 or type(child).__name__ in names):
                yield child
            else:
                pending.append(child)


def _implied(
    mesh: tuple[int, ...] | Mapping[str, int] | None, world_size: int, is_megatron: bool
) -> str:
    """The strategy that nobody wrote."""
    sizes = mesh.values() if isinstance(mesh, Mapping) else mesh or ()
    if isinstance(mesh, Mapping):
        _require_known(mesh)
    if world_size == 1 and all(size == 1 for size in sizes):
        return "single"
    if is_megatron:
        return "megatron"
    if not mesh:
        return "ddp"
    if not isinstance(mesh, Mapping):
        if len(mesh) == 1:
            return "fsdp2"
        raise ConfigError(
            f"placement.mesh={mesh!r} has sizes without names, and no strategy says what they are "
            "sizes of. Write the axes, mesh: {dp: 2, tp: 4}, or a strategy."
        )
    if set(mesh) - set(_TORCH):
        raise ConfigError(
            f"placement.mesh={_shown(mesh)} has axes that only models of Megatron-Core have. Set "
            f"model.backend=megatron, or use the axes {', '.join(_TORCH)}."
        )
    if "tp" not in mesh:
        return "fsdp2"
    return "tp" if set(mesh) == {"tp"} else "fsdp2+tp"


def _require_known(mesh: Mapping[str, int]) -> None:
    known = [*dict.fromkeys(axis for axes in AXES.values() for axis in axes)]
    for axis in mesh:
        if axis not in known:
            raise ConfigError(
                f"placement.mesh has an axis {axis!r}, and there is none of that name. "
                f"{suggestion(axis, known)} Axes are {', '.join(known)}.".replace("  ", " ")
            )


def _require_fitting(strategy: str, world_size: int, is_megatron: bool) -> None:
    if strategy == "single" and world_size > 1:
        raise ConfigError(
            f"placement.strategy=single is one process, and there are {world_size}. Start one, or "
            "write ddp for the whole model in each, fsdp2 for a part."
        )
    if strategy == "megatron" and not is_megatron:
        raise ConfigError(
            "placement.strategy=megatron is for models of Megatron-Core, and this one is not built "
            "by it. Set model.backend=megatron, or write fsdp2, tp or fsdp2+tp."
        )
    if is_megatron and strategy in _DIVIDES:
        raise ConfigError(
            f"placement.strategy={strategy} is not how a model of Megatron-Core is divided: it "
            "divides itself. Write strategy: megatron."
        )


def _by_name(strategy: str, mesh: tuple[int, ...] | Mapping[str, int] | None) -> Mapping[str, int]:
    if mesh is None or isinstance(mesh, Mapping):
        return mesh or {}
    axes = AXES[strategy]
    while len(axes) > len(mesh) and axes[0] in _OPTIONAL:
        axes = axes[1:]
    if strategy == "megatron" or len(axes) != len(mesh):
        raise ConfigError(
            f"placement.mesh={mesh!r} has {len(mesh)} sizes without names, and they do not say "
            f"which of the axes of {strategy} they are ({_listed(AXES[strategy])}). "
            "Write them: mesh: {axis: size}."
        )
    return dict(zip(axes, mesh, strict=True))


def _require_axes(strategy: str, mesh: Mapping[str, int]) -> None:
    _require_known(mesh)
    axes = AXES[strategy]
    for axis, size in mesh.items():
        if size < 1:
            raise ConfigError(
                f"placement.mesh has {axis}: {size}, and an axis has at least one rank. Write 1, "
                "or leave it out."
            )
        if axis not in axes:
            others = [name for name, known in AXES.items() if {*mesh} <= {*known}]
            raise ConfigError(
                f"placement.mesh has an axis {axis!r}, which strategy {strategy} does not have "
                f"({_listed(axes)}). Leave it out"
                + (f", or write strategy: {_listed(others, ' or ')}." if others else ".")
            )
    missing = [a for a in axes if a not in mesh and a != _LEFT_OVER and a not in _OPTIONAL]
    if missing and strategy != "megatron" and (mesh or strategy != "tp"):
        raise ConfigError(
            f"strategy {strategy} needs the axis {_listed(missing)}, and placement.mesh="
            f"{_shown(mesh)} has none. Write how many ranks it has, mesh: {{{missing[0]}: 2}}, or "
            "another strategy."
        )


def _completed(strategy: str, given: Mapping[str, int], world_size: int) -> Mapping[str, int]:
    """The mesh with the axis that may be left out, and of one rank where nothing was said."""
    sizes = dict(given)
    if strategy == "tp":
        sizes = sizes or {"tp": world_size}
    if strategy == "megatron":
        sizes = {axis: 1 for axis in AXES[strategy] if axis != _LEFT_OVER} | sizes
    ranks = math.prod(size for axis, size in sizes.items() if axis not in _WITHIN)
    if _LEFT_OVER in AXES[strategy] and _LEFT_OVER not in sizes and world_size % ranks == 0:
        sizes[_LEFT_OVER] = world_size // ranks
        ranks = world_size
    if ranks != world_size:
        open_ = _LEFT_OVER in AXES[strategy] and _LEFT_OVER not in sizes
        are = f"are {world_size} processes" if world_size > 1 else "is one process"
        more = f" times the {_LEFT_OVER} that remains" if open_ else ""
        raise ConfigError(
            f"placement.mesh={_shown(given)} is {ranks} ranks{more}, and there {are}. "
            f"Start {ranks}, torchrun --nproc-per-node {ranks} -m bioinit init ..., or write sizes "
            "that multiply to the number there is"
            + (", or strategy: fsdp2+tp to divide by dp as well." if strategy == "tp" else ".")
        )
    if strategy == "megatron":
        _require_megatron(sizes)
    return sizes


def _require_megatron(sizes: Mapping[str, int]) -> None:
    if sizes["vpp"] > 1 and sizes["pp"] == 1:
        raise ConfigError(
            f"placement.mesh has vpp: {sizes['vpp']}, parts of each pipeline stage, and no "
            "pipeline. Write pp: 2 or more, or leave vpp out."
        )
    room = sizes["dp"] * sizes["cp"]
    if room % sizes["ep"]:
        raise ConfigError(
            f"placement.mesh has ep: {sizes['ep']}, and experts are divided among the "
            f"{room} ranks of dp and cp, which it does not divide. Choose an ep that does."
        )


def _require_devices(device: torch.device, world_size: int) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.index is None and 0 < count < here:
        raise ConfigError(
            f"placement.device=cuda gives each process a GPU of its own, and there are {here} "
            f"processes on this host, which has {count}. Start {count}, or write cuda:0 to let "
            "all of them share one."
        )


def _require_shardable(module: nn.Module) -> None:
    for key, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(
                f"{key} is a scalar, and FSDP2 divides parameters along their first dim. Give it "
                "the shape (1,), or pass initialize(..., parallelize=fn) with a function that "
                "leaves it out."
            )
        if not parameter.is_contiguous():
            raise ConfigError(
                f"{key} ({_listed(map(str, parameter.shape), ' x ')}) is not contiguous, with "
                f"strides {tuple(parameter.stride())}, and FSDP2 divides contiguous parameters "
                "alone. Make it so in the constructor, or pass initialize(..., parallelize=fn)."
            )


def _have_met() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _shown(mesh: Mapping[str, int]) -> str:
    return f"{{{', '.join(f'{axis}: {size}' for axis, size in mesh.items())}}}"


def _listed(names: Collection[str] | Iterator[str], between: str = ", ") -> str:
    return between.join(names) or "it has none"
