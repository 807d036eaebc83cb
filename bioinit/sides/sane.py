"""Counts that no checkpoint has: refused before anybody builds a model of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bioinit.backends.protocol import MOST_LABELS
from bioinit.errors import CorruptCheckpoint

# ``shared_expert_intermediate_size`` and ``block_size`` are sizes, not counts.
_COUNT = re.compile(r"(.*_)?(layers|experts|blocks)|(n|num)_(layer|expert|block)")


def require_sane(data: Any, where: str, stored: int, at: str = "") -> None:
    """Refuse counts that no checkpoint of ``stored`` tensors has: building them takes for ever."""
    most = max(1000, 4 * stored)
    pairs = data.items() if isinstance(data, Mapping) else enumerate(data)
    for key, value in pairs:
        name = f"{at}{key}"
        if isinstance(value, Mapping | list | tuple):
            require_sane(value, where, stored, f"{name}.")
        elif not isinstance(value, int):
            continue
        elif key == "num_labels" and value > MOST_LABELS:
            raise CorruptCheckpoint(
                f"{where}: {name} is {value}, and no head has more than {MOST_LABELS} labels. "
                "Correct the file, or fetch it again."
            )
        elif _COUNT.fullmatch(str(key)) and value > most:
            raise CorruptCheckpoint(
                f"{where}: {name} is {value}, but the checkpoint stores {stored} tensors, and at "
                f"most {most} could go with them. Correct the file, or fetch it again."
            )
