"""The processes that share one model: who they are, whether they agree, and how one fails for all.

Everything here goes through the store at which torch.distributed met, never through collectives: a
store has timeouts, and a rank that failed can still say why. One process alone is a :data:`ALONE`,
for which all of this is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["ALONE", "World", "together"]

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks that do this work together, from the side of one of them.

    All methods but :meth:`check` are called by every rank, in the same order.
    """

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

    def gathered(self, mine: T) -> list[T]:
        """What every rank gives, by rank, on all of them. Plain data, and little of it."""
        return [mine]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The name of the host of each rank."""
        return ("",)

    def check(self) -> None:
        """Raise the error of another rank, if one has failed. Cheap; between any two steps."""


ALONE = World()


@contextmanager
def together(device: str | None = None) -> Iterator[World]:
    """The ranks that torch.distributed or its launcher made of us; :data:`ALONE` for one process.

    Args:
        device: where the model will live, ``cpu`` or ``cuda``; chooses how groups communicate, if
            the ranks have yet to meet.
    """
    yield ALONE
