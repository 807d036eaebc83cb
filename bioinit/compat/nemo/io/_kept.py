"""What a connector made, kept: made once, whole or not at all, and of what it was made.

The cache (:mod:`bioinit.cache`) has the lock, the hidden folder and the note; here is what a
connector's result depends on, and what becomes of a place where something stands already.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bioinit import cache
from bioinit.cache import Content, lacks, read_marker
from bioinit.compat.nemo._found import UNFINISHED, Unfinished, is_unfinished
from bioinit.compat.nemo._hub import in_cache
from bioinit.compat.nemo.io._rules import name_of, not_told, rules_of
from bioinit.errors import CheckpointError, StorageError
from bioinit.storage import MADE_OF
from bioinit.version import __version__

_log = logging.getLogger("bioinit")
_CONTENT = "content"
_NAME = "source"
_LETTERS = 8
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Changed(StorageError, FileExistsError):
    """What stands at a place was made of something else than is asked for now."""


class StillMaking(StorageError, TimeoutError):
    """Another process makes the same, and has not come to an end in time."""


class MadeNothing(CheckpointError, RuntimeError):
    """A connector returned without having made anything."""


class Makes(Protocol):
    """A connector, as far as it is asked here."""

    def apply(self, output_path: Path, **kwargs: Any) -> Path | None: ...


class _Elsewhere(Exception):
    """What was made is no folder at the place that was given."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class _Failed(Exception):
    """What ``apply`` raised, past those who explain errors of writing."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def kept(
    connector: Makes,
    place: Path,
    kwargs: Mapping[str, Any],
    *,
    overwrite: bool,
    is_ours: bool,
    seconds: float,
) -> Path:
    """What ``connector`` makes at ``place``, now or before.

    Args:
        connector: its text is the source.
        place: where it is to stand.
        kwargs: for its ``apply``.
        overwrite: make it, though it stands there.
        is_ours: nobody chose the place, so what was made of something else is made again.
        seconds: how long to wait for another process.
    """
    if is_ours:
        place = place_of(connector, place)
    if place.exists() and not overwrite and not _is_empty(place) and not _is_made(place):
        if is_unfinished(place):
            raise Unfinished(
                f"{place} was never finished: its writer left {place.name}{UNFINISHED} beside it. "
                "Make it again with overwrite=True, or, if you know that it is whole, remove that "
                "marker."
            )
        _log.info("%s stands there, and was not made by bioinit: it is taken as it is.", place)
        return place
    source = _Source.of(str(connector), place)
    made_of = rules_of(connector, kwargs) | {_NAME: str(connector), _CONTENT: source.digest}
    if is_ours:
        made_of["bioinit"] = __version__
    if not overwrite and _fits(place, made_of):
        return place
    if not overwrite and not is_ours and _is_made(place) and not _is_broken(place):
        raise Changed(
            f"{place} exists, and was made of something else than {connector} is now: "
            f"{', '.join(_differing(place, made_of))} changed. Make it again with overwrite=True, "
            "or choose another place."
        )
    returned: list[Path] = []

    def make(at: Path) -> None:
        at.rmdir()  # connectors make it themselves
        try:
            with not_told(connector):
                result = connector.apply(at, **kwargs)
        except OSError as error:
            if error.errno in _OF_THE_DISK:
                raise
            raise _Failed(error) from error
        finally:
            # nemo_save leaves it where it was stopped; with the folder it is gone too.
            at.with_name(at.name + UNFINISHED).unlink(missing_ok=True)
        returned.append(_from(at, result))
        if not at.is_dir():
            raise _Elsewhere(_aside(at, place, result, connector))
        if source.content is not None:
            source.content.require_unchanged()
        elif not source.is_settled:  # apply has fetched it
            made_of[_CONTENT] = _Source.of(str(connector), place).digest

    try:
        cache.keep(
            place,
            made_of,
            make,
            about={_NAME: str(connector), "name": name_of(type(connector))},
            overwrite=is_ours and _is_made(place),
            again=overwrite,
            apart=source.paths,
            waiting=_until(time.monotonic() + seconds, place),
        )
    except _Elsewhere as elsewhere:
        return elsewhere.path
    except _Failed as failed:
        raise failed.error from None
    except StorageError:
        # Another process made it meanwhile, and knew more or less of a source on the hub.
        if overwrite or not _fits(place, made_of):
            raise
    if overwrite:  # of what stood there before
        place.with_name(place.name + UNFINISHED).unlink(missing_ok=True)
    return place / returned[0] if returned else place


def place_of(connector: Makes, place: Path) -> Path:
    """``place``, or one beside it if another source of the same name is kept there."""
    note = read_marker(place) if _is_made(place) else None
    name = str(connector)
    if note is None or note.made_of.get(_NAME) == name:
        return place
    content = _Source.of(name, place).digest
    if content and content == note.made_of.get(_CONTENT):
        return place
    told_apart = content or hashlib.sha256(os.fsencode(name)).hexdigest()
    return place.with_name(f"{place.name}-{told_apart[:_LETTERS]}")


def is_kept(place: Path) -> bool:
    """Whether something whole stands at ``place``, as far as can be known."""
    is_there = place.exists() and not _is_empty(place)
    return is_there and not _is_broken(place) and not is_unfinished(place)


def _is_made(place: Path) -> bool:
    return (place / MADE_OF).is_file()


def _is_empty(place: Path) -> bool:
    return place.is_dir() and not any(place.iterdir())


def _is_broken(place: Path) -> bool:
    """Whether a note says that there was more."""
    note = read_marker(place) if _is_made(place) else None
    return note is not None and any(lacks(place, note))


def _fits(place: Path, made_of: Mapping[str, str]) -> bool:
    return _is_made(place) and not _differing(place, made_of) and not _is_broken(place)


def _differing(place: Path, made_of: Mapping[str, str]) -> list[str]:
    """What of ``made_of`` was something else when ``place`` was made."""
    note = read_marker(place)
    if note is None:
        return ["its note"]
    found = []
    contents = note.made_of.get(_CONTENT), made_of[_CONTENT]
    for name in sorted({*note.made_of, *made_of}):
        was, is_now = note.made_of.get(name, ""), made_of.get(name, "")
        if name == _NAME and contents[0] == contents[1] != "":
            continue  # it has moved
        # The content of a name on the hub is known only once it has been fetched.
        if was != is_now and not (name == _CONTENT and (not was or not is_now)):
            found.append(name)
    return found


class _Source(NamedTuple):
    """What a connector reads, as far as it is known before it reads."""

    digest: str
    content: Content | None
    paths: tuple[Path, ...]
    is_settled: bool
    """Whether it is all here, so that nothing newer will be fetched."""

    @classmethod
    def of(cls, source: str, place: Path) -> _Source:
        """Of a path, the content of its files; of a name on the hub, its commit if it is here."""
        path = Path(source).expanduser()
        if path.exists():
            content = cache.content_of(_files(path, place))
            return cls(content.digest, content, (path,), True)
        found = in_cache(source, whole=False) if _ON_THE_HUB.fullmatch(source) else None
        if found is None:
            return cls("", None, (), False)
        return cls(found.name, None, (found,), in_cache(source) is not None)


def _files(source: Path, place: Path) -> Iterator[Path]:
    """The files of ``source`` without those of ``place``, which may stand in it."""
    if source.is_file():
        yield source
        return
    seen = set()
    for where, folders, names in os.walk(source, followlinks=True):
        here = Path(where)
        seen.add(here.resolve())  # a link may lead back
        folders[:] = [
            name
            for name in folders
            if not _is_of(here / name, place) and (here / name).resolve() not in seen
        ]
        yield from (
            path for name in names if not _is_of(path := here / name, place) and path.is_file()
        )


def _is_of(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place``, or one of the hidden files and folders beside it."""
    absolute = Path(os.path.abspath(path))
    final = Path(os.path.abspath(place))
    is_beside = absolute.parent == final.parent
    return absolute == final or (is_beside and absolute.name.startswith(f".{final.name}."))


def _from(at: Path, result: Any) -> Path:
    """What ``apply`` returned, as a path from ``at``; a path of its own if it lies elsewhere."""
    if result is None:
        return Path()
    path = Path(result)
    return path.relative_to(at) if path.is_relative_to(at) else Path(os.path.abspath(path))


def _aside(at: Path, place: Path, result: Any, connector: Makes) -> Path:
    """Where something lies that is no folder at ``at``: a file, or what ``apply`` pointed at."""
    if at.is_file():
        os.replace(at, place)
        return place
    if result is not None and Path(result).exists():
        return Path(result)
    raise MadeNothing(
        f"{name_of(type(connector))}.apply({str(connector)!r}) made nothing: there is neither a "
        "file nor a folder at the output_path it was given. Write the result to output_path, or "
        "return where it lies."
    )


def _until(end: float, place: Path) -> Callable[[], None]:
    def wait() -> None:
        if time.monotonic() > end:
            raise StillMaking(
                f"cannot make {place}: another process is at it, and has not come to an end within "
                "LOCK_TIMEOUT. Wait for it, or raise LOCK_TIMEOUT of the connector."
            )

    return wait
