"""The names that people's scripts import from other systems, thin over bioinit.

``bioinit.compat.nemo``, ``bioinit.compat.bionemo`` and ``bioinit.compat.labml`` need nothing of
those systems installed. ``docs/migration.md`` has one table of all differences.
"""
