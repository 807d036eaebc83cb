"""Files over HTTP: what was cut off goes on, and nothing but a whole file has its name.

A file arrives in ``.NAME.part`` beside its place and is renamed when every byte is there and the
digest fits. ``.NAME.part.json`` says of what it is the part, so that a later process goes on only
with the same thing: the server is asked for the rest on condition that it is still what it was
(``If-Range``), and where it cannot tell, the file is fetched from the start.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import queue
import re
import threading
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import Any

from bioinit.compat.labml import _server
from bioinit.compat.labml._server import Server, Unreachable, extent, is_final, is_of_the_network
from bioinit.errors import BioinitError, ConfigError, CorruptCheckpoint
from bioinit.storage import disk_error, run_workers
from bioinit.storage.lock import locked

DownloadProgress = Callable[[str, int, int | None], None]
"""Told of a file, how many bytes of it are here, and how many there are, if the server says so."""

_log = logging.getLogger(__name__)
_CHUNK = 2**20
_FIRST_WAIT = 0.5  # seconds
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def fetch(
    server: Server,
    names: Sequence[str],
    to: Path,
    digests: Mapping[str, str],
    parallel: int,
    progress: DownloadProgress | None,
) -> None:
    """Bring the files ``names`` into the folder ``to``; what is there and fits is left alone.

    Raises:
        StorageError: a server or the file system refused. What has arrived is kept for next time.
        CorruptCheckpoint: a digest does not fit.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    telling = threading.Lock()

    def tell(name: str, done: int, total: int | None) -> None:
        if progress is not None:
            with telling:
                progress(name, done, total)

    def work(stopped: threading.Event) -> None:
        while not stopped.is_set():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            _File(server, name, to / name, digests.get(name), tell, stopped).bring()

    run_workers(work, min(parallel, len(names)))


