"""Stands in for ``nemo.lightning.io.artifact``: files that are saved along with an object."""

from __future__ import annotations

from bioinit.compat._saved import (
    Artifact,
    DirArtifact,
    DirOrStringArtifact,
    FileArtifact,
    PathArtifact,
)

__all__ = ["Artifact", "DirArtifact", "DirOrStringArtifact", "FileArtifact", "PathArtifact"]
