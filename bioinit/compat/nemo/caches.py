"""Where NeMo keeps what it made of other people's checkpoints.

Stands in for the constants of ``nemo.lightning.base``: ``NEMO_CACHE_HOME`` (of ``$NEMO_HOME``,
``~/.cache/nemo`` by default), ``NEMO_MODELS_CACHE`` and ``NEMO_DATASETS_CACHE`` (of the environment
variable of that name, or below the former). There they are read once, when the module is imported;
here whenever they are asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

_BELOW = {"NEMO_MODELS_CACHE": "models", "NEMO_DATASETS_CACHE": "datasets"}


def cache_home() -> Path:
    """``$NEMO_HOME``, or ``~/.cache/nemo``."""
    return Path(os.environ.get("NEMO_HOME") or Path.home() / ".cache" / "nemo")


def models_cache() -> Path:
    """``$NEMO_MODELS_CACHE``, or ``models`` in :func:`cache_home`."""
    return _below("NEMO_MODELS_CACHE")


def _below(variable: str) -> Path:
    return Path(os.environ.get(variable) or cache_home() / _BELOW[variable])


def __getattr__(name: str) -> Path:
    if name == "NEMO_CACHE_HOME":
        return cache_home()
    if name in _BELOW:
        return _below(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
