"""Stands in for ``bionemo.core.model``."""
