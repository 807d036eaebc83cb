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
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from bioinit.errors import BioinitError, ConfigError, CorruptCheckpoint, StorageError
from bioinit.storage import disk_error, run_workers
from bioinit.storage.lock import locked
from bioinit.version import __version__

DownloadProgress = Callable[[str, int, int | None], None]
"""Told of a file, how many bytes of it are here, and how many there are, if the server says so."""

_log = logging.getLogger(__name__)
_CHUNK = 2**20
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_WORTH_TRYING_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_SUM_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Unreachable(StorageError, urllib.error.URLError):
    """A server does not give a file."""

    __str__ = Exception.__str__

    def __init__(self, message: str) -> None:
        StorageError.__init__(self, message)
        self.reason = message


@dataclass(frozen=True)
class Source:
    """Where files come from, and how patiently they are asked for."""

    base_url: str
    timeout: float
    retries: int
    opener: urllib.request.OpenerDirector = field(default_factory=lambda: _opener())

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"cannot download from {self.base_url!r}: a URL should begin with http:// or "
                "https:// and name a host. Give the URL of the folder that holds the files."
            )
        if self.timeout <= 0 or self.retries < 0:
            raise ConfigError(
                f"cannot wait for {self.timeout} s and try again {self.retries} times. Give a "
                "timeout above 0, and 0 or more retries."
            )

    def url(self, name: str) -> str:
        return f"{self.base_url.rstrip('/')}/{quote(name)}"


def fetch(
    source: Source,
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
            _File(source, name, to / name, digests.get(name), tell, stopped).bring()

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
        source: Source,
        name: str,
        place: Path,
        digest: str | None,
        tell: DownloadProgress,
        stopped: threading.Event,
    ) -> None:
        self.source = source
        self.url = source.url(name)
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
            if self._is_here():
                return
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.place):
                if self._is_here():  # another process was faster
                    return
                if not self._arrives():
                    return
                self._keep()
        except OSError as error:
            if isinstance(error, BioinitError):
                raise
            raise disk_error(error, f"write {self.place}") from error

    def _is_here(self) -> bool:
        if not self.place.is_file():
            return False
        size = self.place.stat().st_size
        if self.digest is not None and _digest(self.place) != self.digest:
            _log.warning(
                "%s is not the file with the sha256 %s: fetching it", self.place, self.digest
            )
            return False
        self.tell(self.name, size, size)
        return True

    def _arrives(self) -> bool:
        """Whether all bytes are in the part; False if this was stopped."""
        tries = 0
        while not self.stopped.is_set():
            before = self._have()
            try:
                return self._ask()
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, BioinitError) or not _is_of_the_network(error):
                    raise
                # A line that breaks again and again still brings the file, if it brings some of it.
                tries = 1 if self._have() > before else tries + 1
                if tries > self.source.retries or _is_final(error):
                    raise self._refused(error) from error
                wait = _said_wait(error) or min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1))
                _log.info("%s: %s; asking again in %.1f s", self.url, error, wait)
                self.stopped.wait(wait)
        return False

    def _ask(self) -> bool:
        """Ask for what is missing, once."""
        have, said = self._begun()
        headers = {"Accept-Encoding": "identity", "User-Agent": f"bioinit/{__version__}"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator := said.get("validator"):
                headers["If-Range"] = validator
        request = urllib.request.Request(self.url, headers=headers)
        try:
            answer = self.source.opener.open(request, timeout=self.source.timeout)
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 416 or not have:
                    raise
            if have == said.get("total"):
                return True
            self._forget()  # the next try is from the start
            raise http.client.IncompleteRead(b"") from error
        with answer:
            first, total = _extent(answer.status, answer.headers)
            if first not in (0, have) or (first and total != said.get("total", total)):
                self._forget()
                raise http.client.IncompleteRead(b"")
            if total is None and not answer.chunked and self.digest is None:
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
        etag = headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
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
            if _is_final(error)
            else "What has arrived is kept: try again later, or give another base_url."
        )
        return Unreachable(f"cannot download {self.url}: {said}. {cure}")


def _opener() -> urllib.request.OpenerDirector:
    """An opener for HTTP alone: a redirect leads to no file of this machine, and to no FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _extent(status: int, headers: Message) -> tuple[int, int | None]:
    """The first byte of what comes, and how many bytes the file has, if that is said."""
    if status == 206 and (found := _RANGE.fullmatch(headers.get("Content-Range", ""))):
        return int(found[1]), None if found[3] == "*" else int(found[3])
    if status == 206:
        return -1, None
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_final(error: Exception) -> bool:
    """Whether asking again would bring the same answer."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code not in _WORTH_TRYING_AGAIN
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    return isinstance(error, http.client.InvalidURL)


def _is_of_the_network(error: Exception) -> bool:
    """Errors of the disk are OSErrors too, but these have a name or come from a socket."""
    kinds = (
        urllib.error.URLError,
        ConnectionError,
        TimeoutError,
        ssl.SSLError,
        http.client.HTTPException,
    )
    return isinstance(error, kinds)


def _said_wait(error: Exception) -> float | None:
    """How long the server asks to be left alone."""
    if isinstance(error, urllib.error.HTTPError):
        said = error.headers.get("Retry-After", "")
        if said.isdecimal():
            return min(float(said), _LONGEST_WAIT)
    return None
