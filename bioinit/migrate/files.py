"""A YAML file that a person wrote for another system, read as plain data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bioinit.contexts._yaml import LARGEST, parse_yaml
from bioinit.errors import CheckpointError, ConfigError, StorageError


def read_settings(path: str | Path) -> dict[Any, Any]:
    """The mapping in the file at ``path``. Nothing that it names is made, imported or called.

    Raises:
        StorageError: there is no such file, or it cannot be read.
        ConfigError: it is not YAML text, is out of all measure, holds no mapping, or a tag in it
            asks for an object.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):
        what = "a folder and no file" if os.path.isdir(path) else "not there"
        raise StorageError(f"{path} is {what}. Give the path of a YAML file.")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}. Check the path.") from None
    if len(data) > LARGEST:
        raise ConfigError(
            f"{path} has more than {LARGEST} bytes, and no settings have. Give the YAML file of a "
            "run, not its data."
        )
    try:
        found = parse_yaml(data.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from None
    except CheckpointError as error:
        # A person's own file: what is wrong with it is theirs to mend.
        raise ConfigError(str(error)) from error
    if not isinstance(found, dict):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise ConfigError(f"{path} holds {kind}, not a mapping of settings. Give a run's YAML.")
    return found
