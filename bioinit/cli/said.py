"""What the command line says on the way and at the end: messages, exit codes, a bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED, TERMINATED = 130, 143
STORAGE = 5
USAGE = 2
BUG = 1
EXITS = (
    "exit codes: 0 done, 2 usage or configuration, 3 the plan has problems, 4 checkpoint unusable, "
    "5 file system, 130 interrupted, 143 terminated"
)
_LEFT = "nothing half done stands under a final name; a conversion goes on when it is run again"


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, what is half done is taken away on the way out."""


class Said(Exception):
    """An error that has been told already, or is another process's to tell."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def ended(error: BaseException, *, who: str = "", quietly: bool = False) -> int:
    """Say what ended this process, and give its exit code.

    Args:
        error: what it was.
        who: stands before the message.
        quietly: another process says it.
    """
    message, code = _explained(error)
    return failed(who + message, code, quietly=quietly)


def _explained(error: BaseException) -> tuple[str, int]:
    from bioinit.errors import BioinitError

    if isinstance(error, Terminated):
        return f"terminated: {_LEFT}", TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted: {_LEFT}", INTERRUPTED
    if isinstance(error, BioinitError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"the file system said no: {error}", STORAGE
    return (
        f"internal error, {type(error).__name__}: {error}. This is a bug of bioinit; "
        "BIOINIT_DEBUG=1 shows where. Please report it with that.",
        BUG,
    )


def failed(message: str, code: int, *, quietly: bool = False) -> int:
    """Say ``message`` and give ``code``; the traceback too, for who debugs."""
    if os.environ.get("BIOINIT_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    if not quietly:
        say(message)
    _tell_torchrun(message, after=quietly)
    return code


def _tell_torchrun(message: str, after: bool) -> None:
    """Leave the message where torchrun looks for it, so that its own report says it.

    Of several processes it takes the one that was first for the cause: those who only heard of it
    date themselves a second later.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    when = {"py_callstack": message, "timestamp": str(int(time.time()) + after)}
    try:
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": when}}, file)
    except OSError as error:
        say(f"cannot tell torchrun: {error}")


@contextmanager
def progress(
    doing: str = "loading", speaks: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """A bar by bytes on a terminal, nothing in a pipe or from a process that does not speak."""
    if not (speaks and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (doing, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(message: str) -> None:
    """A line for people, on stderr."""
    from bioinit.report import printable_lines

    # In one piece: other processes may be writing to the same place.
    print(f"bioinit: {printable_lines(message)}\n", end="", file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """The result, on stdout."""
    from bioinit.report import dumps

    print(dumps(document))