def read_digests(given: Mapping[str, str] | str | os.PathLike[str] | None) -> dict[str, str]:
    """SHA-256 by file name: a mapping, or a file as ``sha256sum`` writes it.

    Raises:
        ConfigError: a line or a value is no digest.
        StorageError: there is no such file.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        pairs = [(str(name), str(digest)) for name, digest in given.items()]
    else:
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise disk_error(error, f"read {given}") from error
        found = [(line, _SUM_LINE.fullmatch(line)) for line in lines if line.strip()]
        for line, match in found:
            if match is None:
                raise ConfigError(
                    f"{given} holds the line {line[:100]!r}, which is not '<sha256>  <file>'. "
                    "Write it with sha256sum."
                )
        pairs = [(match[2], match[1]) for _, match in found if match]
    for name, digest in pairs:
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(
                f"the sha256 of {name!r} is {digest[:80]!r}, which is not 64 hexadecimal digits. "
                "Give the digest that sha256sum prints."
            )
    return {name.removeprefix("./"): digest.lower() for name, digest in pairs}


class _File:
    """One file on its way."""

    def __init__(
        self,
        server: Server,
        name: str,
        place: Path,
        digest: str | None,
        tell: DownloadProgress,
        stopped: threading.Event,
    ) -> None:
        self.server = server
        self.url = server.url(name)
        self.name = name
        self.place = place
        self.digest = digest
        self.tell = tell
        self.stopped = stopped
        self.part = place.parent / f".{place.name}.part"
        self.note = place.parent / f".{place.name}.part.json"

    def bring(self) -> None:
        """Have the whole file at its place."""
        try:
            before = self._stamp()
            if self._is_here():
                return
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.place):
                if self._stamp() != before and self._is_here():  # another process was faster
                    return
                if not self._arrives():
                    return
                self._keep()
        except OSError as error:
            if isinstance(error, BioinitError):
                raise
            raise disk_error(error, f"write {self.place}") from error

    def _stamp(self) -> tuple[int, int, int] | None:
        """What differs when somebody else has put a file here."""
        if not self.place.is_file():
            return None
        found = self.place.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _is_here(self) -> bool:
        """Whether the place has the whole file; without a digest, the server says how long it is.

        What this made is whole, but labml leaves half files in the very same folder.
        """
        if not self.place.is_file():
            return False
        size = self.place.stat().st_size
        if self.digest is not None:
            if _digest(self.place) != self.digest:
                _log.warning(
                    "%s is not the file with the sha256 %s: fetching it", self.place, self.digest
                )
                return False
        else:
            total = self.server.length(self.name)
            if total not in (None, size):
                _log.warning(
                    "%s has %d bytes, and %d on the server: fetching it", self.place, size, total
                )
                return False
        self.tell(self.name, size, size)
        return True

    def _arrives(self) -> bool:
        """Whether all bytes are in the part; False if this was stopped."""
        tries, most = 0, self._have()
        while not self.stopped.is_set():
            try:
                return self._ask()
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, BioinitError) or not is_of_the_network(error):
                    raise
                # A line that breaks again and again still brings the file, if it brings some of it.
                have = self._have()
                tries, most = (1, have) if have > most else (tries + 1, most)
                if tries > self.server.retries or is_final(error):
                    raise self._refused(error) from error
                longer = min(_server.LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1))
                wait = _server.said_wait(error) or longer
                _log.info("%s: %s; asking again in %.1f s", self.url, error, wait)
                self.stopped.wait(wait)
        return False

    def _ask(self) -> bool:
        """Ask for what is missing, once."""
        have, said = self._begun()
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if known := said.get("validator"):
                headers["If-Range"] = known
        try:
            answer = self.server.ask(self.name, headers)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 416 or not have:
                    raise
            if have == said.get("total"):
                return True
            self._forget()  # the next try is from the start
            raise http.client.IncompleteRead(b"") from error
        with answer:
            first, total = extent(answer.status, answer.headers)
            known, now = said.get("validator"), _server.validator(answer.headers)
            is_another = total != said.get("total", total) or (known and now and known != now)
            if first not in (0, have) or (first and is_another):
                self._forget()
                raise http.client.IncompleteRead(b"")
            is_whole = answer.chunked and answer.status != 206
            if total is None and not is_whole and self.digest is None:
                raise Unreachable(
                    f"cannot download {self.url}: the server does not say how long it is, so "
                    "nobody can tell whether all of it came. Give its sha256."
                )
            if not first:  # before the note says that what is here is a part of this
                self.part.unlink(missing_ok=True)
            self._write_note(total, answer.headers)
            return self._take(answer, first, total)

    def _take(self, answer: Any, first: int, total: int | None) -> bool:
        done = first
        with open(self.part, "r+b" if first else "wb") as stream:
            stream.seek(first)
            stream.truncate()
            while chunk := answer.read1(_CHUNK):
                if self.stopped.is_set():
                    return False
                stream.write(chunk)
                done += len(chunk)
                self.tell(self.name, done, total)
        if total is not None and done < total:
            raise http.client.IncompleteRead(b"", total - done)
        if total is not None and done > total:
            self._forget()
            raise CorruptCheckpoint(
                f"{self.url} was to have {total} bytes, and {done} came. Try again, or "
                "another host."
            )
        self.tell(self.name, done, done)
        return True

    def _keep(self) -> None:
        """Give the whole part its name."""
        if self.digest is not None:
            found = _digest(self.part)
            if found != self.digest:
                self._forget()
                raise CorruptCheckpoint(
                    f"{self.url} has the sha256 {found}, and {self.digest} was expected. What came "
                    "was removed. Try again, try another host, or correct the list of digests."
                )
        with open(self.part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(self.part, self.place)
        self.note.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _begun(self) -> tuple[int, dict[str, Any]]:
        """How much of the file may be gone on from, and what was said of it."""
        have = self._have()
        try:
            said = json.loads(self.note.read_bytes())
        except (OSError, ValueError):
            said = None
        # Without the server's word, only a digest at the end can tell whether the parts fit.
        is_known = isinstance(said, dict) and said.get("url") == self.url
        if have and is_known and (said.get("validator") or self.digest is not None):
            return have, said
        self._forget()
        return 0, {}

    def _write_note(self, total: int | None, headers: Message) -> None:
        validator = _server.validator(headers)
        note = {"url": self.url, "total": total, "validator": validator}
        self.note.write_text(json.dumps(note), encoding="utf-8")

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _refused(self, error: Exception) -> Unreachable:
        said = str(error) or repr(error)
        if isinstance(error, urllib.error.HTTPError):
            said = f"HTTP {error.code} {error.reason}"
        cure = (
            "Check the URL and the name of the file."
            if is_final(error)
            else "What has arrived is kept: try again later, or give another base_url."
        )
        return Unreachable(f"cannot download {self.url}: {said}. {cure}")


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
