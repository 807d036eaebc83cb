"""Signs of life: a thread of each rank that shows its own, and hears who failed.

Every rank counts up a key of its own in the store. Rank 0 watches all of them and the others watch
rank 0. Who fails writes down why and rings a bell; rank 0 reads what there is, waits a moment for
others that fail at the same time, and writes the *verdict*: the one failure that every rank raises.
Where rank 0 or the store itself is gone, each rank comes to that verdict by itself.

A second thread, which never speaks to the store, sees to it that the rank ends: a main thread that
does not come out by itself after a verdict is interrupted, and if that does not help either (it
waits in a collective), the process ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from typing import NamedTuple

from bioinit.ranks.failure import ECHO, NOBODY, Failure
from bioinit.ranks.store import Store


class Pace(NamedTuple):
    """Seconds. Detecting a silent death takes ``lost`` and two ticks; ending, ``grace`` more."""

    tick: float = 1.0
    """Between two signs of life."""
    settle: float = 0.4
    """For others that fail at the same time, before one of them is named."""
    lost: float = 12.0
    """Without a sign of life, while others show theirs."""
    join: float = 600.0
    """Until every rank has come."""
    again: float = 120.0
    """Until every rank has come, where they have met before."""
    heard: float = 5.0
    """That a rank which leaves gives the others to hear the last word."""
    interrupt: float = 2.0
    """From the verdict to the interrupt of a main thread that is still at work."""
    grace: float = 10.0
    """From the verdict to the end of a process whose main thread did not come out."""
    tidying: float = 25.0
    """The same, where an error is on its way out and files may be removed for it; from the death
    of a rank that says nothing."""

    def of(self, size: int) -> Pace:
        """The store of 4096 ranks need not answer each of them every second."""
        return self._replace(tick=max(self.tick, min(4.0, size / 1024)))


PACE = Pace()


class Watch:
    """What one rank knows of the others' failures."""

    def __init__(self, store: Store, rank: int, size: int, pace: Pace) -> None:
        self.rank, self.size, self.pace = rank, size, pace
        self.verdict: Failure | None = None
        self.is_common = False
        """Whether the verdict is rank 0's, which all others hear too, and not this rank's own."""
        self.raised: list[BaseException] = []
        """The errors that were raised here for the verdict."""
        self.interrupted = False
        self._store = _own_connection(store)
        self._ended = threading.Event()
        self._leaving = threading.Lock()
        self._is_out = False
        self._owner = threading.current_thread()
        self._silence = self._since = 0.0
        self._beats = 0
        self._started = time.monotonic()
        self._threads = [
            threading.Thread(target=self._watch, name="bioinit-ranks", daemon=True),
            threading.Thread(target=self._guard, name="bioinit-guard", daemon=True),
        ]

    def start(self) -> None:
        self._beat()
        for thread in self._threads:
            thread.start()

    def come_out(self) -> None:
        """The main thread is on its way out: it need not be interrupted any more."""
        try:
            with self._leaving:
                self._is_out = True
                self._since = 0.0
            if self.interrupted:
                time.sleep(0.05)  # an interrupt that is on its way arrives here
        except KeyboardInterrupt:
            if not self.interrupted:
                raise

    def stop(self) -> None:
        """End the threads."""
        self._ended.set()
        for thread in self._threads:
            thread.join(self.pace.heard)

    def check(self) -> None:
        """Raise for the verdict, if there is one."""
        if self.verdict is not None:
            error = self.verdict.error()
            self.raised.append(error)
            raise error

    def lost_store(self, error: Exception) -> None:
        """Conclude that the store is gone, unless more is known."""
        if self.verdict is None:
            self.verdict = Failure(
                NOBODY,
                "BioinitError",
                f"the store at which the ranks met ({_address()}) does not answer: "
                f"{str(error).splitlines()[0]} The process that held it (rank 0, or its launcher) "
                "has ended, or the network to it has; look for what is reported there.",
            )

    # -- the thread that speaks to the store

    def _watch(self) -> None:
        judge = _Judge(self) if self.rank == 0 else None
        last, silent, before = b"", 0.0, time.monotonic()
        while not self._ended.wait(self.pace.tick):
            # A process that was stopped for a while has not seen the others be silent.
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.pace.tick), now
            try:
                self._beat()
                if judge is not None:
                    judge.look(passed)
                elif self._store.check(["verdict"]):
                    self.hear(Failure.from_json(self._store.get("verdict")))
                elif self._store.check(["beat/0"]):
                    shown = self._store.get("beat/0")
                    silent, last = (0.0 if shown != last else silent + passed), shown
                    if silent > self.pace.lost:
                        self.verdict = _lost((0,), silent)
                elif now - self._started > self.pace.join:
                    self.verdict = absent((0,), self.pace.join)
            except RuntimeError as error:
                if not self._ended.is_set():
                    self.lost_store(error)
            if self.verdict is not None:
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self.rank}", str(self._beats).encode())
        self._silence = 0.0

    def hear(self, verdict: Failure) -> None:
        """Take the verdict, and let the others know that this rank has."""
        self.is_common = True
        self.verdict = verdict
        if self._store.add("heard", 1) >= self.size - len(verdict.gone):
            self._store.set("all heard", b"1")

    # -- the thread that does not

    def _guard(self) -> None:
        step = 0.25
        while not self._ended.wait(step):
            if self.verdict is None:
                self._silence += step
                if self._silence > self.pace.lost + self.pace.tick:
                    self.lost_store(TimeoutError(f"no answer for {self._silence:.0f} s."))
                continue
            with self._leaving:
                self._since += step
                is_busy = not (self._is_out or self.interrupted or self.raised)
                if is_busy and self._since > self.pace.interrupt:
                    self.interrupted = True
                    self._interrupt()
                if self._since > self._patience():
                    self._end()

    def _patience(self) -> float:
        """How long the main thread has, the time of noticing a silent death taken off."""
        handled = sys._current_exceptions().get(self._owner.ident or 0)
        # Up to Python 3.11 it is what sys.exc_info() gives there.
        if not self.raised and handled in (None, (None, None, None)):
            return self.pace.grace
        noticing = self.pace.lost if self.verdict is not None and self.verdict.gone else 0.0
        return max(self.pace.grace, self.pace.tidying - noticing)

    def _interrupt(self) -> None:
        # Not by SIGINT: a shell has a process that it starts in the background ignore it.
        owner = ctypes.c_ulong(self._owner.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(owner, ctypes.py_object(KeyboardInterrupt))

    def _end(self) -> None:
        """The last resort: the main thread is where no exception reaches it."""
        assert self.verdict is not None
        seconds = self._since
        frame = sys._current_frames().get(self._owner.ident or 0)
        where = "".join(traceback.format_stack(frame)[-3:]) if frame is not None else ""
        said = (
            f"error: {self.verdict.error()}\n"
            f"Rank {self.rank} was still at work {seconds:.0f} s later, and ends here:\n"
            f"{where}"
        )
        os.write(2, said.encode(errors="replace"))
        os._exit(self.verdict.exit_code)


class _Judge:
    """Rank 0's part of watching: all signs of life, and the verdict."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._store = watch._store
        self._unseen = set(range(1, watch.size))
        self._seen: list[int] = []
        self._last: dict[int, bytes] = {}
        self._silent: dict[int, float] = {}
        self._read = 0
        self._failures: list[Failure] = []
        self._echoing = 0.0

    def look(self, passed: float) -> None:
        lost = self._missing(passed)
        verdict = self._failed(passed, lost) or lost
        if verdict is not None:
            self._store.set("verdict", verdict.to_json())
            self._watch.hear(verdict)

    def _failed(self, passed: float, lost: Failure | None) -> Failure | None:
        self._gather()
        if not self._failures:
            return None
        if all(each.weight == ECHO for each in self._failures):
            # Whoever caused it either says so, or is dead and will be missed.
            self._echoing += passed
            if lost is not None or self._echoing < self._watch.pace.lost + 3 * passed:
                return None
        else:
            time.sleep(self._watch.pace.settle)
            self._gather()
        return min(self._failures, key=lambda each: (each.weight, each.rank))

    def _gather(self) -> None:
        for number in range(self._read + 1, self._store.add("failures", 0) + 1):
            if not self._store.check([f"failed/{number}"]):
                break
            self._failures.append(Failure.from_json(self._store.get(f"failed/{number}")))
            self._read = number

    def _missing(self, passed: float) -> Failure | None:
        pace = self._watch.pace
        if self._unseen:
            come = {rank for rank in self._unseen if self._store.check([f"beat/{rank}"])}
            self._unseen -= come
            self._seen = sorted((*self._seen, *come))
            if self._unseen and time.monotonic() - self._watch._started > pace.join:
                return absent(tuple(sorted(self._unseen)), pace.join)
        for rank, shown in zip(self._seen, self._shown(), strict=True):
            is_new = self._last.get(rank) != shown
            self._silent[rank] = 0.0 if is_new else self._silent[rank] + passed
            self._last[rank] = shown
        gone = tuple(rank for rank in self._seen if self._silent[rank] > pace.lost)
        return _lost(gone, pace.lost) if gone else None

    def _shown(self) -> list[bytes]:
        keys = [f"beat/{rank}" for rank in self._seen]
        if keys and self._store.has_extended_api():
            return list(self._store.multi_get(keys))
        return [self._store.get(key) for key in keys]


def _lost(ranks: tuple[int, ...], seconds: float) -> Failure:
    others = f" Nor did {named(ranks[1:])}." if len(ranks) > 1 else ""
    return Failure(
        ranks[0],
        "BioinitError",
        f"gave no sign of life for {seconds:.0f} s.{others} The process was killed (out of "
        "memory?), or its machine is gone; look for what the launcher says of it.",
        gone=ranks,
    )


def absent(ranks: tuple[int, ...], seconds: float) -> Failure:
    """The verdict on ranks that never came."""
    return Failure(
        NOBODY,
        "ConfigError",
        f"{named(ranks)} did not come within {seconds:.0f} s. All ranks have to make the same "
        "calls of bioinit (initialize, load_weights, save) in the same order; look for one that "
        "only some make (`if rank == 0:`), and whether the others are still alive.",
        exit_code=2,
        gone=ranks,
    )


def named(ranks: tuple[int, ...], most: int = 8, count: int = 0) -> str:
    """``rank 3``, or ``ranks 3, 4 and 5``; many of them as a few and how many more.

    ``count`` is how many there are, where ``ranks`` are the first of them alone.
    """
    count = max(count, len(ranks))
    if count == 1:
        return f"rank {ranks[0]}"
    words = [str(rank) for rank in ranks[:most]]
    if count > len(words):
        words.append(f"{count - len(words)} more")
    return f"ranks {', '.join(words[:-1])} and {words[-1]}"


def _own_connection(store: Store) -> Store:
    """A wait of another thread must not keep this one from being heard."""
    try:
        return store.clone()
    except RuntimeError:  # a kind of store that cannot
        return store


def _address() -> str:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return f"{host}:{port}" if host and port else "torch.distributed's"
