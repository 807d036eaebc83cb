"""How long until a checkpoint can train, beside the ways that people use today.

    python benchmarks/load.py                          # everything: half an hour, 16 GB of disk
    python benchmarks/load.py --only whole,many --rounds 9
    python benchmarks/load.py --quick                  # seconds; for the tests
    python benchmarks/load.py --device cuda

The clock runs from a call that gets a path to a module that can train: its construction, reading,
and a write to one element of every 4 KiB page of every parameter. Each way runs in fresh processes,
imports done and a tiny checkpoint loaded before the clock; the ways alternate round by round; files
are in the page cache; the memory they will use has been backed by the host and is free. Ratios are
taken within a round, and the median of them is shown. The first run of each way is not timed: it
compares every parameter with what was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import once
import planning
import tables
from ours import LIMITS, OURS
from peers import PEERS, Way
from rounds import Pool, Run, alternate, check, start

HUGE_ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}
TABLES_OF_THEIR_OWN = ("megatron", "tensorstore")
ALL = tuple(key for key in PEERS if key not in TABLES_OF_THEIR_OWN)
FROM_SAFETENSORS = tuple(key for key, way in PEERS.items() if way.container == "single")
FAST = ("safetensors_copy", "safetensors_assign", "safetensors_pread", "from_pretrained")
MINE = tuple(OURS)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One table: which ways, on what, under which conditions, and the ratio to reach."""

    title: str
    ways: tuple[str, ...]
    container: str | None = None
    model: str = "decoder"
    dtype: str = "bfloat16"
    huge: bool = False
    small_pages: bool = False
    finite: bool = False
    goal: float | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


SCENARIOS = {
    "whole": Scenario(
        title="Whole decoder, each way as its users call it",
        ways=(*MINE, *ALL, "limit", "pinned"),
        goal=0.45,
    ),
    "shards": Scenario(
        title="Whole decoder in 8 shards",
        ways=(*MINE, *FROM_SAFETENSORS, "limit", "pinned"),
        container="shards",
    ),
    "bin": Scenario(
        title="Whole decoder from pytorch_model.bin",
        ways=(*MINE, "torch_copy", "torch_assign", "from_pretrained", "accelerate"),
        container="bin",
    ),
    "dcp": Scenario(
        title="Whole decoder from DCP", ways=("load_weights", "dcp"), container="dcp", goal=0.2
    ),
    "torch_dist": Scenario(
        title="Whole decoder from DCP with Megatron-Core's files",
        ways=("load_weights", "dcp", "megatron"),
        container="torch_dist",
        devices=("cpu",),
    ),
    "zarr": Scenario(
        title="Whole decoder from zarr as Megatron-Core wrote it",
        ways=("load_weights", "tensorstore"),
        container="zarr",
        devices=("cpu",),
    ),
    "nemo2": Scenario(
        title="Whole decoder as NeMo 2 stores it, into the model of transformers",
        ways=("load_weights", "alike"),
        container="nemo2",
        devices=("cpu",),
    ),
    "huge": Scenario(
        title="Whole decoder, huge pages for torch's allocator too (THP_MEM_ALLOC_ENABLE=1)",
        ways=(*MINE, *FAST, "torch_copy", "runai", "fastsafetensors"),
        huge=True,
        goal=0.8,
        devices=("cpu",),
    ),
    "small_pages": Scenario(
        title="Whole decoder, 4 KiB pages for everyone",
        ways=(*MINE, *FAST, "torch_copy", "runai"),
        small_pages=True,
        goal=1.05,
        devices=("cpu",),
    ),
    "float32": Scenario(
        title="Whole decoder, bfloat16 stored, float32 parameters",
        ways=(*MINE, *(key for key in ALL if "float32" in PEERS[key].can)),
        dtype="float32",
        goal=0.45,
    ),
    "finite": Scenario(
        title="What init.check_finite costs", ways=MINE, finite=True, devices=("cpu",)
    ),
    "many": Scenario(
        title="Many small tensors (4 KB each)",
        ways=("load_weights", *(key for key in ALL if "cells" in PEERS[key].can)),
        model="cells",
        goal=0.6,
        devices=("cpu",),
    ),
}
EXTRA = ("half", "planning", "help")


