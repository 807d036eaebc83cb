"""A folder written whole or not at all.

It is filled under a hidden name beside its place and renamed when every byte of it is on the disk.
Whatever stops the writer half-way, nothing stands under the final name. After an error the hidden
folder is gone too. After Ctrl-C, or a kill, it stays only where the work can be gone on with
(``resumable_folder``), for the next one that asks for the same; otherwise it is removed, by Ctrl-C
or by the next one that writes the same folder. A folder that holds something is replaced only where
that is allowed, and never one that is being read.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bioinit.errors import BioinitError, StorageError
from bioinit.storage.exchange import exchange
from bioinit.storage.file import disk_error
from bioinit.storage.journal import Journal, holds_journal, is_journal_of
from bioinit.storage.lock import locked

MADE_OF = ".made.json"
"""In it the cache says what a folder was made of; it is no part of what the folder holds."""
LONGEST_NAME = 255  # bytes in one part of a path, NAME_MAX of Linux
_NAMES_SHOWN = 3
_RESUMABLE = "converting"

# How the libraries that write weights report what the system told them: safetensors and torch.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_TORCH_FAILED = ("file write failed", "PytorchStreamWriter failed", "unexpected pos")


class Words(NamedTuple):
    """What the places and switches of a verb are called where people are told of them."""

    place: str = "output_dir"
    replace: str = "output.overwrite=true"


_OF_INIT = Words()


@contextmanager
def atomic_folder(
    path: str | Path, *, overwrite: bool = False, keep: Iterable[Path] = ()
) -> Iterator[Path]:
    """A new folder to fill; it appears at ``path`` when the block ends without an error.

    Args:
        path: where it will stand. Missing parents are made; an empty folder there is replaced.
        overwrite: replace a folder that is not empty. The old one stays until the new one is whole.
        keep: files and folders that this must leave alone; see :func:`require_free`.

    Raises:
        StorageError: something stands there already, another process is writing it, or the file
            system refuses. The partial folder is removed.
    """
    kept = tuple(keep)
    final = require_free(path, overwrite=overwrite, keep=kept)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"make the folder {final.parent}") from error
    with locked(final) as is_alone:
        _recover(final, is_alone)
        require_free(final, overwrite=overwrite, keep=kept)
        partial = _hidden(final, "partial")
        try:
            with _explained(final):
                partial.mkdir()
                yield partial
                _flush(partial)
                _move_into_place(partial, final, overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumable_folder(
    path: str | Path,
    work: str,
    *,
    overwrite: bool = False,
    keep: Iterable[Path] = (),
    words: Words = _OF_INIT,
) -> Iterator[tuple[Path, Journal]]:
    """As :func:`atomic_folder`, for work that a killed process may have begun.

    The hidden folder has one name, so the next process finds it; its journal says what of it is
    whole. After an error it is removed. What was interrupted stays, for who asks for the same
    again. What the journal says is whole is trusted by its name and size.

    Args:
        path: as above.
        work: a digest of everything that decides what is written.
        overwrite: as above.
        keep: as above.
        words: what ``path`` and ``overwrite`` are called.

    Raises:
        StorageError: as above.
    """
    kept = tuple(keep)
    final = require_free(path, overwrite=overwrite, keep=kept, words=words)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, f"make the folder {final.parent}") from error
    with locked(final) as is_alone:
        _recover(final, is_alone)
        require_free(final, overwrite=overwrite, keep=kept, words=words)
        partial = _resumable(final)
        _require_ours(partial, kept)
        try:
            with _explained(final), _begun(partial, work) as journal:
                yield partial, journal
                _flush(partial)
                # Last, since a folder without it is nobody's work.
                os.unlink(partial / Journal.NAME)
                _sync(partial)
                _move_into_place(partial, final, overwrite, words)
                shutil.rmtree(partial, ignore_errors=True)  # what stood there, if it was exchanged
        except Exception:  # an error would come again; only an interrupt leaves work to go on with
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _resumable(final: Path) -> Path:
    return final.parent / f".{final.name}.{_RESUMABLE}"


def _require_ours(partial: Path, keep: Iterable[Path]) -> None:
    """Refuse to go on in, or to remove, what is being read or what no earlier process left."""
    real = Path(os.path.realpath(partial))
    for kept in keep:
        place = Path(os.path.realpath(kept))
        if real == place or real in place.parents:
            raise StorageError(
                f"cannot write in {partial}: it {'is' if real == place else 'holds'} {kept}, which "
                "is being read, and unfinished work goes there. Move it, or choose another path."
            )
    if os.path.lexists(partial) and not holds_journal(partial) and not _is_empty(partial):
        raise StorageError(
            f"cannot write in {partial}: unfinished work goes there, and what is there is none of "
            "an earlier process. Move or remove it, or choose another path."
        )


def _is_empty(path: Path) -> bool:
    """Whether ``path`` is a folder without content, as a process leaves that had just begun."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode) and not os.listdir(path)
    except OSError:
        return False


@contextmanager
def _begun(partial: Path, work: str) -> Iterator[Journal]:
    """The journal of the folder ``partial``, in which nothing of other work is left."""
    if os.path.lexists(partial) and not is_journal_of(partial, work):
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    with Journal(partial, work) as journal:
        yield journal


@contextmanager
def _explained(final: Path) -> Iterator[None]:
    """Errors of the system, and those that libraries make of them, as a StorageError."""
    try:
        yield
    except BioinitError:
        raise
    except OSError as error:
        raise _said_of(error, final) from error
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise _said_of(cause, final) from error


