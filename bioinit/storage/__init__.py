"""Where bytes lie: files, windows of files, and folders of them.

Nothing here knows a format. Every error of the operating system leaves this room as a
:class:`~bioinit.errors.StorageError` that says what was being done and what to do now.
"""

from __future__ import annotations

from bioinit.storage.file import File, disk_error
from bioinit.storage.folder import Folder

__all__ = ["File", "Folder", "disk_error"]
