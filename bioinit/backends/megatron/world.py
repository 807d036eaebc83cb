"""The parallel world that every module of megatron-core asks for, even for one process.

Megatron's modules read their process groups while they are constructed and again in ``forward``.
Whoever trains has initialized ``torch.distributed`` and Megatron's groups: those are used. Where
nobody has, processes that have met get the groups that ``placement.mesh`` describes, and a process
alone gets a world of its own, of one rank, which stays until the process ends or
``torch.distributed.destroy_process_group()`` is called: the model holds on to its groups.
"""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch.distributed

from bioinit.errors import ConfigError
from bioinit.keys import suggestion

AXES = ("tp", "pp", "vpp", "ep", "cp", "dp")
"""What divides a model of Megatron, or (``cp``, ``dp``) gives it to several processes whole."""


def imported(module: str = "megatron.core") -> ModuleType:
    """The package ``megatron.core`` or a module of it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            # It warns, one module after the other, that Apex and Transformer Engine are missing.
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        raise ConfigError(
            "this model is built by megatron-core, which is not installed. "
            "Install it with: pip install 'bioinit[megatron]'."
        ) from None


def require_world(mesh: Mapping[str, int] | None = None) -> None:
    """Have Megatron's process groups; they are made where nobody has.

    Args:
        mesh: how many ways each axis divides: ``tp``, ``pp``, ``vpp`` (chunks of each stage),
            ``ep``, ``cp`` and ``dp``; what is left out is 1, but for ``dp``, which is what remains.
            None: as the groups are, or as one process needs them.

    Raises:
        ConfigError: the axes do not go into the processes that there are, or groups exist already
            and are others.
    """
    parallel_state = imported("megatron.core.parallel_state")
    if not torch.distributed.is_available():
        raise ConfigError(
            "megatron-core needs torch.distributed, which this torch was built without. "
            "Install a torch that has it, or leave model.backend out."
        )
    if not torch.distributed.is_initialized():
        launched = os.environ.get("WORLD_SIZE", "1")
        if launched != "1":
            raise ConfigError(
                f"this process is one of WORLD_SIZE={launched}, and they have not met yet: what is "
                "built now could not join them. Call torch.distributed.init_process_group() first."
            )
        _check(dict(mesh or {}), 1)
        with _on_loopback():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    processes = torch.distributed.get_world_size()
    asked = _check(dict(mesh or {}), processes)
    if parallel_state.model_parallel_is_initialized():
        _compare({axis: asked[axis] for axis in mesh or ()}, sizes())
        return
    if mesh is None and processes != 1:
        raise ConfigError(
            f"torch.distributed has {processes} processes, but nobody has told Megatron how "
            "they share a model. Say placement.mesh={tp: ..., pp: ...}, or call "
            "megatron.core.parallel_state.initialize_model_parallel() in all of them first."
        )
    with _on_loopback():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=asked["tp"],
            pipeline_model_parallel_size=asked["pp"],
            virtual_pipeline_model_parallel_size=asked["vpp"] if asked["vpp"] > 1 else None,
            expert_model_parallel_size=asked["ep"],
            context_parallel_size=asked["cp"],
        )


def sizes() -> dict[str, int]:
    """How many ways each axis of Megatron's groups divides; none where there are no groups."""
    state = imported("megatron.core.parallel_state")
    if not state.model_parallel_is_initialized():
        return dict.fromkeys((*AXES, "etp"), 1)
    return {
        "tp": state.get_tensor_model_parallel_world_size(),
        "pp": state.get_pipeline_model_parallel_world_size(),
        "vpp": state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "ep": state.get_expert_model_parallel_world_size(),
        "cp": state.get_context_parallel_world_size(),
        "dp": state.get_data_parallel_world_size(),
        "etp": state.get_expert_tensor_parallel_world_size(),
    }


def _check(mesh: dict[str, int], processes: int) -> dict[str, int]:
    """Every axis with its size, where they go into ``processes``."""
    for axis, ways in mesh.items():
        if axis not in AXES:
            raise ConfigError(
                f"placement.mesh has an axis {axis!r}, and a model of megatron-core has "
                f"{', '.join(AXES)}. {suggestion(axis, AXES)}".strip()
            )
        if ways < 1:
            raise ConfigError(f"placement.mesh says {axis}: {ways}. Give each axis 1 or more.")
    found = {**dict.fromkeys(AXES, 1), **mesh}
    model = found["tp"] * found["pp"] * found["cp"]
    found["dp"] = mesh.get("dp", max(1, processes // model))
    said = f"placement.mesh={ {axis: mesh[axis] for axis in AXES if axis in mesh} }"
    if model * found["dp"] != processes:
        raise ConfigError(
            f"{said}, and tp * pp * cp * dp is {model * found['dp']}, but there are {processes} "
            "processes. Change the mesh, or start as many processes."
        )
    experts = found["tp"] * found["ep"] * found["pp"]
    if processes % experts:
        raise ConfigError(
            f"{said}: experts are divided over tp * ep * pp = {experts} processes, which do not go "
            f"into {processes}. Let ep divide cp * dp = {found['cp'] * found['dp']}."
        )
    if found["vpp"] > 1 and found["pp"] == 1:
        raise ConfigError(
            f"{said}: a pipeline of one stage has nothing to interleave. Leave vpp out, or give pp "
            "2 or more."
        )
    return found


def _compare(asked: Mapping[str, int], there: Mapping[str, int]) -> None:
    for axis, ways in asked.items():
        if there[axis] != ways:
            raise ConfigError(
                f"placement.mesh says {axis}: {ways}, but Megatron's process groups exist already, "
                f"with {axis} {there[axis]}. Correct the mesh, or leave the groups to bioinit."
            )


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Gloo listens on a socket for every group: let the network not see those of one process."""
    name = "GLOO_SOCKET_IFNAME"
    loopback = next((n for _, n in socket.if_nameindex() if n in ("lo", "lo0")), None)
    if name in os.environ or loopback is None or _has_several_processes():
        yield
        return
    os.environ[name] = loopback
    try:
        yield
    finally:
        del os.environ[name]


def _has_several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_initialized() and distributed.get_world_size() > 1
