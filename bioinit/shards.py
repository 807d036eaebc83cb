"""Which boxes of a tensor one process holds: arithmetic only.

A tensor that is divided over a mesh of processes is, for each of them, a list of boxes: where the
elements that it holds lie in the whole tensor, and in its own memory.
"""

from __future__ import annotations
