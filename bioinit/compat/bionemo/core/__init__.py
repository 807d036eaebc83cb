"""Stands in for ``bionemo.core``, as far as configs of models are concerned."""
