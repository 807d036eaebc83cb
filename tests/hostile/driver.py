"""Opens checkpoints while an audit hook watches. Run as a program: a plan in, lines of JSON out.

It imports no writer and makes no checkpoint. First it opens one good checkpoint of every format, so
that everything is imported that ever will be; from then on, whatever the interpreter reports that
is not on a short list is written down as a violation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import sysconfig
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TRUSTED = tuple(
    f"{os.path.realpath(place)}/"
    for place in {
        ROOT / "bioinit",
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    }
)
IMPORTABLE = ("bioinit", "torch", "numpy", "numcodecs", "yaml", "encodings")
# What readers do all the time, and what tells nothing about the checkpoint.
HARMLESS = {
    "array.__new__",
    "builtins.id",
    "cpython._PySys_ClearAuditHooks",
    "gc.get_objects",
    "object.__getattr__",
    "object.__setattr__",
    "sys._getframe",
    "sys._current_frames",
    "sys.excepthook",
    "sys.unraisablehook",
}
LISTING = ("os.listdir", "os.scandir")
LONGEST_S = 20
LONGEST_TRACED_S = 4  # whatever was allocated until then is counted
MOST_READ = 256 << 20


class TooLong(BaseException):
    """A case took longer than anybody would wait."""


class Watch:
    """The audit hook: on while a case is opened, and knows which files the case is made of."""

    def __init__(self) -> None:
        self.on = False
        self.roots: tuple[str, ...] = ()
        self.listable: tuple[str, ...] = ()
        self.violations: list[str] = []

    def begin(self, roots: list[str], sandbox: str) -> None:
        self.roots = tuple(os.path.realpath(place) for place in roots)
        self.listable = (*self.roots, os.path.realpath(sandbox))
        self.violations = []
        self.on = True

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or event in HARMLESS:
            return
        self.on = False  # what is looked at here is no doing of the reader
        try:
            why = self.judge(event, args)
            if why is not None:
                self.violations.append(f"{event}: {why:.300}")
        finally:
            self.on = True

    def judge(self, event: str, args: tuple[Any, ...]) -> str | None:
        """Why this must not happen while a checkpoint is opened; None if it may."""
        if event == "open":
            return self.judge_open(args[0], args[1], args[2])
        if event in LISTING:
            place = os.path.realpath(os.fsdecode(args[0] or "."))
            return None if place in self.listable or inside(place, self.roots) else place
        if event == "import":
            return None if args[0].split(".")[0] in IMPORTABLE else str(args[0])
        if event == "exec":
            file = os.path.realpath(getattr(args[0], "co_filename", "?"))
            return None if file.startswith(TRUSTED) else f"code of {file}"
        if event == "compile":
            # `ast.literal_eval` parses; to run what comes of it would be an `exec`.
            return None if args[1] == "<unknown>" else f"{args[0]!r}"
        return repr(args)

    def judge_open(self, path: Any, mode: Any, flags: Any) -> str | None:
        if isinstance(path, int):
            return f"descriptor {path}"
        text = os.fsdecode(path)
        wanted = flags if isinstance(flags, int) else 0
        if wanted & WRITING or (isinstance(mode, str) and set(mode) & set("wax+")):
            return f"for writing: {text}"
        real = os.path.realpath(text)
        if inside(real, self.roots) or (real.startswith(TRUSTED) and is_code(real)):
            return None
        return f"outside of the checkpoint: {text}"


def is_code(path: str) -> bool:
    return path.endswith((".py", ".pyc", ".so"))


def inside(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)


WATCH = Watch()


def said(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"type": type(error).__name__, "kinds": kinds, "message": str(error)[:4000]}


def fingerprint(tensor: Any) -> list[str]:
    import torch

    flat = tensor.contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    shape = "x".join(map(str, tensor.shape))
    return [str(tensor.dtype), shape, hashlib.sha256(data).hexdigest()]


def look(path: str, context: bool) -> dict[str, Any]:
    """Open the checkpoint at ``path``, read every tensor and, if asked, its saved config."""
    from bioinit.contexts import load_context, open_checkpoint

    found: dict[str, Any] = {"open": None, "read": None, "context": None}
    tensors: dict[str, Any] = {}
    try:
        checkpoint = open_checkpoint(path)
    except Exception as error:
        found["open"] = said(error)
    else:
        try:
            room = MOST_READ
            for name in checkpoint.tensors:
                tensor = checkpoint.read(name)
                room -= tensor.numel() * tensor.element_size()
                tensors[name] = tensor
                if room < 0:
                    raise RuntimeError(f"reading takes more than {MOST_READ} bytes")
            found["metadata"] = sorted(checkpoint.metadata)
        except Exception as error:
            found["read"] = said(error)
        checkpoint.close()
    if context:
        try:
            found["tree"] = load_context(path)
        except Exception as error:
            found["context"] = said(error)
    found["tensors"] = tensors
    return found


def on_alarm(number: int, frame: Any) -> None:
    raise TooLong(f"longer than {LONGEST_S} s")


def reset_peak() -> None:
    """Let the kernel forget how large the process has been; where it has no such file, it grows."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss() -> int:
    """The largest size of the process; 0 where the kernel does not say."""
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case: watched and timed first, and once more with memory traced."""
    os.chdir(case["cwd"])
    reset_peak()
    before = peak_rss()
    WATCH.begin([case["root"], *case["also"]], case["cwd"])
    started = time.process_time()
    signal.alarm(LONGEST_S)
    try:
        found = look(case["path"], case["context"])
    except TooLong as error:
        found = {"open": said(error), "read": None, "context": None, "tensors": {}}
    finally:
        signal.alarm(0)
        WATCH.on = False
    found["seconds"] = time.process_time() - started
    found["rss"] = peak_rss() - before
    found["violations"] = list(WATCH.violations)
    found["tensors"] = {name: fingerprint(tensor) for name, tensor in found["tensors"].items()}
    found["tree"] = repr(found.get("tree"))[:20_000]
    if found["seconds"] < 5:
        tracemalloc.start()
        signal.alarm(LONGEST_TRACED_S)
        try:
            look(case["path"], case["context"])
        except TooLong:
            pass
        finally:
            signal.alarm(0)
            found["peak"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    return {"id": case["id"], **found}


def violate(wanted: list[str]) -> dict[str, list[str]]:
    """Do on purpose what the hook must see: the proof that it can fail."""
    import ctypes
    import pickle
    import socket
    import subprocess
    import tempfile

    Path("there").touch()
    Path("link").symlink_to("/etc/passwd")

    def fork() -> None:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)

    def connect() -> None:
        with socket.socket() as end:
            end.connect_ex(("127.0.0.1", 9))

    ways: dict[str, Callable[[], object]] = {
        "os.system": lambda: pickle.loads(b"cposix\nsystem\n(S'true'\ntR."),
        "eval": lambda: eval("1 + 1"),
        "open outside": lambda: open("/etc/passwd").close(),
        "write": lambda: open("written", "w").close(),
        "os.open for writing": lambda: os.close(os.open("written", os.O_RDWR | os.O_CREAT)),
        "import": lambda: __import__("wave"),
        "socket": lambda: socket.socket().close(),
        "connect": connect,
        "remove": lambda: os.remove("there"),
        "mkdir": lambda: os.mkdir("made"),
        "rename": lambda: os.rename("written", "renamed"),
        "symlink": lambda: os.symlink("x", "symlink"),
        "chmod": lambda: os.chmod("renamed", 0o600),
        "truncate": lambda: os.truncate("renamed", 0),
        "list outside": lambda: os.listdir("/etc"),
        "subprocess": lambda: subprocess.run(["true"], check=False),
        "fork": fork,
        "dlopen": lambda: ctypes.CDLL(None),
        "find_class": lambda: pickle.loads(b"cbuiltins\nlist\n."),
        "temporary file": lambda: tempfile.mkdtemp(dir="."),
        "read through a link": lambda: open("link").close(),
    }
    found = {}
    for what in wanted:
        WATCH.begin([os.getcwd()], os.getcwd())
        ways[what]()
        WATCH.on = False
        found[what] = list(WATCH.violations)
    return found


def main(manifest: str, results: str) -> None:
    sys.path.insert(0, str(ROOT))
    plan = json.loads(Path(manifest).read_text())
    import resource

    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, on_alarm)
    if "violate" in plan:
        os.chdir(plan["cwd"])
        sys.addaudithook(WATCH)
        Path(results).write_text(json.dumps(violate(list(plan["violate"]))))
        return
    for case in plan["warm"]:
        os.chdir(case["cwd"])
        look(case["path"], True)
    warnings.simplefilter("error")  # what a checkpoint says must not reach a person's screen raw
    limit = (64 << 30, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, limit)  # an exabyte fails at once, on any machine
    sys.addaudithook(WATCH)
    with open(results, "w") as out:
        for case in plan["cases"]:
            out.write(json.dumps({"id": case["id"], "begun": True}) + "\n")
            out.flush()
            out.write(json.dumps(run(case)) + "\n")
            out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
