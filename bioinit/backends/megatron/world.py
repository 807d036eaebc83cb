"""The parallel world that every module of megatron-core asks for, even for one process.

Megatron's modules read their process groups while they are constructed and again in ``forward``.
Whoever trains has initialized ``torch.distributed`` and Megatron's groups: those are used. Where
nobody has, this process gets a world of its own, of one rank, which stays until the process ends or
``torch.distributed.destroy_process_group()`` is called: the model holds on to its groups.
"""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch.distributed

from bioinit.errors import ConfigError


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


def require_world() -> None:
    """Have Megatron's process groups, for one process that holds the whole model.

    Raises:
        ConfigError: the model would be divided among processes.
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
                "built now could not join them. Call torch.distributed.init_process_group() and "
                "megatron.core.parallel_state.initialize_model_parallel() first."
            )
        with _on_loopback():
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        processes = torch.distributed.get_world_size()
        if processes != 1:
            raise ConfigError(
                f"torch.distributed has {processes} processes, but nobody has told Megatron how "
                "they share a model. Call megatron.core.parallel_state.initialize_model_parallel() "
                "in all of them first."
            )
        with _on_loopback():
            parallel_state.initialize_model_parallel()
    for word, ways in (
        ("tensor", parallel_state.get_tensor_model_parallel_world_size()),
        ("pipeline", parallel_state.get_pipeline_model_parallel_world_size()),
        ("expert", parallel_state.get_expert_model_parallel_world_size()),
        ("expert tensor", parallel_state.get_expert_tensor_parallel_world_size()),
        ("context", parallel_state.get_context_parallel_world_size()),
    ):
        if ways != 1:
            raise ConfigError(
                f"Megatron is initialized with {word} parallelism of {ways}, and a model that is "
                "divided among processes cannot be loaded yet. Initialize it with sizes of 1; data "
                "parallelism may be of any size."
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
