"""A server of files, and what its answers mean."""

from __future__ import annotations

import http.client
import logging
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlsplit

from bioinit.errors import ConfigError, StorageError
from bioinit.version import __version__

_log = logging.getLogger(__name__)
LONGEST_WAIT = 30.0  # seconds
_WORTH_TRYING_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d{1,19}|\*)")
_LENGTH = re.compile(r"[0-9]{1,19}")


class Unreachable(StorageError, urllib.error.URLError):
    """A server does not give a file."""

    __str__ = Exception.__str__

    def __init__(self, message: str) -> None:
        StorageError.__init__(self, message)
        self.reason = message


@dataclass(frozen=True)
class Server:
    """Where files come from, and how patiently they are asked for."""

    base_url: str
    timeout: float
    retries: int
    opener: urllib.request.OpenerDirector = field(default_factory=lambda: _opener())
    is_silent: threading.Event = field(default_factory=threading.Event)
    """Set once it did not say how long a file is, for it is not asked so of each of hundreds."""

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

    def ask(self, name: str, headers: Mapping[str, str] = MappingProxyType({})) -> Any:
        """The answer to one request for a file.

        Raises:
            Unreachable: what comes would not be the bytes of the file.
            OSError: the server refuses, or the network does.
            http.client.HTTPException: what it says is not HTTP.
        """
        said = {"Accept-Encoding": "identity", "User-Agent": f"bioinit/{__version__}", **headers}
        request = urllib.request.Request(self.url(name), headers=said)
        answer = self.opener.open(request, timeout=self.timeout)
        packed = answer.headers.get("Content-Encoding", "identity")
        if packed != "identity":
            answer.close()
            raise Unreachable(
                f"cannot download {self.url(name)}: the server packs it ({packed[:40]!r}), though "
                "it was asked not to. Give another base_url."
            )
        return answer

    def length(self, name: str) -> int | None:
        """How many bytes a file has there; None if nobody says."""
        if self.is_silent.is_set():
            return None
        try:
            with self.ask(name, {"Range": "bytes=0-0"}) as answer:
                total = extent(answer.status, answer.headers)[1]
                why = "no length in its answer"
        except urllib.error.HTTPError as error:
            with error:
                total, why = 0 if error.code == 416 else None, f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            total, why = None, str(error) or repr(error)
        if total is None:
            self.is_silent.set()
            _log.warning(
                "%s does not say how long %s is (%s): what lies here without a sha256 is taken as "
                "it is",
                self.base_url,
                name,
                why,
            )
        return total


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


def extent(status: int, headers: Message) -> tuple[int, int | None]:
    """The first byte of what comes, and how many bytes the file has, if that is said."""
    if status == 206 and (found := _RANGE.fullmatch(headers.get("Content-Range", ""))):
        return int(found[1]), None if found[3] == "*" else int(found[3])
    if status == 206:
        return -1, None
    length = headers.get("Content-Length", "")
    return 0, int(length) if _LENGTH.fullmatch(length) else None


def validator(headers: Message) -> str | None:
    """What the server calls this version of the file, if that can tell it from every other."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def is_final(error: Exception) -> bool:
    """Whether asking again would bring the same answer."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code not in _WORTH_TRYING_AGAIN
    if isinstance(error, urllib.error.URLError):
        return isinstance(error.reason, ssl.SSLCertVerificationError)
    return isinstance(error, http.client.InvalidURL)


def is_of_the_network(error: Exception) -> bool:
    """Errors of the disk are OSErrors too, but these have a name or come from a socket."""
    kinds = (
        urllib.error.URLError,
        ConnectionError,
        TimeoutError,
        ssl.SSLError,
        http.client.HTTPException,
    )
    return isinstance(error, kinds)


def said_wait(error: Exception) -> float | None:
    """How long the server asks to be left alone."""
    if isinstance(error, urllib.error.HTTPError):
        said = error.headers.get("Retry-After", "")
        if said.isdecimal():
            return min(float(said), LONGEST_WAIT)
    return None
