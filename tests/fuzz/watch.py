"""Runs a reader over hostile bytes and says what it did that it must not do.

It may succeed, or raise bioinit's errors for bad checkpoints. Anything else is a defect: another
exception, more time or memory than the input is worth, a file opened that is not the checkpoint's,
anything executed or written, a tensor whose pieces do not lie in its files or do not tile it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bioinit import contexts, describe, families
from bioinit.contexts import Checkpoint
from bioinit.errors import CheckpointError, StorageError
from bioinit.layout import numel

CPU_SECONDS = 2.0
HANGS_AFTER = 15
MEMORY_MARGIN = 64 << 20
MEMORY_FACTOR = 8
LARGEST_READ = 1 << 16
LONGEST_MESSAGE = 12_000
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FORBIDDEN = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "exec", "import", "code.", "pty.",
    "urllib.", "ftplib.", "http.", "webbrowser.", "tempfile.", "marshal.", "pickle.",
)  # fmt: skip
_HARMLESS = ("os.listdir", "os.scandir")


class Defect(AssertionError):
    """What a reader did that it must not do."""


class Hangs(BaseException):
    """Raised out of a reader that does not come back."""


class _Guard:
    """Looks at what Python does while it is armed; an audit hook cannot be taken off again."""

    def __init__(self) -> None:
        self.home: str | None = None
        self.seen: list[str] = []
        self.is_installed = False

    def install(self) -> None:
        if not self.is_installed:
            sys.addaudithook(self._look)
            self.is_installed = True

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event == "open":
            path, _, flags = args
            inside = isinstance(path, int) or os.fsdecode(path).startswith(self.home)
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not inside or writes:
                self.seen.append(f"opened {path!r}, flags {flags}")
        elif event.startswith(_FORBIDDEN) and event not in _HARMLESS:
            if event == "import" and args[0] in sys.modules:
                return
            self.seen.append(f"{event} {args!r:.300}")


_GUARD = _Guard()


def _memory() -> tuple[int, int]:
    """Resident bytes now, and the most since the last call of :func:`_forget_peak`."""
    text = _STATUS.read_text()
    return tuple(int(text.split(f"{key}:")[1].split()[0]) << 10 for key in ("VmRSS", "VmHWM"))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


@contextlib.contextmanager
def watched(home: Path, size: int, names: Iterable[str] = ()) -> Iterator[None]:
    """Let bad input be called bad, and raise :class:`Defect` for everything else.

    Args:
        home: the folder in which files may be opened.
        size: how many bytes the input has.
        names: its files, of which an error has to name one, or the folder.
    """
    _GUARD.install()
    measures = sys.platform == "linux" and os.access(_CLEAR, os.W_OK)
    if measures:
        _forget_peak()
    before = _memory()[0] if measures else 0
    _GUARD.home, _GUARD.seen = str(home), []
    began = time.process_time()
    # Only Python's own code can be interrupted so; what hangs in C is the business of the runner,
    # which has the other timer.
    old = signal.signal(signal.SIGVTALRM, _hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANGS_AFTER)
    try:
        yield
    except (CheckpointError, StorageError) as error:
        _GUARD.home = None
        _require_useful(str(error), [str(home), *(name.rpartition("/")[2] for name in names)])
    except Hangs as error:
        raise Defect(f"hangs for {HANGS_AFTER} s{_where(error)}") from error
    except Defect:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Defect(f"{type(error).__name__}: {error!s:.300}{_where(error)}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
        _GUARD.home = None
    took = time.process_time() - began
    if _GUARD.seen:
        raise Defect("; ".join(_GUARD.seen[:3]))
    if took > CPU_SECONDS:
        raise Defect(f"took {took:.1f} s of CPU for {size} bytes")
    if measures and _memory()[1] - before > MEMORY_MARGIN + MEMORY_FACTOR * size:
        raise Defect(f"took {(_memory()[1] - before) >> 20} MiB for {size} bytes")


def _hang(number: int, frame: Any) -> None:
    raise Hangs


def _where(error: BaseException) -> str:
    """The innermost place in bioinit, by which findings are told apart."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/bioinit/" in f.filename]
    if not frames:
        return ""
    name = frames[-1].filename.rpartition("/bioinit/")[2]
    return f" at bioinit/{name}:{frames[-1].lineno}"


