"""What people wrote for NeMo and BioNeMo, as text of ours in which each line has its reason.

``settings`` takes NeMo 1's checkpoint settings to NeMo 2 and to keys of ours, ``context`` makes a
recipe of a checkpoint's saved config, ``recipe`` one of a run file of BioNeMo. All three read plain
data: nothing that a file names is imported, made or called, and no weight is read.
"""

from __future__ import annotations

from bioinit.migrate.context import migrate_context
from bioinit.migrate.recipe import migrate_recipe
from bioinit.migrate.settings import Migrated, migrate_settings

__all__ = ["Migrated", "migrate_context", "migrate_recipe", "migrate_settings"]
