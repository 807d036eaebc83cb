"""Which stored names belong to state of training, and are therefore no weights.

Checkpoints that keep one flat list of names (torch's distributed checkpoint, zarr) put the
optimizer beside the model, told apart by the first words of a name alone. Some words are never
anything else; others, such as ``scaler`` or ``loops``, are what a model may just as well call its
own modules. Those count only where the rest shows that this is the state of a whole training:
Megatron's files lie beside them, or the model stands in a container of its own.

Pickles are judged in `bioinit.unpickle.weights`, by a table of its own: the entries of a dict say
by themselves which of them is the state dict, so a name there is asked about only if none is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

_OPTIMIZER = re.compile(r"optim|optimizers?|optimizer_states?|chained_\d+")
_ALIKE = re.compile(r"(.*_)?optim(izer)?s?(_states?|_\d+)?")
"""With one of the parts of an optimizer right behind it, that is what it is, wherever it stands."""

_PARTS = ("state", "param_groups", "distributed")
_PERHAPS = re.compile(
    r"(.*_)?optim(izer)?s?(_.*)?|(lr_|opt_param_)?schedulers?|(.*_)?rng(_states?)?|(grad_)?scaler"
    r"|callbacks|loops|train_state|train(_)?er_state|dataloader.*"
)
CONTAINERS = ("model", "app", "module", "state_dict")


def training_state(names: Iterable[str], *, by_megatron: bool) -> set[str]:
    """Those of ``names`` that are state of training; words are parted by dots or slashes."""
    parts = {name: name.replace("/", ".").split(".", 3) for name in names}
    whole = by_megatron or any(len(p) > 1 and p[0] in CONTAINERS for p in parts.values())
    return {name for name, words in parts.items() if _is_state(words, whole)}


def _is_state(words: list[str], whole: bool) -> bool:
    first = words[0]
    if len(words) == 1:
        return False
    if _OPTIMIZER.fullmatch(first) or (whole and _PERHAPS.fullmatch(first)):
        return True
    return any(
        after.split(".", 1)[0] in _PARTS and _ALIKE.fullmatch(word)
        for word, after in pairwise(words)
    )
