"""Planning from headers alone, and what ``bioinit --help`` costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

GOALS = {"dense": 0.4, "moe": 3.0}
MODELING = {
    "dense": "transformers.models.llama.modeling_llama",
    "moe": "transformers.models.qwen3_moe.modeling_qwen3_moe",
}


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; a package that is not there says so."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def measure(work: Path, size: object, rounds: int) -> dict[str, dict[str, object]]:
    """Plan each header-only checkpoint in fresh processes: as the first plan, and as the second."""
    import checkpoints

    folders = {
        "dense": checkpoints.dense_headers(work, size),
        "moe": checkpoints.moe_headers(work, size),
    }
    tiny = {
        "dense": checkpoints.dense_headers(work.parent / "quick", checkpoints.QUICK),
        "moe": checkpoints.moe_headers(work.parent / "quick", checkpoints.QUICK),
    }
    found: dict[str, dict[str, object]] = {}
    for name, folder in folders.items():
        found[name] = {"goal": GOALS[name], "first": [], "warmed": []}
        for _ in range(rounds):
            for mode, warm_up in (("first", ""), ("warmed", str(tiny[name]))):
                answer = _fresh(name, str(folder), warm_up)
                if "error" in answer:
                    found[name]["error"] = answer["error"]
                    break
                found[name][mode].append(answer.pop("seconds"))
                found[name].update(answer)
    return found


def _fresh(name: str, folder: str, warm_up: str) -> dict[str, object]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, name, folder, warm_up],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1].strip() if lines else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def plan_once(name: str, folder: str, warm_up: str) -> dict[str, object]:
    """In the fresh process: import, then the clock."""
    importlib.import_module(MODELING[name])
    import bioinit

    for public in bioinit.__all__:
        getattr(bioinit, public)  # its rooms are imported when first asked for

    def plan(path: str) -> object:
        return bioinit.plan(bioinit.compose("auto/as_saved", [f"model.initial_ckpt_path={path}"]))

    if warm_up:
        plan(warm_up)
    begin = time.perf_counter()
    made = plan(folder)
    seconds = time.perf_counter() - begin
    if made.problems:
        raise SystemExit(f"{len(made.problems)} problems, first: {made.problems[0]}")
    index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())
    return {
        "seconds": seconds,
        "targets": len(made.tensors),
        "stored": len(index["weight_map"]),
        "shards": len(set(index["weight_map"].values())),
        "bytes_to_read": made.bytes_to_read,
    }


def help_cost(rounds: int) -> dict[str, object]:
    """CPU seconds of ``bioinit --help`` and of ``python -c pass``, alternating."""
    commands = {
        "pass": [sys.executable, "-c", "pass"],
        "help": [sys.executable, "-m", "bioinit", "--help"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            before = os.times()
            done = subprocess.run(command, capture_output=True, text=True)
            after = os.times()
            if done.returncode != 0:
                return {"error": f"{' '.join(command)}: exit {done.returncode}"}
            used = after.children_user + after.children_system
            found[name].append(used - before.children_user - before.children_system)
    pairs = zip(found["help"], found["pass"], strict=True)
    return {**found, "more": statistics.median(a - b for a, b in pairs), "goal": 0.1}


if __name__ == "__main__":
    print(json.dumps(plan_once(*sys.argv[1:4])))
