"""How long until every rank has its shards, beside the ways that people use today.

    python benchmarks/ranks.py                                  # 2 and 4 gloo processes, 3 GB
    python benchmarks/ranks.py --only rows,columns --ranks 2 --rounds 7
    python benchmarks/ranks.py --quick                          # seconds; for the tests

The clock of a rank runs from a call that gets a path and a divided model on meta to shards that can
train: memory, reading, and a write to one element of every 4 KiB page of its shards (`initialize`
builds its model on the clock as well). A round's
time is that of its slowest rank. Each way runs in fresh processes that have met and have loaded a
tiny checkpoint; the ways alternate round by round; files are in the page cache; the memory that
they will use has been backed by the host. Ratios are taken within a round, and their median is
shown. The first run of each way is not timed: it compares every shard with what is stored.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
from rounds import HERE, Pool, warm

MIB = 1 << 20


@dataclass(frozen=True)
class Way:
    """One row of a table: a way, where it reads from, and whether replicas share the reading."""

    label: str
    key: str
    container: str
    parallel: str = "off"


@dataclass(frozen=True)
class Table:
    """The ways for one layout, and what ours may take of each peer's time."""

    title: str
    ways: tuple[Way, ...]
    goals: dict[str, float] = field(default_factory=dict)
    most_read: float | None = None
    """Bytes that a rank may read, over the bytes of its shards."""


_OURS = tuple(
    Way(f"bioinit.load_weights from {container}", "load_weights", container)
    for container in ("single", "shards", "torch_dist", "zarr")
)
_PEERS = (
    Way("torch.distributed.checkpoint.load", "dcp", "dcp"),
    Way("safetensors get_slice", "slices", "single"),
)
TABLES = {
    "rows": Table("FSDP2: rows", (*_OURS, *_PEERS), {"dcp": 0.15, "slices": 0.5}, 1.02),
    "columns": Table("every weight by columns", (*_OURS, *_PEERS), {"dcp": 0.33, "slices": 1.25}),
    "tp": Table("tensor parallel: rows and columns", (*_OURS, *_PEERS)),
    "replicas": Table(
        "replicas",
        (
            Way("bioinit.initialize, each reads all", "initialize", "single"),
            Way("bioinit.initialize, parallel load", "initialize", "single", "on"),
        ),
    ),
}


@dataclass
class Run:
    """A way and what its rounds gave."""

    way: Way
    results: list[dict[str, object]] = field(default_factory=list)
    checked: dict[str, object] | None = None
    error: str | None = None


def start(
    way: Way, layout: str, size: int, folder: Path, tiny: Path, pool: Pool, check: bool = False
) -> dict[str, object]:
    """All ranks of one way, once: the slowest one's time, and the most of the rest."""
    pool.hold()
    request = {
        "way": way.key,
        "path": str(folder / way.container),
        "warm_up": str(tiny / way.container),
        "layout": layout,
        "size": size,
        "parallel": way.parallel,
        "check": check,
    }
    port = _free_port()
    with tempfile.TemporaryFile("w+") as complaints:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(HERE / "divided.py"), json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                env=_environment(rank, size, port),
            )
            for rank in range(size)
        ]
        try:
            found = _converse(ranks, request["path"], pool)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
                process.stdin.close()
                process.stdout.close()
        if found is None:
            complaints.seek(0)
            lines = [line for line in complaints.read().splitlines() if line.strip()]
            return {"error": lines[-1].strip() if lines else "a rank ended"}
    most = {key: max(each[key] for each in found) for key in found[0] if key != "differing"}
    read = sum(each["bytes_by_calls"] for each in found)
    over = max(each["resident_peak"] - each["shard_bytes"] for each in found)
    share = max(each["bytes_by_calls"] / each["shard_bytes"] for each in found)
    wrong = sorted({name for each in found for name in each.get("differing", ())})
    return {**most, "read_by_all": read, "over_shards": over, "read": share, "differing": wrong}


