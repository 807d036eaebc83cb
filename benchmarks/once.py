"""One way, once, in this fresh process: started by ``rounds.py``, which talks to it by lines.

It imports what the way needs, loads a tiny checkpoint once so that no lazy import is on the clock,
says ``ready``, waits for ``go``, loads, touches every page of every parameter, and prints one line
of JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peers import Job, Way

PR_SET_THP_DISABLE = 41
PAGE = 4096


def forbid_huge_pages() -> None:
    """Ordinary pages for this whole process, whoever asks for others."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_THP_DISABLE)")


def status() -> dict[str, int]:
    """The lines of ``/proc/self/status`` that count kilobytes, in bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def io() -> dict[str, int]:
    """``/proc/self/io``."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def tensors_of(loaded: object) -> list:
    """The parameters of a module, or the one tensor of a limit."""
    import torch

    if isinstance(loaded, torch.nn.Module):
        return list(loaded.parameters())
    return [loaded]


def touch(tensors: Iterable) -> None:
    """Write one element of every 4 KiB page; the value stays what it is."""
    import torch

    with torch.no_grad():
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.nbytes <= 2 * PAGE:
                _touch_small(tensor.data_ptr(), tensor.nbytes)
                continue
            flat = tensor.detach().view(-1)
            flat[:: PAGE // tensor.element_size()].mul_(1)
            flat[-1:].mul_(1)


def _touch_small(address: int, size: int) -> None:
    """The same for a page or two, where calling torch would cost more than the page."""
    for at in {address, address + min(PAGE, size - 1), address + size - 1}:
        byte = ctypes.c_ubyte.from_address(at)
        byte.value = byte.value


def differing(loaded: object, expected: dict[str, int], job: Job) -> list[str]:
    """Names of parameters whose bytes are not the stored ones (after undoing a widening cast)."""
    import torch
    from checkpoints import digest

    wrong = []
    if not isinstance(loaded, torch.nn.Module):
        return wrong
    found = {k: v for k, v in loaded.named_parameters() if job.wants(k)}
    for name, tensor in found.items():
        want_dtype = torch.float32 if job.model == "cells" else job.torch_dtype
        stored = tensor.detach() if job.model == "cells" else tensor.detach().to(torch.bfloat16)
        widened = stored.to(want_dtype)
        if (
            tensor.dtype != want_dtype
            or not tensor.requires_grad
            or digest(stored) != expected.get(name)
            or not torch.equal(widened, tensor.detach())
        ):
            wrong.append(name)
    return wrong + sorted(name for name in expected if job.wants(name) and name not in found)


def prepare(request: dict) -> tuple[Way, Job]:
    """Import what the way needs and let it load something tiny."""
    from ours import LIMITS, OURS
    from peers import PEERS, Job, import_all

    way = {**PEERS, **OURS, **LIMITS}[request["way"]]
    import_all(way)
    way.run(Job(**{**request["job"], **request["warm_up"]}))
    return way, Job(**request["job"])


def measure(way: Way, job: Job, wait: Callable[[], None]) -> tuple[object, dict[str, object]]:
    """Load and touch on the clock, with what the kernel counted meanwhile."""
    import torch

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before, io_before, faults_before = status(), io(), resource.getrusage(resource.RUSAGE_SELF)
    if job.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wait()
    begin = time.perf_counter()
    loaded = way.run(job)
    if job.device != "cpu":
        torch.cuda.synchronize()
    there = time.perf_counter()
    tensors = tensors_of(loaded)
    touch(tensors)
    if job.device != "cpu":
        torch.cuda.synchronize()
    end = time.perf_counter()
    after, io_after, faults_after = status(), io(), resource.getrusage(resource.RUSAGE_SELF)
    device_peak = torch.cuda.max_memory_allocated() if job.device != "cpu" else 0
    return loaded, {
        "device_peak": device_peak,
        "seconds": end - begin,
        "call_seconds": there - begin,
        "parameter_bytes": sum(t.nbytes for t in tensors),
        "needed_bytes": needed_bytes(loaded, job),
        "resident_peak": after["VmHWM"] - before["VmRSS"],
        "anonymous_before": before["RssAnon"],
        "anonymous_after": after["RssAnon"],
        "bytes_by_calls": io_after["rchar"] - io_before["rchar"],
        "bytes_from_disk": io_after["read_bytes"] - io_before["read_bytes"],
        "minor_faults": faults_after.ru_minflt - faults_before.ru_minflt,
        "major_faults": faults_after.ru_majflt - faults_before.ru_majflt,
    }


def needed_bytes(loaded: object, job: Job) -> int:
    """Bytes of the parameters that are not skipped."""
    named = loaded.named_parameters() if hasattr(loaded, "named_parameters") else ()
    return sum(tensor.nbytes for name, tensor in named if job.wants(name))


def compare(loaded: object, job: Job) -> list[str]:
    """What differs from what was stored."""
    expected = json.loads((Path(job.path).parent / "expected.json").read_text())
    return differing(loaded, expected, job)


def here(request: dict) -> dict[str, object]:
    """The same in the calling process: quick, and so no measurement."""
    way, job = prepare(request)
    loaded, result = measure(way, job, lambda: None)
    return {**result, "differing": compare(loaded, job)}


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.argv[1])
    if request["small_pages"]:
        forbid_huge_pages()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not answer for us

    def wait() -> None:
        print("ready", file=answers, flush=True)
        if sys.stdin.readline().strip() != "go":
            raise SystemExit("nobody said go")

    way, job = prepare(request)
    loaded, result = measure(way, job, wait)
    print("done", file=answers, flush=True)
    if request["check"]:
        result["differing"] = compare(loaded, job)
    print(json.dumps(result), file=answers, flush=True)
    os._exit(0)  # freeing gigabytes tidily is nobody's time


if __name__ == "__main__":
    main()
