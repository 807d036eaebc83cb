"""Every deliberate error of bioinit, and the evidence some of them carry.

    BioinitError
      ConfigError          exit 2   a recipe, an override or a config is wrong; an extra is missing
      MappingError         exit 2   a table of names cannot mean what it says
      PlanError            exit 3   the plan, or what loading found, has problems
      CheckpointError      exit 4   the checkpoint cannot be used
        CorruptCheckpoint            its bytes contradict themselves
        RefusedCheckpoint            it would need code, or a tool, that bioinit will not run
        UnknownFormat                no reader recognizes it
        AmbiguousFormat              more than one reader, or more than one naming, fits
        UnfinishedCheckpoint         its writer was stopped half-way
      StorageError         exit 5   the file system: missing, existing, full, forbidden

A message says what failed with its values, what was expected, and what to do now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class BioinitError(Exception):
    """The root of the tree. ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class ConfigError(BioinitError):
    """A recipe, an override, a config or the installation is not usable as it is."""

    exit_code = 2


class MappingError(BioinitError):
    """A mapping between names or layouts contradicts itself."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps a plan from being carried out, with its cure.

    ``kind`` is a stable word (``unclaimed``, ``mismatch``, ``conflict``, ``prefix``, ``unequal``,
    ``unused``, ``nonfinite``, ``field``, ...), ``key`` the tensor, prefix or field it is about.
    """

    kind: str
    key: str
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".strip()


class PlanError(BioinitError):
    """The plan has problems; ``problems`` holds all of them, the message the first few."""

    exit_code = 3

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class CheckpointError(BioinitError):
    """The checkpoint cannot be read as it lies there."""

    exit_code = 4


class CorruptCheckpoint(CheckpointError):
    """The bytes of the checkpoint contradict themselves."""


class RefusedCheckpoint(CheckpointError):
    """Reading it would run code it brought along, or needs what bioinit does not do."""


class UnknownFormat(CheckpointError):
    """No reader recognizes what lies at the path."""


class AmbiguousFormat(CheckpointError):
    """More than one reader, or more than one way to spell its names, fits equally well."""


class UnfinishedCheckpoint(CheckpointError):
    """The program that wrote it was stopped before it was done."""


class StorageError(BioinitError):
    """The file system said no: missing, existing, full or forbidden."""

    exit_code = 5
