"""The corpus: named checkpoints, each made into a folder of its own, and what has to come of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DAMAGED = "CorruptCheckpoint"
REFUSED = "RefusedCheckpoint"
UNFINISHED = "UnfinishedCheckpoint"
UNUSABLE = f"{DAMAGED}|{REFUSED}|{UNFINISHED}"
ANY = f"{UNUSABLE}|UnknownFormat|AmbiguousFormat"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """What a person would type, if it is not the folder itself, and what should come out."""

    path: str | Path = ""
    tensors: Tensors | None = None
    relative: bool = False
    """The path is typed relative to the folder in which the checkpoint lies."""
    also: tuple[Path, ...] = ()
    """Other places that it may be read from: what links of a legitimate checkpoint lead to."""


@dataclass(frozen=True)
class Case:
    """A checkpoint: ``make`` writes it into an empty folder.

    ``kind`` is ``bad``: an error of one of the types ``errors``, which names ``file`` and fits the
    pattern ``says``; ``good``: it opens, and the tensors are those that were written; ``inert``:
    it opens, and what it asks for does not happen; ``sound``: an error, or just what was written;
    ``either``: an error, or anything that can be read.
    """

    group: str
    name: str
    make: Callable[[Path], Target | Tensors | str | None]
    kind: str = "bad"
    errors: str = UNUSABLE
    file: str = ""
    says: str = ""
    context: bool = False
    """The saved config is what it is about, so it is asked for too."""

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name}"


GROUPS = (
    "safetensors",
    "sharded",
    "torch_zip",
    "torch_legacy",
    "pickles",
    "torch_dist",
    "items",
    "hf_dcp",
    "zarr",
    "nemo",
    "partitions",
    "contexts",
    "yamls",
    "paths",
    "generic",
)


class Group:
    """Collects the cases of a module; each is a function, whose name is that of the case."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cases: list[Case] = []

    def bad(self, **said: Any) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
        return self._adder(kind="bad", **said)

    def good(self, **said: Any) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
        return self._adder(kind="good", **said)

    def inert(self, **said: Any) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
        return self._adder(kind="inert", **said)

    def either(self, **said: Any) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
        return self._adder(kind="either", **said)

    def add(self, name: str, make: Callable[[Path], Any], **said: Any) -> None:
        self.cases.append(Case(self.name, name, make, **said))

    def _adder(self, **said: Any) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
        def adder(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
            self.add(make.__name__, make, **said)
            return make

        return adder


def cases(groups: Iterable[str] = GROUPS) -> list[Case]:
    """All cases of the ``groups``."""
    found: list[Case] = []
    for name in groups:
        group: Group = importlib.import_module(f"tests.hostile.cases.{name}").GROUP
        found.extend(group.cases)
    names = [case.id for case in found]
    assert len(set(names)) == len(names), "two cases have one name"
    return found


def canary(folder: Path) -> Path:
    """The file that payloads of the checkpoint in ``folder`` try to make."""
    return folder.parent / "CANARY"


def made(case: Case, sandbox: Path) -> dict[str, Any]:
    """Write ``case`` into ``sandbox``; what the driver has to know of it."""
    folder = sandbox / "ckpt"
    folder.mkdir(parents=True)
    answer = case.make(folder)
    if isinstance(answer, str):
        answer = Target(answer)
    elif answer is None:
        answer = Target()
    elif not isinstance(answer, Target):
        answer = Target(tensors=answer)
    path = answer.path if isinstance(answer.path, Path) else folder / answer.path
    typed = str(answer.path) if isinstance(answer.path, str) and answer.path else ""
    if answer.path and isinstance(answer.path, str):
        path = f"{folder}/{answer.path}" if not typed.endswith("/") else f"{folder}/{typed}"
    if answer.relative:
        path = Path(str(path)).relative_to(sandbox)
    return {
        "id": case.id,
        "path": str(path),
        "cwd": str(sandbox),
        "root": str(folder),
        "also": [str(place) for place in answer.also],
        "context": case.context,
        "tensors": None
        if answer.tensors is None
        else {name: fingerprint(tensor) for name, tensor in answer.tensors.items()},
    }


def fingerprint(tensor: torch.Tensor) -> list[str]:
    """What makes a tensor the same to the bit: dtype, shape, hash of its bytes."""
    import hashlib

    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    shape = "x".join(map(str, tensor.shape))
    return [str(tensor.dtype), shape, hashlib.sha256(data).hexdigest()]
