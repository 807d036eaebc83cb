"""An error of one rank as plain data, and as the error that the other ranks raise for it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from bioinit.errors import BioinitError, PlanError, Problem

OWN, INTERRUPT, ECHO = 0, 1, 2
"""How much an error says, best first: of its own; somebody stopped the rank; or only that the
connection to another rank broke, which is mostly the echo of what happened there."""

NOBODY = -1
"""The rank of a failure that is not one rank's."""

_MOST_PROBLEMS = 64
_LONGEST = 20_000
_GROUPS_SAY = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class Failure(NamedTuple):
    """What ended a rank. ``gone`` are ranks that cannot hear of it any more."""

    rank: int
    kind: str
    message: str
    exit_code: int = 1
    weight: int = OWN
    problems: tuple[tuple[str, str, str, str], ...] = ()
    trace: str = ""
    gone: tuple[int, ...] = ()

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        problems: tuple[tuple[str, str, str, str], ...] = ()
        trace = ""
        exit_code = 1
        if isinstance(error, BioinitError):
            exit_code = error.exit_code
        else:
            trace = "".join(traceback.format_exception(error))[-_LONGEST:]
        if isinstance(error, PlanError):
            some = error.problems[:_MOST_PROBLEMS]
            problems = tuple((p.kind, p.key, p.message, p.cure) for p in some)
        message = str(error)[:_LONGEST]
        return cls(rank, type(error).__name__, message, exit_code, _weight(error), problems, trace)

    @classmethod
    def from_json(cls, text: bytes) -> Failure:
        held = json.loads(text)
        held["problems"] = tuple(tuple(each) for each in held["problems"])
        return cls(**held | {"gone": tuple(held["gone"])})

    def to_json(self) -> bytes:
        return json.dumps(self._asdict()).encode()

    def error(self) -> BioinitError:
        """The error that a rank raises for another one: of the same class, with its rank on top."""
        known = {cls.__name__: cls for cls in _subclasses(BioinitError)}
        kind = known.get(self.kind)
        said = self.message or "no message"
        if kind is None:
            said = f"{self.kind}: {said}"
        if self.rank != NOBODY:
            said = f"rank {self.rank}: {said}"
        error: BioinitError
        if kind is not None and issubclass(kind, PlanError):
            error = kind(said, [Problem(*each) for each in self.problems])
        elif kind is not None and kind.__init__ is BioinitError.__init__:
            error = kind(said)
        else:
            error = BioinitError(said)
        error.exit_code = self.exit_code
        if self.trace:
            error.add_note(f"On rank {self.rank}:\n{self.trace}")
        return error


def _weight(error: BaseException) -> int:
    if isinstance(error, BioinitError):
        return OWN
    if not isinstance(error, Exception):
        return INTERRUPT
    # The classes of torch.distributed by name: it may not be part of this torch.
    if any(cls.__name__ == "DistError" for cls in type(error).__mro__):
        return ECHO
    is_echo = type(error) is RuntimeError and any(said in str(error) for said in _GROUPS_SAY)
    return ECHO if is_echo else OWN


def _subclasses(cls: type[BioinitError]) -> Iterator[type[BioinitError]]:
    yield cls
    for each in cls.__subclasses__():
        yield from _subclasses(each)
