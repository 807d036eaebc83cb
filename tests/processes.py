"""Several processes that met at one store: what tests of many ranks run in.

    results = together(2, cells, "an argument")     # [what rank 0 returned, what rank 1 returned]

The function runs in new processes after ``init_process_group("gloo")``; it must be importable (a
top-level function of a test module), and give what pickle takes. If one raises, the test fails with
the traceback of every rank that did.
"""

import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def together(size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list:
    """``function(*args)`` in ``size`` ranks; what each returned, in order."""
    outcomes = outcomes_of(size, function, *args, timeout=timeout)
    failed = [f"rank {rank}:\n{said}" for rank, (kind, said) in enumerate(outcomes) if kind != "ok"]
    assert not failed, "\n".join(failed)
    return [said for _, said in outcomes]


def outcomes_of(size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list:
    """As above, with ("ok", result), ("raised", traceback) or ("died", exit code) of each rank."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(size)]
        ranks = [
            context.Process(target=_run, args=(rank, size, port, path, function, args), daemon=True)
            for rank, path in enumerate(said)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0, end - time.monotonic()))
            hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        finally:
            for process in ranks:
                process.kill()
        found = [
            pickle.loads(path.read_bytes()) if path.exists() else ("died", process.exitcode)
            for path, process in zip(said, ranks, strict=True)
        ]
    assert not hanging, f"ranks {hanging} still ran after {timeout} s; all said: {found}"
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(rank: int, size: int, port: int, said: Path, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        torch.distributed.init_process_group("gloo")
        result = function(*args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        outcome = ("ok", result)
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    said.with_suffix(".part").write_bytes(pickle.dumps(outcome))
    said.with_suffix(".part").rename(said)
