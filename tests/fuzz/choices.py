"""Bytes as decisions: the same generator runs from random bytes, from a saved finding, or from a
fuzzer that learns which bytes lead to new code. Where the bytes end, every decision is the first
option, which is the valid one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Option = TypeVar("Option")


class Choices:
    """Decisions read from ``data``, one or two bytes each."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def byte(self) -> int:
        if self.position >= len(self.data):
            return 0
        self.position += 1
        return self.data[self.position - 1]

    def below(self, limit: int) -> int:
        """A number from 0 to ``limit - 1``; 0 if there is none."""
        if limit <= 1:
            return 0
        number = self.byte()
        if limit > 256:
            number = number << 8 | self.byte()
        return number % limit

    def pick(self, options: Sequence[Option]) -> Option:
        return options[self.below(len(options))]

    def rarely(self) -> bool:
        """True once in about ten times."""
        return self.byte() >= 230

    def hardly(self) -> bool:
        """True once in about thirty times: for changes that make the input large."""
        return self.byte() >= 248

    def some(self, size: int) -> bytes:
        """The next ``size`` bytes, or fewer."""
        found = self.data[self.position : self.position + size]
        self.position += len(found)
        return found
