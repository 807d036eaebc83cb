"""Rounds of fresh processes, fair to each way.

Files are warm, memory is backed by the host, the order alternates, and ratios are taken in pairs.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
HUGE = 2 << 20
LEFT = 3 << 30


class Pool:
    """Memory that the host has really given to us, handed back at the start of each clock.

    A guest's free memory that nobody touched for some seconds may have been taken back by the host,
    and touching it then measures the host. So this process holds memory between the rounds and lets
    go of it when the clock starts.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._memory: mmap.mmap | None = None

    def hold(self) -> None:
        """Take the memory and write to each page."""
        if self._memory is not None or self.size == 0:
            return
        size = min(self.size, max(0, available_memory() - LEFT)) // HUGE * HUGE
        if size == 0:
            return
        self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            self._memory[at] = 1

    def release(self) -> None:
        """Give it back to this machine's kernel, which gives it to the next who asks."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def available_memory() -> int:
    """``MemAvailable`` in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def warm(folder: str) -> None:
    """Read every file once, so that all ways find it in the page cache."""
    buffer = bytearray(16 << 20)
    for file in _files(folder):
        with open(file, "rb", buffering=0) as stored:
            while stored.readinto(buffer):
                pass


def cool(folder: str) -> None:
    """Drop the files from the page cache."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _files(folder: str) -> list[Path]:
    return [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]


@dataclass
class Run:
    """One way with what it is asked to do."""

    key: str
    label: str
    request: dict[str, object]
    environment: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, object]] = field(default_factory=list)
    checked: dict[str, object] | None = None
    error: str | None = None


def start(run: Run, pool: Pool, cold: bool = False, check: bool = False) -> dict[str, object]:
    """Start a process, release the memory when it is ready, and return what it measured.

    With ``check`` it also compares what it loaded, and this process watches its memory meanwhile,
    so that such a run is no timed one.
    """
    path = str(run.request["job"]["path"])
    pool.hold()
    environment = {**os.environ, **run.environment, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    request = {**run.request, "check": check}
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "once.py"), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=environment,
        )
        try:
            result = _converse(process, path, pool, cold, check)
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait()
        if result is None:
            complaints.seek(0)
            lines = [line for line in complaints.read().splitlines() if line.strip()]
            return {"error": lines[-1].strip() if lines else f"exit {process.returncode}"}
        return result


def _converse(
    process: subprocess.Popen, path: str, pool: Pool, cold: bool, watch: bool
) -> dict[str, object] | None:
    """Wait for ``ready``, say ``go``, return the answer; None where the process gave up."""
    if process.stdout.readline().strip() != "ready":
        return None
    if cold:
        cool(path)
    else:
        warm(path)
    pool.release()
    process.stdin.write("go\n")
    process.stdin.flush()
    peak = _watch_anonymous(process) if watch else 0
    if process.stdout.readline().strip() != "done":
        return None
    result = json.loads(process.stdout.readline())
    if watch:
        peak = max(peak, result["anonymous_after"])
        result["anonymous_peak"] = peak - result["anonymous_before"]
    return result


def _watch_anonymous(process: subprocess.Popen) -> int:
    """The largest ``RssAnon`` seen until the process is done."""
    peak = 0
    while not select.select([process.stdout], [], [], 0.002)[0]:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        _, found, rest = text.partition("RssAnon:")
        if not found:
            break
        peak = max(peak, int(rest.split()[0]) * 1024)
    return peak


def check(run: Run, measured: Callable[[], dict[str, object]]) -> None:
    """Load once off the clock: what differs from the stored bytes, or fails, is out of the race."""
    result = measured()
    if "error" in result:
        run.error = str(result["error"])
    elif result["differing"]:
        count, first = len(result["differing"]), result["differing"][0]
        run.error = f"loads other values: {count} differ, first {first}"
    else:
        run.checked = result


def alternate(runs: Sequence[Run], rounds: int, pool: Pool, say: Callable[[str], None]) -> None:
    """Check every run, then time each once per round, starting each round with another one."""
    for run in runs:
        check(run, lambda run=run: start(run, Pool(0), check=True))
        say(f"  checked {run.label}: {run.error or 'equal'}")
    alive = [run for run in runs if run.error is None]
    for number in range(rounds):
        turn = number % max(1, len(alive))
        for run in alive[turn:] + alive[:turn]:
            begin = time.perf_counter()
            result = start(run, pool)
            if "error" in result:
                run.error = str(result["error"])
            run.results.append(result)
            took, whole = result.get("seconds", float("nan")), time.perf_counter() - begin
            say(f"  round {number + 1} {run.label}: {took:.3f} s (process {whole:.0f} s)")


def median(run: Run, what: str) -> float:
    """The median of one measure over the rounds."""
    return statistics.median(float(result[what]) for result in run.results)


def ratios(run: Run, other: Run) -> list[float]:
    """``run`` over ``other``, round by round."""
    pairs = zip(run.results, other.results, strict=True)
    return [float(mine["seconds"]) / float(theirs["seconds"]) for mine, theirs in pairs]


def timed(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs that have numbers."""
    return (run for run in runs if run.error is None and run.results)
