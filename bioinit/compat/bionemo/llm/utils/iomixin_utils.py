"""Stands in for ``bionemo.llm.utils.iomixin_utils``: the names that people import from there."""

from __future__ import annotations

from bioinit.compat.bionemo.iomixin_utils import (
    IOMixinWithGettersSetters,
    WillHaveGetSetHparam,
)

__all__ = [
    "IOMixinWithGettersSetters",
    "WillHaveGetSetHparam",
]
