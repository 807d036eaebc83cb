"""Where the cache lies, and what its folders are called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

HOME = "BIOINIT_HOME"
"""The variable that says where; ``~/.cache/bioinit`` if it is not set."""

_LETTERS = 32


def home() -> Path:
    """The folder of everything that bioinit keeps."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get(HOME) or "~/.cache/bioinit")))


def made() -> Path:
    """Where folders stand that were made."""
    return home() / "made"


def digests() -> Path:
    """Where digests of files are remembered."""
    return home() / "digests"


def key_of(made_of: Mapping[str, str]) -> str:
    """The name of what was made of ``made_of``.

    >>> key_of({"content": "1", "rules": "2"}) == key_of({"rules": "2", "content": "1"})
    True
    """
    said = json.dumps(dict(made_of), sort_keys=True).encode()
    return hashlib.sha256(said).hexdigest()[:_LETTERS]


def place_of(made_of: Mapping[str, str]) -> Path:
    """Where it stands, or will."""
    return made() / key_of(made_of)
