"""Where bytes lie: files, windows of files, folders of them; and folders written in one go.

Nothing here knows a format. Every error of the operating system leaves this room as a
:class:`~bioinit.errors.StorageError` that says what was being done and what to do now.
"""

from __future__ import annotations

from bioinit.storage.file import File, disk_error
from bioinit.storage.folder import Folder
from bioinit.storage.journal import Journal
from bioinit.storage.links import outside
from bioinit.storage.made import Made, filled, in_memory
from bioinit.storage.workers import run_workers, worker_count
from bioinit.storage.write import MADE_OF, Words, atomic_folder, require_free, resumable_folder

__all__ = [
    "MADE_OF",
    "File",
    "Folder",
    "Journal",
    "Made",
    "Words",
    "atomic_folder",
    "disk_error",
    "filled",
    "in_memory",
    "outside",
    "require_free",
    "resumable_folder",
    "run_workers",
    "worker_count",
]
