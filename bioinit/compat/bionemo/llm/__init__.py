"""Stands in for ``bionemo.llm``, as far as starting from a checkpoint is concerned."""
