"""Stands in for ``nemo.lightning.io.capture``: objects that can be made again."""

from __future__ import annotations

from bioinit.compat._capture import IOProtocol, ReInitProtocol, reinit

__all__ = ["IOProtocol", "ReInitProtocol", "reinit"]
