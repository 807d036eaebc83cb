"""Objects on disk: ``io.json`` as NeMo 2 wrote it, and what may be built from it."""

from __future__ import annotations

from bioinit.compat._saved.artifact import (
    Artifact,
    DirArtifact,
    DirOrStringArtifact,
    FileArtifact,
    PathArtifact,
)
from bioinit.compat._saved.names import dotted, is_known, register, write_as
from bioinit.compat._saved.reading import (
    MissingContext,
    UnknownClass,
    drop_unexpected_params,
    load,
    load_context,
)
from bioinit.compat._saved.writing import IO_FILE, MissingArtifact, Unwritable, defaults, dump

__all__ = [
    "IO_FILE",
    "Artifact",
    "DirArtifact",
    "DirOrStringArtifact",
    "FileArtifact",
    "MissingArtifact",
    "MissingContext",
    "PathArtifact",
    "UnknownClass",
    "Unwritable",
    "defaults",
    "dotted",
    "drop_unexpected_params",
    "dump",
    "is_known",
    "load",
    "load_context",
    "register",
    "write_as",
]
