"""How bytes lie on disk: one sibling per format, and the dispatcher that asks them.

The folder is the list: a file here that defines ``FORMAT`` is a format, and its name is that of the
format; packages add more through the entry-point group ``bioinit.formats``. A sibling is imported
only when it is asked for. Siblings read single files, or whole directories of their own kind. A
directory that merely holds complete weight files side by side is the dispatcher's own business, so
that every single-file format can be sharded without knowing it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

from bioinit import collector
from bioinit.errors import (
    AmbiguousFormat,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnknownFormat,
)
from bioinit.formats import _directory, _homes
from bioinit.formats.protocol import Contents, Format
from bioinit.siblings import Siblings
from bioinit.storage import File, Folder

__all__ = ["homes", "load", "names", "open_weights"]

SIBLINGS = Siblings(__name__, __path__, "FORMAT", Format, "format")
names, load = SIBLINGS.names, SIBLINGS.load
_LONGEST_WORD = 32
_STAND_INS = (  # what lies in the place of weights that were not fetched
    (
        b"version https://git-lfs",
        "It is the pointer that Git LFS left in its place: run `git lfs pull`.",
    ),
    (b"<!DOCTYPE", "It is a web page, probably an error of the server: download it again."),
    (b"<html", "It is a web page, probably an error of the server: download it again."),
)
_OTHERS = (
    (b"\x80", "It may be a bare pickle: load it where you trust it and write a safetensors file."),
    (b"GGUF", "It is a GGUF file, made for inference: point at the weights it was made from."),
    (b"\x89HDF", "It is an HDF5 file: point at the safetensors or torch weights instead."),
)


def open_weights(folder: Folder) -> tuple[str, Contents]:
    """The name of the format that recognizes ``folder``, and what it found from headers alone.

    An index file, or one part of several, stands for the directory it lies in.

    Raises:
        UnknownFormat: no format recognizes it.
        AmbiguousFormat: more than one does, or several sets of weights lie side by side.
        CorruptCheckpoint: it contradicts itself.
    """
    around = folder.around
    if around is not None and _directory.stands_for_directory(folder.names()[0]):
        with collector.paused():
            found = _open_directory(around, pointed_at=folder.names()[0])
        return found[0], _checked(folder, found[1], _homes.homes(folder, _fits))
    if around is not None and (ranks := _homes.whole(around)) is not around:
        return _open(ranks)
    return _open(folder)


def _open(folder: Folder) -> tuple[str, Contents]:
    """Open the file, or the folder in which weights lie, that ``folder`` is or leads to."""
    with collector.paused():
        way = _homes.homes(folder, _fits)
        name, contents = _open_file(folder) if folder.is_file else _open_directory(way[0])
        return name, _checked(folder, contents, way)


def _checked(folder: Folder, contents: Contents, way: tuple[Folder, ...]) -> Contents:
    _require_text(folder, contents)
    return replace(contents, homes=(*contents.homes, *way))


def homes(folder: Folder) -> tuple[Folder, ...]:
    """Where a saved config of the checkpoint at ``folder`` may lie, nearest to the weights first.

    Nothing but names is read, and of an archive its list of members.

    Raises:
        CheckpointError: what stands there contradicts itself, or is not finished.
    """
    way = _homes.homes(folder, _fits)
    last = folder if folder.is_file else way[0]
    for name in _fitting(last):
        unpack = load(name).unpack
        if unpack is not None:
            return (*_homes.homes(unpack(last), _fits), *way)
    return way


def _open_inner(folder: Folder) -> Contents:
    name, contents = _open(folder)
    return replace(contents, metadata={**contents.metadata, "inside": name})


def _open_file(folder: Folder) -> tuple[str, Contents]:
    """Open a single file, which exactly one format recognizes."""
    file = folder.file(folder.names()[0])
    start = file.read(0, min(file.size, _LONGEST_WORD))
    if not start:
        raise CorruptCheckpoint(f"{file} is empty: 0 bytes. Fetch or write it again.")
    for word, hint in _STAND_INS:
        if start.startswith(word):
            raise RefusedCheckpoint(f"{file} holds no weights. {hint}")
    fitting = _fitting(folder)
    if not fitting:
        _raise_unknown_file(file, start)
    name = _only(folder, fitting)
    return name, load(name).open(folder, _open_inner)


def _open_directory(folder: Folder, pointed_at: str | None = None) -> tuple[str, Contents]:
    """Open a directory: a format of its own, or weight files side by side."""
    fitting = _fitting(folder)
    if fitting:
        name = _only(folder, fitting)
        found = load(name)
        # What is packed into an archive may have any name; its tree says which the weights are.
        beside = _directory.usual(folder) if found.unpack is None else None
        if beside is not None:
            raise AmbiguousFormat(
                f"{folder.path} is a checkpoint of the format {name}, and {beside} beside it holds "
                "weights too. Point at that file if it is meant, or move it away."
            )
        return name, found.open(folder, _open_inner)
    chosen = _directory.choose(folder, pointed_at=pointed_at)
    if chosen is None:
        _raise_unknown_directory(folder)
    opened = [(name, *_open_file(folder.lone(name))) for name in chosen.files]
    contents = _directory.gather(chosen, [(name, found) for name, _, found in opened])
    return "+".join(sorted({format_name for _, format_name, _ in opened})), contents


def _require_text(folder: Folder, contents: Contents) -> None:
    """Raise if a tensor has a name that nothing could print: half a character."""
    try:
        "".join(contents.tensors).encode("utf-8")
    except UnicodeEncodeError as error:
        files = ", ".join(str(file) for file in contents.files[:4])
        half = error.object[error.start : error.end]
        raise CorruptCheckpoint(
            f"{folder.path} ({files}) names a tensor {half!r} or longer, which is no text. Fetch "
            "or write it again."
        ) from error


def _fits(folder: Folder) -> bool:
    return bool(_fitting(folder))


def _fitting(folder: Folder) -> list[str]:
    return [name for name, found in SIBLINGS.usable() if found.recognizes(folder)]


def _only(folder: Folder, fitting: list[str]) -> str:
    if len(fitting) > 1:
        raise AmbiguousFormat(
            f"{folder.path} is recognized by more than one format: {', '.join(fitting)}. Point at "
            "the file or folder inside it that is meant, or uninstall the plug-in that is not."
        )
    return fitting[0]


def _looked_for() -> str:
    """What each format is recognized by."""
    known = ((name, found.marks) for name, found in SIBLINGS.usable())
    return "; ".join(f"{name} ({marks})" if marks else name for name, marks in known)


def _raise_unknown_file(file: File, start: bytes) -> NoReturn:
    hints = [hint for word, hint in _OTHERS if start.startswith(word)]
    raise UnknownFormat(
        f"no format recognizes {file} ({file.size} bytes, beginning with {start[:16]!r}). "
        f"Looked for: {_looked_for()}. "
        + (hints[0] if hints else "Check the path, or fetch or write the file again.")
    )


def _raise_unknown_directory(folder: Folder) -> NoReturn:
    files, inner = folder.names(), [f"{name}/" for name in folder.folders()]
    seen = [*inner, *files]
    if not seen:
        raise UnknownFormat(
            f"{folder.path} is an empty directory. Check the path, or fetch the checkpoint again."
        )
    shown = ", ".join(seen[:8]) + (f" and {len(seen) - 8} more" if len(seen) > 8 else "")
    cure = "Check the path, or fetch the weights again."
    if inner:
        cure = f"Point at the folder inside it that holds the weights: {' or '.join(inner[:4])}"
    raise UnknownFormat(
        f"no format recognizes the directory {folder.path}, which holds {shown}. Looked for: "
        f"{_looked_for()}. {cure}"
    )