class Bench:
    """The parts of one call of this script."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.size = checkpoints.QUICK if options.quick else checkpoints.FULL
        self.rounds = 1 if options.quick else options.rounds

    def run(self, scenario: Scenario) -> list[Run]:
        """Measure every way of a scenario."""
        runs = [self.prepare(scenario, key) for key in self._ways(scenario)]
        if scenario.finite:
            plain = [self.prepare(scenario, key, finite=False) for key in self._ways(scenario)]
            runs = [run for pair in zip(plain, runs, strict=True) for run in pair]
        hold = {"decoder": 3_000_000_000, "cells": 50_000 * 4096}[scenario.model]
        hold *= 1 if scenario.dtype == "float32" else 0.5
        if self.options.quick:
            return self.check_here(runs)
        pool = Pool(int(hold * 4.5))
        alternate(runs, self.rounds, pool, self.say)
        pool.release()
        return runs

    def _ways(self, scenario: Scenario) -> list[str]:
        chosen = self.options.ways.split(",") if self.options.ways else scenario.ways
        device = self.options.device
        keys = [key for key in scenario.ways if key in chosen]
        return [
            key
            for key in keys
            if (device == "cpu" and key != "pinned")
            or (device == "cuda" and key != "limit" and "cuda" in way_of(key).can)
        ]

    def prepare(
        self, scenario: Scenario, key: str, finite: bool | None = None, skip: tuple[str, ...] = ()
    ) -> Run:
        """One way as a request to a fresh process."""
        way = way_of(key)
        finite = scenario.finite if finite is None else finite
        container = scenario.container or way.container
        build = {"decoder": checkpoints.decoder, "cells": checkpoints.cells}[scenario.model]
        full = build(self.work / ("quick" if self.options.quick else "full"), self.size)
        tiny = build(self.work / "quick", checkpoints.QUICK)
        job = {
            "path": str(full / container),
            "model": scenario.model,
            "dtype": scenario.dtype,
            "device": self.options.device,
            "cells": self.size.cells,
            "check_finite": finite,
            "skip": skip,
        }
        warm_up = {"path": str(tiny / container), "cells": checkpoints.QUICK.cells}
        if skip:
            warm_up["skip"] = half_of(checkpoints.QUICK)
        request = {
            "way": key,
            "job": job,
            "warm_up": warm_up,
            "small_pages": scenario.small_pages,
        }
        label = way.label + (" + check_finite" if finite else "")
        return Run(key, label, request, HUGE_ENVIRONMENT if scenario.huge else {})

    def check_here(self, runs: list[Run]) -> list[Run]:
        """Quick: in this process, once; it proves the ways and the tables, not the times.

        The limit alone gets a process of its own, so that the talk with it is proven too.
        """
        for run in runs:
            fresh = run.key in LIMITS
            check(run, lambda run=run, fresh=fresh: quick(run, fresh))
            if run.checked:
                run.results = [run.checked]
            self.say(f"  checked {run.label}: {run.error or 'equal'}")
        return runs

    def half(self) -> list[Run]:
        """Half of the model skipped, from a cold cache: bytes, not times."""
        scenario = Scenario(title="Half", ways=("load_weights", "safetensors_open", "torch_copy"))
        skip = half_of(self.size)
        runs = [self.prepare(scenario, key, skip=skip) for key in self._ways(scenario)]
        if self.options.quick:
            return self.check_here(runs)
        for run in runs:
            check(run, lambda run=run: start(run, Pool(0), cold=True, check=True))
            run.results = [run.checked] if run.checked else []
            self.say(f"  {run.label}: {run.error or 'equal'}")
        return runs

    def say(self, line: str) -> None:
        """Progress, on stderr."""
        print(line, file=sys.stderr, flush=True)


def quick(run: Run, fresh: bool) -> dict[str, object]:
    """One run, by default in this process; any failure is that way's row, not the end."""
    if fresh:
        return start(run, Pool(2 << 20), check=True)
    try:
        return {**once.here(run.request), "anonymous_peak": 0}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def way_of(key: str) -> Way:
    """The way of that name, whoever's it is."""
    return {**PEERS, **OURS, **LIMITS}[key]


def half_of(size: checkpoints.Size) -> tuple[str, ...]:
    """Prefixes of the second half of the layers and of the output embedding."""
    layers = size.decoder["num_hidden_layers"]
    return (*(f"model.layers.{n}" for n in range(layers // 2, layers)), "lm_head")


def machine(device: str) -> dict[str, object]:
    """What the numbers were measured on."""
    import torch

    names = ("torch", "transformers", "safetensors", "accelerate", "fastsafetensors")
    found: dict[str, object] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **planning.versions((*names, "runai-model-streamer", "bioinit")),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept and used again")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", help=f"of {', '.join((*SCENARIOS, *EXTRA))}")
    parser.add_argument("--ways", help="only these ways, by key")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="write every single measurement here")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    if chosen.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("skipped: torch sees no CUDA device on this machine")
            return 0
    names = chosen.only.split(",") if chosen.only else [*SCENARIOS, *EXTRA]
    unknown = set(names) - {*SCENARIOS, *EXTRA}
    if unknown:
        print(f"no such table: {sorted(unknown)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bioinit-bench-") as scratch:
        bench = Bench(chosen, chosen.work or Path(scratch))
        document: dict[str, object] = {"machine": machine(chosen.device), "tables": {}}
        pages = [tables.machine_line(document["machine"])]
        for name in names:
            bench.say(name)
            if name in EXTRA:
                if chosen.device != "cpu":
                    continue
                page, data = extra(name, bench)
            elif chosen.device in SCENARIOS[name].devices:
                runs = bench.run(SCENARIOS[name])
                page = tables.scenario(SCENARIOS[name].title, SCENARIOS[name].goal, runs)
                data = [tables.plain(run) for run in runs]
            else:
                continue
            pages.append(page)
            document["tables"][name] = data
            if chosen.json:
                chosen.json.write_text(json.dumps(document, indent=1))
        text = "\n\n".join(pages) + "\n"
        print(text)
        if chosen.markdown:
            chosen.markdown.write_text(text)
    return 0


def extra(name: str, bench: Bench) -> tuple[str, object]:
    """The tables that are no race."""
    if name == "half":
        runs = bench.half()
        return tables.half(runs), [tables.plain(run) for run in runs]
    if name == "help":
        data = planning.help_cost(max(3, bench.rounds))
        return tables.help_cost(data), data
    folder = bench.work / ("quick" if bench.options.quick else "full")
    data = planning.measure(folder, bench.size, bench.rounds)
    return tables.planning(data), data


if __name__ == "__main__":
    sys.exit(main())