def _said_of(error: OSError, final: Path) -> StorageError:
    said = disk_error(error, f"write {final}")
    return StorageError(f"{said} Nothing was left there.")


def _system_error(error: Exception) -> OSError | None:
    """The error of the system that a library wrapped in its own, if it did."""
    text = str(error)
    found = _RUST_ERROR.search(text)
    if found:
        return OSError(int(found[1]), text)
    if any(words in text for words in _TORCH_FAILED):
        return OSError(f"{text.splitlines()[0]} (is the disk full?)")
    return None


def _hidden(final: Path, kind: str) -> Path:
    return final.parent / f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}.{kind}"


def require_free(
    path: str | Path,
    *,
    overwrite: bool = False,
    keep: Iterable[Path] = (),
    words: Words = _OF_INIT,
) -> Path:
    """The absolute ``path``, if a folder may be written there; nothing is changed.

    Asked before anything is loaded, and again by :func:`atomic_folder` when it writes.

    Args:
        path: where the folder will stand; ``~`` is a home directory.
        overwrite: whether a folder that is not empty may be replaced.
        keep: files and folders that are being read. What is written may not replace one of them.
        words: what ``path`` and ``overwrite`` are called.

    Raises:
        StorageError: something is there, or it would touch what is kept, or its parent cannot be
            made or written.
    """
    final = Path(os.path.abspath(os.path.expanduser(path)))
    try:
        taken = len(os.fsencode(_hidden(final, "partial").name))
        _require_apart(final, keep, words)
    except ValueError as error:  # a NUL byte, or half of a character
        raise StorageError(
            f"cannot write {str(final)!r}: a path cannot hold such characters. Choose another path."
        ) from error
    if taken > LONGEST_NAME:
        raise StorageError(
            f"cannot write {final}: its last part is {taken - LONGEST_NAME} bytes too long, since "
            "it is written under a longer, hidden name first. Choose a shorter name."
        )
    try:
        mode = os.lstat(final).st_mode
    except (FileNotFoundError, NotADirectoryError):
        _require_writable(final.parent)
        return final
    except OSError as error:
        raise disk_error(error, f"look at {final}") from error
    if not stat.S_ISDIR(mode):
        raise StorageError(
            f"cannot write the folder {final}: a file or a link of that name exists. Choose "
            "another path, or remove it."
        )
    try:
        held = sorted(os.listdir(final))
    except OSError as error:
        raise disk_error(error, f"look into {final}") from error
    if held and not overwrite:
        more = f" and {len(held) - _NAMES_SHOWN} more" if len(held) > _NAMES_SHOWN else ""
        raise StorageError(
            f"cannot write {final}: it is not empty, it holds "
            f"{', '.join(map(repr, held[:_NAMES_SHOWN]))}{more}. Choose another folder, or let all "
            f"of it be replaced with {words.replace}."
        )
    _require_writable(final.parent)
    return final


def _require_apart(final: Path, keep: Iterable[Path], words: Words) -> None:
    """Refuse to replace what is being read, and the folders that nobody means to replace."""
    real = Path(os.path.realpath(final))
    reasons = [(Path(os.path.realpath(kept)), f"the checkpoint {kept}") for kept in keep]
    reasons += [
        (Path(os.path.realpath(os.path.expanduser("~"))), "the home directory"),
        (Path.cwd(), "the current directory"),
    ]
    for place, what in reasons:
        if real == place or real in place.parents:
            raise StorageError(
                f"cannot write {final}: it {'is' if real == place else 'holds'} {what}. "
                f"Choose another {words.place}, which stands apart from it."
            )


def _require_writable(parent: Path) -> None:
    """Whether ``parent``, or what of it exists, takes a new folder."""
    nearest = parent
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        reason = OSError(errno.ENOTDIR, "")
        raise disk_error(reason, f"make the folder {parent}, since {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise disk_error(OSError(errno.EACCES, ""), f"write in {nearest}")


def _flush(folder: Path) -> None:
    """Wait until every file and folder below ``folder`` is on the disk, innermost first."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(os.path.join(where, name))
        _sync(where)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, final: Path, overwrite: bool, words: Words = _OF_INIT) -> None:
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise StorageError(
                f"cannot write {final}: something was written there in the meantime. Choose "
                f"another path, or allow it to be replaced with {words.replace}."
            ) from error
        require_free(final, overwrite=True, words=words)
        if exchange(partial, final):  # what was there is removed with the partial folder
            _sync(final.parent)
            return
        old = _hidden(final, "old")
        os.rename(final, old)
        try:
            os.rename(partial, final)
        except BaseException:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(final.parent)


def _recover(final: Path, is_alone: bool) -> None:
    """Put back, or remove, what processes that were killed left beside ``final``.

    Args:
        final: what will be written.
        is_alone: nobody else can be writing it; if False, that is judged by who still runs.
    """
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(\d+)\.[0-9a-f]{{8}}\.(partial|old)")
    try:
        names = os.listdir(final.parent)
    except OSError as error:
        raise disk_error(error, f"list {final.parent}") from error
    for name in sorted(names):
        found = pattern.fullmatch(name)
        if found is None or (not is_alone and _is_running(int(found[1]))):
            continue
        left = final.parent / name
        if found[2] == "old" and not os.path.lexists(final):
            os.rename(left, final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:
        said = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    # One that was killed is listed until its parent has asked; its name may hold brackets.
    return said.rpartition(")")[2].split()[0] not in ("Z", "X")
