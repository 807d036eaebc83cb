"""The processes that share one model: who they are, whether they agree, and how one fails for all.

Everything here goes through the store at which torch.distributed met, never through collectives: a
store has timeouts, and a rank that failed can still say why. One process alone is a :data:`ALONE`,
for which all of this is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["ALONE", "World"]

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks that do this work together, from the side of one of them."""

    rank: int = 0
    size: int = 1

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare what every rank is about to do.

        Args:
            facts: what must be equal, by name.

        Raises:
            ConfigError: a rank differs; all ranks raise, and the message names it and the facts.
        """

    def united(self, mine: T, merge: Callable[[T, T], T]) -> T:
        """What all ranks know, put together pairwise by ``merge``; the same on every rank.

        Args:
            mine: plain data, as JSON has it.
            merge: associative; the lower rank's comes first.
        """
        return mine


ALONE = World()
