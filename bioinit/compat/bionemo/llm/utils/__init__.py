"""Stands in for ``bionemo.llm.utils``."""
