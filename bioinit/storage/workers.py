"""The threads that read or write at once: how many, and what they leave of the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

_pools = threading.Lock()
_running = 0
_threads_before = 0


def worker_count() -> int:
    """One per processor that this process may use, and no more than storage gains from.

    Ranks that a launcher started on one host share its processors.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(said) if said.isdecimal() else 1
    return max(1, min(8, processors // max(1, ranks)))


def run_workers(work: Callable[[threading.Event], None], count: int) -> None:
    """Call ``work`` in ``count`` threads and wait for all of them.

    ``work`` is given what is set when it should stop: another worker raised, or a person
    interrupted. The first error is raised here.
    """

    def one() -> None:
        # Each worker copies by itself; a team of threads per worker would only wait for cores.
        torch.set_num_threads(1)
        try:
            work(stopped)
        except BaseException:
            stopped.set()
            raise

    stopped = threading.Event()
    with (
        _thread_count_kept(),
        ThreadPoolExecutor(max(count, 1), thread_name_prefix="bioinit") as pool,
    ):
        futures = [pool.submit(one) for _ in range(count)]
        try:
            wait(futures)
        except BaseException:
            stopped.set()  # an interrupt: the workers stop after the call they are in
            raise
    for future in futures:
        future.result()


@contextmanager
def _thread_count_kept() -> Iterator[None]:
    """What a worker sets counts for the whole process, so it is put back here, after them.

    The first of several pools that overlap remembers, the last one puts back: a worker, or a second
    pool, could read what the others have set.
    """
    global _running, _threads_before
    with _pools:
        if not _running:
            _threads_before = torch.get_num_threads()
        _running += 1
    try:
        yield
    finally:
        with _pools:
            _running -= 1
            if not _running:
                torch.set_num_threads(_threads_before)
