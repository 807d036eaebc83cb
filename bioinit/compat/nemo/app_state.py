"""Where a run logs to: what NeMo's logger tells the others of a process.

Stands in for the two attributes of ``nemo.utils.app_state.AppState`` that resuming asks for. There
is one of it in a process, however often it is constructed. Where NeMo itself has been imported and
its logger was set up, ``AutoResume`` hears of that too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar, Self


class AppState:
    """The one state of this process.

    Attributes:
        log_dir: the folder of this run; its ``checkpoints`` is where ``AutoResume`` looks.
        restore: whether this run goes on with an earlier one; ``AutoResume`` sets it.
    """

    _only: ClassVar[AppState | None] = None
    log_dir: str | Path | None
    restore: bool

    def __new__(cls) -> Self:
        if cls._only is None:
            made = super().__new__(cls)
            made.log_dir = None
            made.restore = False
            cls._only = made
        only: Self = cls._only  # type: ignore[assignment]
        return only


def log_dir() -> Path | None:
    """The folder of this run, as far as anybody has said."""
    said = AppState().log_dir
    if said is None:
        theirs = sys.modules.get("nemo.utils.app_state")
        said = None if theirs is None else theirs.AppState().log_dir
    return None if said is None else Path(said)
