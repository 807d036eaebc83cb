"""Work in a copy of this process: cheap, since everything is imported already."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def started(work: Callable[[], object], said: Path | None = None) -> int:
    """The process that does ``work``; what it raises or returns is written to ``said``."""
    with warnings.catch_warnings():  # Python 3.12 fears for locks of threads that end with us
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code, text = 1, ""
    try:
        text, code = str(work()), 0
    except BaseException:
        text = traceback.format_exc()
    finally:
        sys.setprofile(None)
        if said is not None:
            said.write_text(text)
        elif code:
            os.write(2, text.encode())
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code, once it has one; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_after(calls: int, work: Callable[[], object]) -> Callable[[], object]:
    """``work``, killed where it makes the call of that number into anything that is no Python."""

    def until() -> object:
        left = calls

        def count(frame: object, event: str, what: object) -> None:
            nonlocal left
            if event == "c_call":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        return work()

    return until


def calls_of(work: Callable[[], object]) -> int:
    """How many such calls ``work`` makes, in a process of its own."""
    read, write = os.pipe()

    def counted() -> None:
        made = 0

        def count(frame: object, event: str, what: object) -> None:
            nonlocal made
            made += event == "c_call"

        sys.setprofile(count)
        work()
        sys.setprofile(None)
        os.write(write, str(made).encode())

    pid = started(counted)
    os.close(write)
    text = os.read(read, 100)
    os.close(read)
    assert ended(pid) == 0
    return int(text)
