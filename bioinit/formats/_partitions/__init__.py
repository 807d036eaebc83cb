"""Checkpoints divided over partitions of a model, each a file of its own, as one set of tensors.

Shared by the formats that are such folders. A format finds its files and says which tensors are
parts of which; ``merger`` makes them one tensor, by the tables in ``rules``. ``ranks`` knows
stages and experts, ``said`` what the files say of themselves, ``complete`` what has to be there,
``doubt`` what nothing in the tensors can tell.
"""

from bioinit.formats._partitions.combine import Part
from bioinit.formats._partitions.complete import require_layers, require_partitions
from bioinit.formats._partitions.doubt import biases_are_copies
from bioinit.formats._partitions.merger import Merger
from bioinit.formats._partitions.rules import SAME, Rule, Rules, style
from bioinit.formats._partitions.said import argument, require_one_step, settings, size

__all__ = [
    "SAME",
    "Merger",
    "Part",
    "Rule",
    "Rules",
    "argument",
    "biases_are_copies",
    "require_layers",
    "require_one_step",
    "require_partitions",
    "settings",
    "size",
    "style",
]
