"""Who builds the model: one sibling per kind of module, imported only when it is asked for.

The folder is the list and a file's name is its name; other packages add siblings through the
entry-point group ``bioinit.backends``.
"""

from __future__ import annotations

from bioinit.backends.protocol import Backend
from bioinit.siblings import Siblings

__all__ = ["Backend", "load", "names"]

SIBLINGS = Siblings(__name__, __path__, "BACKEND", Backend, "backend")
names, load = SIBLINGS.names, SIBLINGS.load
