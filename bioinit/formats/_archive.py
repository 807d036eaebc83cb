"""What is inside the zip archive that one `torch.save` makes: one folder, with one pickle in it."""

from __future__ import annotations

from collections.abc import Mapping

from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import File
from bioinit.storage.zip import Member, data_start

PICKLE = "data.pkl"
_LONGEST_ORDER = 20


def root(file: File, found: Mapping[str, Member]) -> str:
    """The folder of the archive that everything is in, with its slash.

    Raises:
        CorruptCheckpoint: it is no archive of `torch.save`.
        RefusedCheckpoint: it is a program, or its numbers have the highest byte first.
    """
    pickles = [name for name in found if name.endswith(f"/{PICKLE}") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CorruptCheckpoint(
            f"{file} is a zip archive with {len(pickles)} members called {PICKLE}, and torch.save "
            "writes one. Check that it is the file that is meant."
        )
    folder = pickles[0].removesuffix(PICKLE)
    if f"{folder}constants.pkl" in found or any(n.startswith(f"{folder}code/") for n in found):
        raise RefusedCheckpoint(
            f"{file} is a TorchScript program, which brings its own code. Load it with "
            "torch.jit.load where you trust it, and save its state_dict()."
        )
    order = f"{folder}byteorder"
    if order in found:
        begin = data_start(file, order, found[order])
        written = file.read(begin, min(found[order].size, _LONGEST_ORDER))
        if written != b"little":
            raise RefusedCheckpoint(
                f"{file} was written with the byte order {written!r}, and only 'little' is read. "
                "Load it with torch on any machine and save it again."
            )
    return folder
