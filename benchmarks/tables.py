"""The measurements as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ours import LIMITS, OURS
from rounds import Run, median, ratios, timed


def machine_line(machine: dict[str, object]) -> str:
    """One paragraph: on what this was measured."""
    parts = [f"{name} {value}" for name, value in machine.items() if name != "memory"]
    return f"{', '.join(parts)}, memory {int(machine['memory']) / 2**30:.0f} GiB."


def scenario(title: str, goal: float | None, runs: Sequence[Run]) -> str:
    """One race: a row for each way, and the ratio of ours to the best of the others."""
    lines = [
        f"### {title}",
        "",
        "| way | seconds | GB/s | load_weights / this, per round | anonymous peak / parameters |"
        " resident peak over parameters, MiB | bytes read by calls / parameters | page faults |"
        " device peak / parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    alive = list(timed(runs))
    mine = next((run for run in alive if run.key == "load_weights"), None)
    for run in sorted(alive, key=lambda run: median(run, "seconds")):
        lines.append(_row(run, mine))
    lines += [f"| {run.label} | failed: {run.error} | | | | | | | |" for run in runs if run.error]
    peers = [run for run in alive if run.key not in OURS and run.key not in LIMITS]
    if peers and alive[0].results:
        best = min(peers, key=lambda run: median(run, "seconds"))
        rounds = len(best.results)
        wanted = f"; to reach: at most {goal}" if goal else ""
        for run in (run for run in alive if run.key in OURS):
            text = f"{run.label} / best peer ({best.label}): {_spread(ratios(run, best))}"
            lines += ["", f"{text} over {rounds} paired rounds{wanted}."]
    for limit in (run for run in alive if run.key in LIMITS):
        for run in (run for run in alive if run.key in OURS):
            share = [1 / ratio for ratio in ratios(run, limit)]
            lines += ["", f"{run.label} reaches {_spread(share)} of the {limit.label}."]
    return "\n".join(lines)


def _row(run: Run, mine: Run | None) -> str:
    size = float(run.results[0]["parameter_bytes"])
    seconds = median(run, "seconds")
    ratio = _spread(ratios(mine, run)) if mine and mine is not run else ""
    anonymous = f"{run.checked['anonymous_peak'] / size:.2f}" if run.checked else ""
    cells = (
        run.label,
        f"{seconds:.3f}",
        f"{size / seconds / 1e9:.2f}",
        ratio,
        anonymous,
        f"{(median(run, 'resident_peak') - size) / 2**20:.0f}",
        f"{median(run, 'bytes_by_calls') / size:.3f}",
        f"{median(run, 'minor_faults') + median(run, 'major_faults'):,.0f}",
        f"{median(run, 'device_peak') / size:.2f}" if median(run, "device_peak") else "",
    )
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def half(runs: Sequence[Run]) -> str:
    """Bytes with half of the model skipped, files cold."""
    lines = [
        "### Half of the model skipped, cold cache",
        "",
        "| way | needed, MB | read by calls, MB | read from disk, MB |",
        "|---|---|---|---|",
    ]
    for run in runs:
        if run.error:
            lines.append(f"| {run.label} | failed: {run.error} | | |")
            continue
        names = ("needed_bytes", "bytes_by_calls", "bytes_from_disk")
        values = " | ".join(f"{run.results[0][name] / 1e6:,.1f}" for name in names)
        lines.append(f"| {run.label} | {values} |")
    return "\n".join(lines)


def planning(data: dict[str, dict[str, object]]) -> str:
    """Seconds to plan from headers."""
    lines = [
        "### Planning from headers, model built on meta, after imports",
        "",
        "| checkpoint | stored tensors | shards | GB | first plan, s | after another plan, s |"
        " to reach |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in data.items():
        if "error" in found:
            lines.append(f"| {name} | failed: {found['error']} | | | | | |")
            continue
        cells = (
            name,
            f"{found['stored']:,}",
            found["shards"],
            f"{found['bytes_to_read'] / 1e9:,.0f}",
            f"{statistics.median(found['first']):.3f}",
            f"{statistics.median(found['warmed']):.3f}",
            found["goal"],
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def help_cost(data: dict[str, object]) -> str:
    """What ``--help`` costs over an empty interpreter."""
    title = "### `bioinit --help`\n\n"
    if "error" in data:
        return f"{title}failed: {data['error']}"
    return (
        f"{title}{statistics.median(data['help']):.3f} s of CPU, `python -c pass`"
        f" {statistics.median(data['pass']):.3f} s: {data['more']:.3f} s more"
        f" (median of {len(data['help'])} pairs; to reach: {data['goal']})."
    )


def plain(run: Run) -> dict[str, object]:
    """A run as JSON."""
    return {
        "way": run.key,
        "label": run.label,
        "error": run.error,
        "rounds": run.results,
        "checked": run.checked,
    }
