"""Loss curves for a terminal, in plain text, and the same curves as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

MARKS = "o+x*"
Curves = Mapping[str, Sequence[tuple[int, float]]]


def text_plot(curves: Curves, width: int = 72, height: int = 16) -> str:
    """Draw each curve, a list of (step, loss), with its own mark; the axes carry the extremes."""
    steps = [step for curve in curves.values() for step, _ in curve]
    losses = [loss for curve in curves.values() for _, loss in curve]
    low, high, last = min(losses), max(losses), max(steps)
    grid = [[" "] * width for _ in range(height)]
    for mark, curve in zip(MARKS, curves.values(), strict=False):
        for step, loss in curve:
            column = round(step / max(last, 1) * (width - 1))
            row = round((high - loss) / max(high - low, 1e-9) * (height - 1))
            grid[row][column] = mark
    lines = []
    for row, cells in enumerate(grid):
        value = high - (high - low) * row / (height - 1)
        label = f"{value:6.3f}" if row % 5 == 0 else " " * 6
        lines.append(f"{label} |{''.join(cells)}".rstrip())
    lines.append(" " * 7 + "+" + "-" * width)
    lines.append(" " * 8 + "0".ljust(width - len(str(last))) + str(last) + " steps")
    lines += [f"        {mark}  {name}" for mark, name in zip(MARKS, curves, strict=False)]
    return "\n".join(lines)


def png_plot(curves: Curves, path: Path, title: str) -> None:
    """Write the same curves to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    for name, curve in curves.items():
        axes.plot([step for step, _ in curve], [loss for _, loss in curve], label=name)
    axes.set(xlabel="step", ylabel="held-out loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
