"""``context/bioinit.json``: what a conversion carries along that its own world has no place for.

Fields of a saved config that no field of ours means, by dialect, so that they are there again on
the way back; and files that lie elsewhere than their names in a checkpoint of ours say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bioinit.contexts._artifacts import CARRIED_FILES
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.record.notation import require_shallow
from bioinit.storage import File, Folder

PLACE = "context/bioinit.json"


class Sidecar(NamedTuple):
    """Fields by dialect, and files by the name that they get."""

    carried: Mapping[str, Mapping[str, Any]] = {}
    files: Mapping[str, File] = {}


def read_sidecar(home: Folder) -> Sidecar | None:
    """What lies in ``home``; None if there is nothing.

    Raises:
        CorruptCheckpoint: it is no sidecar.
        RefusedCheckpoint: it gives a file a name that none which goes along has.
    """
    if home.is_file or not home.has(PLACE):
        return None
    where = str(home.path / PLACE)
    document = home.read_json(PLACE)
    carried = document.get("carried") if isinstance(document, dict) else None
    files = document.get("files", {}) if isinstance(document, dict) else None
    if not (
        isinstance(carried, dict)
        and all(isinstance(fields, dict) for fields in carried.values())
        and isinstance(files, dict)
        and all(isinstance(place, str) for place in files.values())
    ):
        raise CorruptCheckpoint(
            f"{where} does not hold the fields that a conversion carried along. Convert again, or "
            "remove the file: what it carried is lost then."
        )
    require_shallow(carried, where)
    for name in files:
        if name not in CARRIED_FILES:
            raise RefusedCheckpoint(
                f"{where} wants to put a file under the name {name!r:.200}, which could stand for "
                f"weights, a config or code. Only {', '.join(CARRIED_FILES)} go along: remove the "
                "entry, or get the checkpoint from a source you trust."
            )
    found = {name: home.file(place) for name, place in files.items() if home.has(place)}
    return Sidecar(carried, found)
