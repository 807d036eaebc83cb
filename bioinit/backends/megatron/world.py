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

_AXES = {
    "tp": "tensor_model_parallel",
    "pp": "pipeline_model_parallel",
    "vpp": "virtual_pipeline_model_parallel",
    "ep": "expert_model_parallel",
    "cp": "context_parallel",
    "dp": "data_parallel",
    "etp": "expert_tensor_parallel",
}
"""What divides a model, or (``cp``, ``dp``) gives it to several processes whole; Megatron's words
for it."""


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
            Whether it fits the processes, ``parallelize.decided`` has judged. None: as the groups
            are, or as one process needs them.

    Raises:
        ConfigError: groups exist already and are others, or processes have not met.
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
        with _on_loopback():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    processes = torch.distributed.get_world_size()
    if parallel_state.model_parallel_is_initialized():
        _compare(mesh or {}, sizes())
        return
    if mesh is None and processes != 1:
        raise ConfigError(
            f"torch.distributed has {processes} processes, but nobody has told Megatron how "
            "they share a model. Say placement.mesh={tp: ..., pp: ...}, or call "
            "megatron.core.parallel_state.initialize_model_parallel() in all of them first."
        )
    asked = dict.fromkeys(_AXES, 1) | dict(mesh or {})
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
        return dict.fromkeys(_AXES, 1)
    return {axis: getattr(state, f"get_{name}_world_size")() or 1 for axis, name in _AXES.items()}


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
