"""What was made once from something else, and is used from there ever since.

A folder is made by one process while the others wait, hidden until every byte of it is on the disk,
and says in a marker what it was made of. It is found again by that alone: by digests of content
and rules, and never by a name. Nothing here knows what is made; who asks gives a function for it.

    $BIOINIT_HOME/made/KEY/            what was made, with its marker
    $BIOINIT_HOME/made/.KEY.use        locked by every process that uses it, until that ends
    $BIOINIT_HOME/made/.KEY.converting what a killed process left, for the next one to go on with
    $BIOINIT_HOME/digests/             digests of files, as long as those are as they were
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from bioinit.cache import use
from bioinit.cache.content import Content, content_of, is_remembered
from bioinit.cache.marker import Marker, is_made_of, lacks, mark, touch
from bioinit.cache.marker import read as read_marker
from bioinit.cache.places import HOME, home, key_of, place_of
from bioinit.cache.shelf import Kept, Removed, entries, prune, verify
from bioinit.storage import Journal, Words, atomic_folder, disk_error, resumable_folder
from bioinit.storage.lock import locked

__all__ = [
    "HOME",
    "Content",
    "Kept",
    "Marker",
    "Removed",
    "content_of",
    "entries",
    "find",
    "home",
    "is_remembered",
    "keep",
    "keep_in_steps",
    "key_of",
    "lacks",
    "prune",
    "read_marker",
    "verify",
]

_NOTHING: Mapping[str, str] = {}
_WORDS = Words("place", "overwrite=True")


def _patiently() -> None:
    """What is done while another process is at it: nothing but waiting."""


def keep(
    place: Path | None,
    made_of: Mapping[str, str],
    make: Callable[[Path], object],
    *,
    about: Mapping[str, str] = _NOTHING,
    overwrite: bool = False,
    again: bool = False,
    apart: Iterable[Path] = (),
    waiting: Callable[[], None] = _patiently,
) -> Path:
    """The folder that was made of ``made_of``; it is made now if nobody has made it yet.

    Of several processes that ask at once one makes it, and the others wait, without an end, and
    find it done. A process that is killed gives its turn to the next. Until this process ends,
    nobody takes a folder of the cache away.

    Args:
        place: where the folder is to stand; None for the cache's own, whose name nobody chooses.
        made_of: everything that decides what is made, by name: digests of content and rules.
        make: fills the new, empty folder that it is given; what it raises leaves nothing.
        about: what people are told of it: ``source``, ``name``, ...
        overwrite: whether what stands at ``place`` and was made of something else is replaced.
        again: make it, though it is there; the old one stays until the new one is whole.
        apart: what is read meanwhile, which ``place`` may not touch.
        waiting: called again and again while another process makes it; what it raises ends the
            wait.

    Raises:
        StorageError: the file system refuses, or something else stands at ``place``.
    """

    def fill(final: Path, replace: bool) -> None:
        with atomic_folder(final, overwrite=replace, keep=apart) as at:
            make(at)
            mark(at, made_of, about)

    return _kept(place, made_of, fill, overwrite or again, waiting, again=again)


def keep_in_steps(
    place: Path | None,
    made_of: Mapping[str, str],
    make: Callable[[Path, Journal], Mapping[str, str]],
    *,
    moment: str = "",
    about: Mapping[str, str] = _NOTHING,
    overwrite: bool = False,
    apart: Iterable[Path] = (),
    waiting: Callable[[], None] = _patiently,
) -> Path:
    """As :func:`keep`, for work that the next process goes on with where one was killed.

    Args:
        place: as above.
        made_of: as above.
        make: fills the folder that it is given, in which an earlier process may have left what the
            journal says is whole. It returns digests that it knows, by file.
        moment: what was begun is gone on with only where this is the same too: that of
            :class:`Content`, since a source may have been something else in between.
        about: as above.
        overwrite: as above.
        apart: as above.
        waiting: as above.
    """

    def fill(final: Path, replace: bool) -> None:
        work = key_of({**made_of, "moment": moment})
        with resumable_folder(final, work, overwrite=replace, keep=apart, words=_WORDS) as (
            at,
            journal,
        ):
            mark(at, made_of, about, make(at, journal))

    return _kept(place, made_of, fill, overwrite, waiting)


def find(made_of: Mapping[str, str]) -> Path | None:
    """The cache's folder made of ``made_of``, in use from now on; None if there is none."""
    final = place_of(made_of)
    if not is_made_of(final, made_of):
        return None
    is_new = use.begin(final, _patiently)
    if not is_made_of(final, made_of):  # removed before it was in use
        if is_new:
            use.end(final)
        return None
    touch(final)
    return final


def _kept(
    place: Path | None,
    made_of: Mapping[str, str],
    fill: Callable[[Path, bool], None],
    overwrite: bool,
    waiting: Callable[[], None],
    *,
    again: bool = False,
) -> Path:
    final = place_of(made_of) if place is None else Path(os.path.abspath(place.expanduser()))
    if place is not None and not again and is_made_of(final, made_of):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"make the folder {final.parent}") from error
    is_new = place is None and use.begin(final, waiting)
    try:
        if again or not is_made_of(final, made_of):
            with locked(final, use.told(final, waiting)):
                if again or not is_made_of(final, made_of):
                    # What of ours is not whole any more is made again.
                    replace = overwrite or place is None or is_made_of(final, made_of, whole=False)
                    fill(final, replace)
    except BaseException:
        if is_new:
            use.end(final)
        raise
    touch(final)
    return final