def _require_useful(message: str, names: Iterable[str]) -> None:
    if not any(name in message for name in names):
        raise Defect(f"a message that names no file: {message:.100}")
    if len(message) > LONGEST_MESSAGE:
        raise Defect(f"a message of {len(message)} characters: {message[:100]!r}")


def lay_out(case: dict[str, bytes], folder: Path) -> None:
    """Write a case below ``folder``, which is emptied before. What no disk can name is left out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in case.items():
        with contextlib.suppress(OSError, UnicodeEncodeError):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def open_all(case: dict[str, bytes], folder: Path) -> None:
    """Open a case as a directory, or as a file where it is one, and hold it to its promises."""
    lay_out(case, folder)
    path = folder / next(iter(case)) if len(case) == 1 else folder
    if not path.exists():
        path = folder
    size = sum(map(len, case.values()))
    with watched(folder.parent, size, case), families.open_checkpoint(path) as checkpoint:
        _require_sound(checkpoint)
        document = describe.describe(checkpoint, with_tensors=True)
        for line in describe.lines(document):
            line.encode("utf-8", "backslashreplace")
        _require_plain(document)
        for name, tensor in checkpoint.tensors.items():
            if numel(tensor.shape) * tensor.dtype.itemsize <= LARGEST_READ:
                checkpoint.read(name)
    with watched(folder.parent, size, case):
        _require_plain(contexts.load_context(path))


def _require_plain(value: Any) -> None:
    try:
        json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise Defect(f"not plain data: {error}") from error


def _require_sound(checkpoint: Checkpoint) -> None:
    """Raise unless every piece lies in its file and the pieces of each tensor tile it."""
    for name, (shape, dtype, pieces, _) in checkpoint.tensors.items():
        for file, offset, box in pieces:
            if not 0 <= file < len(checkpoint.files):
                raise Defect(f"{name!r:.80} lies in file {file} of {len(checkpoint.files)}")
            lists = (box.offsets, box.sizes, box.strides)
            if any(len(numbers) != len(shape) for numbers in lists):
                raise Defect(f"{name!r:.80} of shape {shape} has the box {box}")
            spans = zip(box.offsets, box.sizes, shape, strict=True)
            if not all(0 <= o and 0 <= n and o + n <= s for o, n, s in spans):
                raise Defect(f"{name!r:.80} of shape {shape} has the box {box}")
            if 0 in box.sizes:
                continue
            steps = zip(box.sizes, box.strides, strict=True)
            reach = box.start + 1 + sum((n - 1) * step for n, step in steps)
            end = offset + reach * dtype.itemsize
            if offset < 0 or box.start < 0 or min(box.strides, default=0) < 0:
                raise Defect(f"{name!r:.80} begins at {offset} with the box {box}")
            if end > checkpoint.files[file].size:
                raise Defect(f"{name!r:.80} ends at {end} of {checkpoint.files[file]!r}")
        _require_tiled(name, shape, [box for _, _, box in pieces if 0 not in box.sizes])


def _require_tiled(name: str, shape: tuple[int, ...], boxes: list[Any]) -> None:
    held = sum(numel(box.sizes) for box in boxes)
    if held != numel(shape):
        raise Defect(f"the pieces of {name!r:.80} hold {held} elements of {shape}")
    for number, one in enumerate(boxes[:50]):
        for other in boxes[:number]:
            spans = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in spans):
                raise Defect(f"two pieces of {name!r:.80} overlap: {one} and {other}")


def open_valid(case: dict[str, bytes], folder: Path) -> None:
    """Open a case that is as it should be, and read it; its errors are let through."""
    lay_out(case, folder)
    path = folder / next(iter(case)) if len(case) == 1 else folder
    with families.open_checkpoint(path) as checkpoint:
        _require_sound(checkpoint)
        describe.describe(checkpoint)
        for name in checkpoint.tensors:
            checkpoint.read(name)
