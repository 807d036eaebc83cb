"""Stands in for ``bionemo.llm.model.biobert``."""
