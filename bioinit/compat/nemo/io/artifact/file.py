"""Stands in for ``nemo.lightning.io.artifact.file``."""

from __future__ import annotations

from bioinit.compat._saved import DirArtifact, DirOrStringArtifact, FileArtifact, PathArtifact

__all__ = ["DirArtifact", "DirOrStringArtifact", "FileArtifact", "PathArtifact"]
