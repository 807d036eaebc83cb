"""What a person asks of a conversion, checked before anything is opened."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

import torch

from bioinit import formats
from bioinit.config import Placement
from bioinit.errors import ConfigError
from bioinit.formats.protocol import WriteOptions
from bioinit.record import build, make_record
from bioinit.save.worlds import format_for

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_STEPS = "KMGT"
_LONGEST = 30


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
        partitions: int | None,
        max_shard_size: int | str | None,
        drop: tuple[str, ...],
    ) -> Self:
        """The options that these words mean.

        Raises:
            ConfigError: one of them means nothing, or nothing for the format.
        """
        chosen = format_for(to, format)
        shards = WriteOptions()
        if partitions is not None and partitions < 1:
            raise ConfigError(f"partitions={partitions}: there must be one at least.")
        if max_shard_size is not None:
            shards = WriteOptions(max_shard_bytes=bytes_of(max_shard_size))
            _require_honoured(chosen, "max_shard_bytes", f"max_shard_size={max_shard_size}")
        if (partitions or 1) > 1:
            _require_honoured(chosen, "partitions", f"partitions={partitions}")
        place: Placement = build(make_record(Placement, {"dtype": dtype}, at="convert"))
        return cls(to, chosen, place.dtype, partitions or 1, shards.max_shard_bytes, drop)


def _require_honoured(format: str, option: str, said: str) -> None:
    if option in formats.load(format).honours:
        return
    others = [name for name, found in formats.SIBLINGS.usable() if option in found.honours]
    raise ConfigError(
        f"{said} means nothing to the format {format!r}: only {', '.join(sorted(others))} looks at "
        "it. Leave it out, or choose another --format."
    )


def bytes_of(size: int | str, what: str = "max_shard_size") -> int:
    """The bytes that ``5GB`` or ``500MiB`` are.

    >>> bytes_of("5GB"), bytes_of("1 KiB"), bytes_of(17)
    (5000000000, 1024, 17)
    """
    match = _SIZE.fullmatch(str(size).strip()) if len(str(size)) <= _LONGEST else None
    count = 0
    if match is not None:
        number, unit = float(match[1]), (match[2] or "").upper()
        base = 1024 if unit.endswith("I") else 1000
        power: int = _STEPS.index(unit[0]) + 1 if unit else 0
        count = int(number * base**power)
    if count < 1:
        raise ConfigError(f"{what}={size!r} is no size. Write 5GB, 500MiB or bytes.")
    return count