def _converse(ranks: list[subprocess.Popen], path: str, pool: Pool) -> list[dict] | None:
    """Wait until all are ready, let them go, collect what they say; None where one gave up."""
    if any(process.stdout.readline().strip() != "ready" for process in ranks):
        return None
    warm(path)
    pool.release()
    for process in ranks:
        process.stdin.write("go\n")
        process.stdin.flush()
    if any(process.stdout.readline().strip() != "done" for process in ranks):
        return None
    said = [process.stdout.readline() for process in ranks]
    return [json.loads(line) for line in said] if all(said) else None


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def race(name: str, size: int, chosen: argparse.Namespace, folders: tuple[Path, Path]) -> list[Run]:
    """Check every way of a table, then time each once per round."""
    table = TABLES[name]
    keys = chosen.ways.split(",") if chosen.ways else None
    kept = [w for w in table.ways if keys is None or w.key in keys]
    if chosen.containers:
        kept = [w for w in kept if w.key != "load_weights" or w.container in chosen.containers]
    runs = [Run(way) for way in kept]
    pool = Pool(0 if chosen.quick else chosen.pool << 30)
    for run in runs:
        found = start(run.way, name, size, *folders, Pool(0), check=True)
        run.checked = found
        if found.get("differing"):
            run.error = f"loads other values: {len(found['differing'])}, {found['differing'][0]}"
        run.error = found.get("error", run.error)
        say(f"  checked {run.way.label}: {run.error or 'equal'}")
    alive = [run for run in runs if run.error is None]
    for number in range(chosen.rounds):
        turn = number % max(1, len(alive))
        for run in alive[turn:] + alive[:turn]:
            begin = time.perf_counter()
            found = start(run.way, name, size, *folders, pool)
            run.error = found.get("error", run.error)
            run.results.append(found)
            took = found.get("seconds", float("nan"))
            said = f"  round {number + 1} {run.way.label}: {took:.3f} s"
            say(f"{said} (processes {time.perf_counter() - begin:.0f} s)")
    return runs


def table_of(name: str, size: int, runs: list[Run]) -> str:
    """Markdown."""
    table = TABLES[name]
    timed = [run for run in runs if run.error is None and run.results]
    first = next((run for run in timed if run.way.key in ("load_weights", "initialize")), None)
    lines = [
        f"\n## {table.title}, {size} ranks\n",
        "| way | seconds | first row / this | read / shards | read by all | peak over shards |",
        "|---|---|---|---|---|---|",
    ]
    for run in timed:
        pairs = zip(first.results, run.results, strict=True) if first else ()
        ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in pairs]
        said = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        goal = table.goals.get(run.way.key)
        said += f"; to reach: {goal}" if goal else ""
        seconds = statistics.median(each["seconds"] for each in run.results)
        read = statistics.median(each["read"] for each in run.results)
        over = statistics.median(each["over_shards"] for each in run.results) / MIB
        total = statistics.median(each["read_by_all"] for each in run.results) / 1e6
        lines.append(
            f"| {run.way.label} | {seconds:.2f} | {'' if run is first else said} | {read:.3f} | "
            f"{total:.0f} MB | {over:.0f} MiB |"
        )
    lines += [f"\n{run.way.label}: {run.error}" for run in runs if run.error]
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bioinit-bench")
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--ways", default="", help="load_weights, initialize, dcp, slices")
    parser.add_argument("--containers", default="", help="what load_weights reads from")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pool", type=int, default=8, help="GiB to hold backed between rounds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds = 1
    tiny = checkpoints.decoder(chosen.work / "quick", checkpoints.QUICK)
    full = tiny if chosen.quick else checkpoints.decoder(chosen.work / "full", checkpoints.FULL)
    for folder in (tiny, full):
        for container in ("torch_dist", "dcp", "zarr"):
            config = folder / container / "config.json"
            if not config.exists():
                config.write_bytes((folder / "single" / "config.json").read_bytes())
    document = {}
    for size in map(int, chosen.ranks.split(",")):
        for name in chosen.only.split(","):
            runs = race(name, size, chosen, (full, tiny))
            document[f"{name}-{size}"] = [
                {**vars(run.way), **{k: v for k, v in vars(run).items() if k != "way"}}
                for run in runs
            ]
            print(table_of(name, size, runs), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
