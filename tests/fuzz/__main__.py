"""The long run: `make fuzz`, or `python -m tests.fuzz --seconds 300 --targets zarr,nemo`.

Each target runs in a process of its own with bounded memory. With atheris installed, which learns
from the lines that an input reaches, else with random decisions. What is found is written to a
folder as JSON, small enough to become a file of tests/fuzz/seeds/ once it is mended.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

HEADROOM = 2 << 30
SLOWEST = 60
STARTING = 120
LONGEST_DECISIONS, LONGEST_INPUT = 256, 8192
FIRST_RANDOM = 300
MOST_KEPT = 20
RUNS = re.compile(r"Done (\d+) runs")
COVERED = re.compile(r"cov: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="in all (default %(default)s)")
    parser.add_argument("--targets", default="", help="names with commas between (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="number of the first random input")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where findings go")
    parser.add_argument("--replay", type=Path, help="run one finding again")
    asked = parser.parse_args()
    if asked.replay:
        return _replay(asked.replay)
    atheris, targets = _imported()
    chosen = asked.targets.split(",") if asked.targets else list(targets.NAMES)
    unknown = sorted(set(chosen) - set(targets.NAMES))
    if unknown:
        raise SystemExit(f"no target {', '.join(unknown)}; there are {', '.join(targets.NAMES)}")
    keep = asked.keep.resolve()
    keep.mkdir(parents=True, exist_ok=True)
    seconds = max(1, asked.seconds // len(chosen))
    how = "guided by coverage" if atheris else "at random (atheris is not installed)"
    print(f"{len(chosen)} targets, {seconds} s each, {how}; findings go to {keep}", flush=True)
    total, bad = 0, 0
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as place:
        home = Path(place).resolve()
        for wrong in targets.warm_up(home / "outer" / "checkpoint"):
            print(f"does not open, and should: {wrong}")
            bad += 1
        for target in chosen:
            run = _Run(atheris, targets, target, seconds, asked.seed, keep, home)
            runs, found = run.in_a_child()
            total += runs
            bad += found
    print(f"{total} runs, {bad} findings")
    return 1 if bad else 0


def _imported() -> tuple[Any, Any]:
    """The fuzzer, None if it is not installed, and the targets, their code prepared for it."""
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None:
        from tests.fuzz import targets
    else:
        with atheris.instrument_imports(include=["bioinit"]):
            from tests.fuzz import targets

            targets.import_everything()
    import torch

    torch.set_num_threads(1)
    return atheris, targets


class _Run:
    """One target for some seconds, in a process that is forked for it."""

    def __init__(
        self,
        atheris: Any,
        targets: Any,
        target: str,
        seconds: int,
        seed: int,
        keep: Path,
        home: Path,
    ) -> None:
        self.atheris = atheris
        self.targets = targets
        self.target = target
        self.seconds = seconds
        self.seed = seed
        self.keep = keep
        self.folder = home / "outer" / "checkpoint"
        self.corpus = home / f"corpus-{target}"
        self.log = home / f"log-{target}"
        self.known: set[str] = set()

    def in_a_child(self) -> tuple[int, int]:
        """How many inputs were tried, and how many different findings there were."""
        before, began = set(self.keep.iterdir()), time.monotonic()
        child = os.fork()
        if child == 0:
            self._be_the_child()
        status = self._wait(child, began + self.seconds + STARTING)
        output = self.log.read_text(errors="replace")
        runs = sum(map(int, RUNS.findall(output)))
        covered = COVERED.findall(output)
        found = sorted(set(self.keep.iterdir()) - before)
        how = f", {covered[-1]} places reached" if covered else ""
        took = time.monotonic() - began
        print(f"{self.target:13}{runs:>9} runs in {took:4.0f} s{how}, {len(found)} findings")
        for path in found:
            print(f"  {path.name}")
        if status:
            print(f"  stopped with {status}:\n{output[-3000:]}")
        sys.stdout.flush()
        return runs, len(found) + (status != 0)

    def _wait(self, child: int, end: float) -> int:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.2)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -signal.SIGKILL

    def _be_the_child(self) -> None:
        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            _limit_memory()
            if self.atheris is None:
                self._at_random()
            else:
                self._guided()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def _guided(self) -> None:
        self.corpus.mkdir()
        for number, seed in enumerate(self.targets.seeds(self.target)):
            (self.corpus / f"seed{number}").write_bytes(b"\1" + seed)
        for number in range(self.seed, self.seed + FIRST_RANDOM):
            data = self.targets.decisions(self.target, number)
            (self.corpus / f"random{number}").write_bytes(data)
        longest = LONGEST_INPUT if self.target in self.targets.PARSERS else LONGEST_DECISIONS
        options = [f"-max_total_time={self.seconds}", f"-max_len={longest}", f"-seed={self.seed}"]
        options += [f"-timeout={SLOWEST}", "-rss_limit_mb=4096", "-len_control=0"]
        options += [f"-artifact_prefix={self.keep}/{self.target}-", str(self.corpus)]
        self.atheris.Setup([sys.argv[0], *options], self._one)
        self.atheris.Fuzz()

    def _at_random(self) -> None:
        number, end = self.seed, time.monotonic() + self.seconds
        while time.monotonic() < end:
            self._one(self.targets.decisions(self.target, number))
            number += 1
        print(f"Done {number - self.seed} runs")

    def _one(self, data: bytes) -> None:
        targets = self.targets
        try:
            targets.check(self.target, targets.case_of(self.target, data), self.folder)
        except targets.watch.Defect as defect:
            kind = targets.signature(defect)
            if kind in self.known or len(self.known) >= MOST_KEPT:
                return
            self.known.add(kind)
            case = targets.shrunk(self.target, data, self.folder)
            name = re.sub(r"[^\w.]+", "-", f"{self.target}-{kind}")[:100]
            text = targets.to_json(self.target, str(defect), case)
            (self.keep / f"{name}.json").write_text(text)


def _replay(path: Path) -> int:
    from tests.fuzz import targets

    target, case = targets.from_json(path.read_text())
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as place:
        folder = Path(place).resolve() / "outer" / "checkpoint"
        targets.warm_up(folder)
        targets.check(target, case, folder)
    print(f"{path}: nothing is found any more")
    return 0


def _memory_disk() -> str | None:
    """A disk in memory, where there is one: a run writes some files per input."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _limit_memory() -> None:
    """So that a huge allocation fails here, and does not stop other programs."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
