"""What a person asks of a conversion, checked before anything is opened."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

import torch

from bioinit.config import Placement
from bioinit.errors import ConfigError
from bioinit.record import build, make_record
from bioinit.save.worlds import format_for

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_STEPS = "KMGT"


class Options(NamedTuple):
    """Where to, and how it is written."""

    to: str
    format: str
    dtype: torch.dtype | None
    partitions: int
    max_shard_bytes: int
    drop: tuple[str, ...]

    @classmethod
    def of(
        cls,
        to: str,
        format: str | None,
        dtype: str | torch.dtype | None,
        partitions: int,
        max_shard_size: int | str,
        drop: tuple[str, ...],
    ) -> Self:
        """The options that these words mean.

        Raises:
            ConfigError: one of them means nothing.
        """
        chosen = format_for(to, format)
        if partitions < 1:
            raise ConfigError(f"partitions={partitions}: there must be one at least.")
        place: Placement = build(make_record(Placement, {"dtype": dtype}, at="convert"))
        return cls(to, chosen, place.dtype, partitions, _bytes(max_shard_size), drop)


def _bytes(size: int | str) -> int:
    """The bytes that ``5GB`` or ``500MiB`` are.

    >>> _bytes("5GB"), _bytes("1 KiB"), _bytes(17)
    (5000000000, 1024, 17)
    """
    match = _SIZE.fullmatch(str(size).strip())
    count = 0
    if match is not None:
        number, unit = float(match[1]), (match[2] or "").upper()
        base = 1024 if unit.endswith("I") else 1000
        power: int = _STEPS.index(unit[0]) + 1 if unit else 0
        count = int(number * base**power)
    if count < 1:
        raise ConfigError(f"max_shard_size={size!r} is no size. Write 5GB, 500MiB or bytes.")
    return count
