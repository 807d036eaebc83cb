"""How many threads read or write at once."""

from __future__ import annotations

import os


def worker_count() -> int:
    """One per processor that this process may use, and no more than storage gains from."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
