"""Speaking through the store: bytes sent, awaited and passed on, while somebody watches.

No wait here ends by itself: it lasts as long as everybody is alive, and ends at once when the watch
has a verdict. The store is asked again and again instead of being waited for, because its own waits
write warnings when they time out, and do not hear Ctrl-C.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from bioinit.errors import ConfigError
from bioinit.ranks.failure import ECHO, Failure
from bioinit.ranks.store import Store
from bioinit.ranks.watch import Pace, Watch

T = TypeVar("T")

PART_BYTES = 4 * 2**20
"""A TCPStore refuses values of more than 8 MiB; what is longer is sent in parts."""


class Line:
    """One rank's connection to the others, for one block of work together."""

    def __init__(self, store: Store, rank: int, size: int, pace: Pace) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._pace = pace.of(size)
        self._slowest = min(0.5, max(0.02, size / 20_000))
        self._watch = Watch(store, rank, size, self._pace)
        self._turn = 0
        self.hosts: tuple[str, ...] = ()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Be there for the others inside; leave together with them, or with the error of one."""
        with self._reaching():
            self._watch.start()
        try:
            try:
                yield
                self.united(None, _neither, "the end")
            except BaseException as error:
                self._fail(error)
                raise
        finally:
            self._watch.stop()
        # All are through. That the store ends with the process that held it harms nobody now.
        with suppress(RuntimeError):
            self._part()

    @property
    def verdict(self) -> Failure | None:
        """What ended the work of all, where something did."""
        return self._watch.verdict

    def check(self) -> None:
        self._watch.check()

    def united(self, mine: T, merge: Callable[[T, T], T], label: str) -> T:
        """Reduce along a binary tree of ranks to rank 0, which publishes the result.

        Args:
            mine: what this rank gives.
            merge: makes one of two.
            label: what this turn is for. All turns are alike but for it, so ranks that are not at
                the same one find out, and do not wait for each other.

        Raises:
            ConfigError: another rank is at something else.
        """
        self._turn += 1
        step = 1
        while step < self.size:
            if self.rank & step:
                self._send(f"up/{self._turn}/{self.rank}", [label, mine])
                break
            other = self.rank + step
            if other < self.size:
                theirs, given = self._take(f"up/{self._turn}/{other}")
                if theirs != label:
                    raise ConfigError(
                        f"rank {other} came to {theirs!r} when rank {self.rank} came to {label!r}: "
                        f"turn {self._turn} of what they do together. All ranks have to make the "
                        "same calls of bioinit in the same order; look for one that only some of "
                        "them make (`if rank == 0:`)."
                    )
                mine = merge(mine, given)
            step *= 2
        # All have read the result of the last turn: they have sent something since.
        if self.rank == 0:
            self._forget(f"down/{self._turn - 1}")
            self._send(f"down/{self._turn}", mine)
        united: T = self._read(f"down/{self._turn}")
        return united

    # -- values

    def _send(self, key: str, value: Any) -> None:
        held = zlib.compress(json.dumps(value).encode(), 1)
        count = max(1, -(-len(held) // PART_BYTES))
        with self._reaching():
            for number in range(1, count):
                part = held[number * PART_BYTES : (number + 1) * PART_BYTES]
                self._store.set(f"{key}/{number}", part)
            self._store.set(key, b"%d:" % count + held[:PART_BYTES])

    def _read(self, key: str) -> Any:
        self._await(key)
        with self._reaching():
            count, _, held = bytes(self._store.get(key)).partition(b":")
            parts = [bytes(self._store.get(f"{key}/{n}")) for n in range(1, int(count))]
        return json.loads(zlib.decompress(b"".join((held, *parts))))

    def _take(self, key: str) -> Any:
        value = self._read(key)
        self._forget(key)
        return value

    def _forget(self, key: str) -> None:
        with self._reaching():
            self._delete(key)

    def _delete(self, key: str) -> None:
        number = 1
        while self._store.delete_key(f"{key}/{number}"):
            number += 1
        self._store.delete_key(key)

    def _await(self, key: str) -> None:
        pause = 0.0005
        while True:
            self._watch.check()
            with self._reaching():
                if self._store.check([key]):
                    return
            time.sleep(pause)
            pause = min(self._slowest, pause * 1.5)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._watch.lost_store(error)
            self._watch.check()

    # -- the end

    def _part(self) -> None:
        """Rank 0, whose process may hold the store, is the last to leave it, and tidies up."""
        gone = self._store.add("gone", 1)
        end = time.monotonic() + self._pace.heard
        while not self.rank and gone < self.size and time.monotonic() < end:
            time.sleep(0.001)
            gone = self._store.add("gone", 0)
        if not self.rank and gone == self.size:
            self._delete(f"down/{self._turn}")
            beats = (f"beat/{rank}" for rank in range(self.size))
            for key in (*beats, "gone", "failures"):
                self._store.delete_key(key)

    def _fail(self, error: BaseException) -> None:
        """Tell the others, and see to it that all of them raise the same.

        Raises:
            BioinitError: what another rank raised, where ``error`` only comes of that.
        """
        watch = self._watch
        watch.come_out()
        if _comes_of(error, lambda each: each in watch.raised):
            self._linger()
            return
        is_ours = watch.interrupted and _comes_of(error, _is_interrupt)
        failure = Failure.of(self.rank, error)
        if not is_ours:
            self._tell(failure)
            patience = self._pace.heard + 2 * self._pace.tick
            if failure.weight == ECHO:
                patience += self._pace.lost + 3 * self._pace.tick
            end = time.monotonic() + patience
            while watch.verdict is None and time.monotonic() < end:
                time.sleep(0.01)
        self._linger()
        if is_ours or failure.weight == ECHO:
            if watch.verdict is not None and watch.verdict.rank != self.rank:
                raise watch.verdict.error() from error

    def _tell(self, failure: Failure) -> None:
        try:
            number = self._store.add("failures", 1)
            self._store.set(f"failed/{number}", failure.to_json())
        except RuntimeError as error:
            self._watch.lost_store(error)

    def _linger(self) -> None:
        """Stay until the others have heard, for this process may hold the store."""
        end = time.monotonic() + self._pace.heard
        try:
            while self._watch.is_common and time.monotonic() < end:
                if self._store.check(["all heard"]):
                    return
                time.sleep(0.01)
        except RuntimeError as error:
            self._watch.lost_store(error)


def _comes_of(error: BaseException | None, is_cause: Callable[[BaseException], bool]) -> bool:
    """Whether ``error`` is a cause, or was raised because of one."""
    while error is not None:
        if is_cause(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _neither(low: None, high: None) -> None:
    """What two ranks that give nothing make."""


def _is_interrupt(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)
