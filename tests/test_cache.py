"""What was made once: by one of many, whole or not there, and known by what it was made of."""

import errno
import json
import mmap
import os
import random
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bioinit import cache
from bioinit.cache import content, marker, shelf, use
from bioinit.cli import main
from bioinit.errors import CorruptCheckpoint, StorageError
from bioinit.save import verify
from bioinit.storage import MADE_OF, Journal
from tests.forks import calls_of, ended, killed_after, started

RULES = {"content": "1", "rules": "2"}
PARTS = {f"part-{number}": bytes([number]) * 3000 for number in range(4)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; what earlier tests used is let go."""
    monkeypatch.setenv(cache.HOME, str(tmp_path / "home"))
    for path in list(use._held):
        use.end(path)
    return tmp_path / "home"


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    for name, data in PARTS.items():
        (folder / "inner" / name).write_bytes(data)


def in_steps(folder: Path, journal: Journal) -> dict[str, str]:
    for name, data in PARTS.items():
        if name not in journal.notes:
            (folder / name).write_bytes(data)
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
            journal.note(name, len(data))
    return {}


def refuse(*given: object) -> None:
    raise AssertionError("it was made already")


def holds_only_what_is_whole() -> bool:
    """Whether everything that stands under a final name is what was made, byte by byte."""
    looks_finished = [kept for kept in cache.entries() if kept.path.name == kept.key]
    return all(kept.state == "whole" and not cache.verify(kept) for kept in looks_finished)


# Made once


def test_what_was_made_is_found_by_what_it_was_made_of_and_by_nothing_else(home: Path):
    first = cache.keep(None, RULES, fill)
    assert first.parent == home / "made" and (first / "inner/part-3").read_bytes() == b"\3" * 3000
    assert cache.keep(None, dict(reversed(RULES.items())), refuse) == first == cache.find(RULES)
    assert cache.find({**RULES, "rules": "3"}) is None
    assert cache.keep(None, {**RULES, "rules": "3"}, fill) != first


def test_it_lies_in_the_home_directory_unless_the_variable_says_another(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(cache.HOME)
    assert cache.home() == Path.home() / ".cache/bioinit"


def test_what_fails_leaves_nothing_and_is_tried_again(home: Path):
    def fails(folder: Path) -> None:
        fill(folder)
        raise KeyError("no such tensor")

    with pytest.raises(KeyError):
        cache.keep(None, RULES, fails)
    assert os.listdir(home / "made") == []
    assert cache.keep(None, RULES, fill).is_dir()


def test_a_place_of_ones_own_is_not_replaced_by_something_else_unasked(tmp_path: Path):
    place = tmp_path / "mine"
    assert cache.keep(place, RULES, fill) == cache.keep(place, RULES, refuse) == place
    other = {**RULES, "content": "2"}
    with pytest.raises(StorageError, match=r"mine: it is not empty"):
        cache.keep(place, other, fill)
    cache.keep(place, other, lambda folder: (folder / "new").touch(), overwrite=True)
    assert sorted(os.listdir(place)) == [MADE_OF, "new"]
    assert os.listdir(tmp_path) == ["mine"]


NONSENSE = {
    "no text": b"\xff",
    "a list": b'{"made_of": {}, "about": {}, "files": [], "made": 0}',
    "a number": b'{"made_of": {}, "about": {}, "files": 3, "made": 0}',
    "endless": b'{"made_of": {}, "about": {}, "files": {"x": [Infinity, "a"]}, "made": 0}',
    "never": b'{"made_of": {}, "about": {}, "files": {}, "made": NaN}',
    "long ago": b'{"made_of": {}, "about": {}, "files": {}, "made": 1%s}' % (b"0" * 400),
    "NUL": b'{"made_of": {}, "about": {}, "files": {"x\\u0000y": [1, "a"]}, "made": 0}',
    "half": b'{"made_of": {}, "about": {}, "files": {"\\ud800": [1, "a"]}, "made": 0}',
    "elsewhere": b'{"made_of": {}, "about": {}, "files": {"/etc/passwd": [1, "a"]}, "made": 0}',
}


def test_a_marker_that_is_nonsense_says_nothing_and_harms_no_verb():
    folder = cache.keep(None, RULES, fill)
    for text in NONSENSE.values():
        (folder / MADE_OF).write_bytes(text)
        [entry] = cache.entries()
        assert (entry.state, entry.about) == ("damaged", {}), text
        assert cache.verify(entry) == ["it says of no file what it should hold"]


@pytest.mark.parametrize("harm", ["cut", "removed", "unmarked", "nonsense"])
def test_what_is_not_whole_any_more_is_made_again(harm: str):
    folder = cache.keep(None, RULES, fill)
    if harm == "cut":
        os.truncate(folder / "inner/part-1", 10)
    elif harm == "removed":
        (folder / "inner/part-1").unlink()
    elif harm == "unmarked":
        (folder / MADE_OF).unlink()
    else:
        (folder / MADE_OF).write_text('{"made_of": {"content": "1", "rules": "2"}, "files": 3}')
    assert cache.find(RULES) is None
    assert cache.keep(None, RULES, fill) == folder and holds_only_what_is_whole()
    assert (folder / "inner/part-1").read_bytes() == PARTS["part-1"]


def test_the_marker_is_no_change_of_what_a_receipt_lists(tmp_path: Path):
    def with_receipt(folder: Path) -> None:
        (folder / "receipt.json").write_text('{"files": []}')

    assert verify(cache.keep(tmp_path / "place", RULES, with_receipt)) == []


# Many at once


def test_eight_processes_at_once_make_it_once(tmp_path: Path):
    def slowly(folder: Path) -> None:
        with open(tmp_path / "made", "a") as file:
            file.write("once\n")
        time.sleep(0.3)
        fill(folder)

    def one() -> Path:
        return cache.keep(None, RULES, slowly)

    processes = [started(one, tmp_path / str(number)) for number in range(8)]
    assert [ended(process) for process in processes] == [0] * 8
    assert (tmp_path / "made").read_text() == "once\n"
    assert len({(tmp_path / str(number)).read_text() for number in range(8)}) == 1


def test_who_waits_says_so_once_and_can_be_interrupted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def stay(folder: Path) -> None:
        (tmp_path / "begun").touch()
        time.sleep(30)

    process = started(lambda: cache.keep(None, RULES, stay))
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    asked = []

    def waiting() -> None:
        asked.append(len(asked))
        if len(asked) == 4:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            cache.keep(None, RULES, refuse, waiting=waiting)
        [said] = [record.getMessage() for record in caplog.records]
        assert "another process is making" in said and cache.key_of(RULES) in said
    finally:
        os.kill(process, 9)
        ended(process)
    # The lock of who was killed is free at once.
    assert cache.keep(None, RULES, fill).is_dir()


# Kill, full disk


@pytest.mark.parametrize("keep", [cache.keep, cache.keep_in_steps])
def test_a_kill_at_any_point_leaves_nothing_that_looks_finished(
    keep: Callable[..., Path], home: Path
):
    make = fill if keep is cache.keep else in_steps

    def work() -> Path:
        return keep(None, RULES, make)

    total = calls_of(work)
    assert total > 100 and holds_only_what_is_whole()
    rng = random.Random(7)
    unfinished = 0
    for number in range(10):
        if number % 2 == 0:  # the others go on with what the last one left
            shutil.rmtree(home)
        code = ended(started(killed_after(rng.randrange(total), work)))
        assert code in (-9, 0) and holds_only_what_is_whole()
        unfinished += any(kept.state == "unfinished" for kept in cache.entries())
    assert unfinished > 1
    folder = keep(None, RULES, make)
    assert holds_only_what_is_whole() and cache.keep(None, RULES, refuse) == folder
    cache.prune()
    left = {name for name in os.listdir(home / "made") if not name.endswith(".use")}
    assert left == {folder.name}


def test_what_a_killed_process_had_made_is_not_made_again():
    def dies(folder: Path, journal: Journal) -> dict[str, str]:
        in_steps(folder, journal)
        os.kill(os.getpid(), 9)
        raise AssertionError

    assert ended(started(lambda: cache.keep_in_steps(None, RULES, dies))) == -9
    [left] = cache.entries()
    assert (left.state, left.in_use) == ("unfinished", False) and cache.find(RULES) is None
    notes = []

    def goes_on(folder: Path, journal: Journal) -> dict[str, str]:
        notes.extend(journal.notes)
        return in_steps(folder, journal)

    folder = cache.keep_in_steps(None, RULES, goes_on)
    assert notes == [*PARTS] and (folder / "part-2").read_bytes() == PARTS["part-2"]
    assert not (folder / Journal.NAME).exists()


def test_what_was_begun_at_another_moment_is_not_gone_on_with(tmp_path: Path):
    def dies(folder: Path, journal: Journal) -> dict[str, str]:
        in_steps(folder, journal)
        os.kill(os.getpid(), 9)
        raise AssertionError

    assert ended(started(lambda: cache.keep_in_steps(None, RULES, dies, moment="1"))) == -9
    notes: list[str] = []

    def again(folder: Path, journal: Journal) -> dict[str, str]:
        notes.extend(journal.notes)
        return in_steps(folder, journal)

    cache.keep_in_steps(None, RULES, again, moment="2")
    assert notes == [] and cache.keep(None, RULES, refuse).is_dir()
    (tmp_path / "young").write_bytes(b"a")
    found = cache.content_of([tmp_path / "young"])
    assert found.moment != found.moment  # nobody could see a change


@pytest.mark.parametrize("most", [0, 8000])
def test_a_full_disk_is_said_and_leaves_nothing(most: int, home: Path):
    inlet, out = os.pipe()

    def small() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            cache.keep(None, RULES, lambda folder: (folder / "x").write_bytes(bytes(9000)))
        except StorageError as error:
            os.write(out, str(error).encode())

    process = started(small)
    os.close(out)
    said = os.read(inlet, 10_000).decode()
    os.close(inlet)
    assert ended(process) == 0
    assert "Raise the limit on file sizes" in said and "Nothing was left there" in said
    assert [name for name in os.listdir(home / "made") if not name.startswith(".")] == []
    assert cache.entries() == [] and cache.keep(None, RULES, fill).is_dir()


def test_a_disk_that_is_full_when_the_marker_is_written_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    write = Path.write_text

    def full(path: Path, *given: str) -> int:
        if path.name == MADE_OF:
            write(path, given[0][:20])
            raise OSError(errno.ENOSPC, "no space")
        return write(path, *given)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="Free some space"):
        cache.keep(None, RULES, fill)
    assert os.listdir(home / "made") == []


# Content


def test_content_is_bytes_and_how_files_lie_not_where_or_when(tmp_path: Path):
    def folder(name: str, data: bytes) -> list[Path]:
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "a").write_bytes(data)
        (tmp_path / name / "inner/b").write_bytes(b"b")
        return [tmp_path / name / "a", tmp_path / name / "inner/b"]

    first, same = folder("first", b"a"), folder("same", b"a")
    os.utime(same[0], (1, 1))
    digest = cache.content_of(first).digest
    assert digest == cache.content_of(reversed(same)).digest
    assert digest != cache.content_of(folder("other", b"A")).digest
    assert digest != cache.content_of(first[:1]).digest
    os.rename(same[0], same[0].with_name("c"))
    assert digest != cache.content_of([same[0].with_name("c"), same[1]]).digest


def test_a_file_is_read_once_as_long_as_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(content, "RECENT_NS", 0)
    (tmp_path / "a").write_bytes(b"aaa")
    (tmp_path / "b").write_bytes(b"bbbb")
    paths = [tmp_path / "a", tmp_path / "b"]
    time.sleep(0.02)
    assert not cache.is_remembered(paths)
    first = cache.content_of(paths)
    assert (first.read, cache.content_of(paths).read, cache.is_remembered(paths)) == (7, 0, True)
    before = os.stat(paths[0])
    paths[0].write_bytes(b"aab")
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.02)
    second = cache.content_of(paths)
    assert second.read == 3 and second.digest != first.digest
    with pytest.raises(CorruptCheckpoint, match="a changed while it was being read"):
        first.require_unchanged()
    second.require_unchanged()


def test_a_write_through_memory_that_was_written_before_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(content, "RECENT_NS", 0)

    def mapped(name: str) -> mmap.mmap:
        (tmp_path / name).write_bytes(b"a" * 8192)
        with open(tmp_path / name, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
            memory[0:1] = b"b"
        time.sleep(0.02)
        return memory

    other = mapped("other")
    with open(tmp_path / "other", "rb") as file:
        before = os.fstat(file.fileno())
        os.fdatasync(file.fileno())
        other[0:1] = b"c"
        if os.fstat(file.fileno()).st_mtime_ns == before.st_mtime_ns:
            pytest.skip("this file system tells no times of such writes")
    memory = mapped("a")
    first = cache.content_of([tmp_path / "a"])
    memory[0:1] = b"c"
    with pytest.raises(CorruptCheckpoint, match="changed while"):
        first.require_unchanged()
    assert cache.content_of([tmp_path / "a"]).digest != first.digest


def test_what_was_written_a_moment_ago_is_not_remembered_but_read_again(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"aaa")
    found = cache.content_of([path])
    assert cache.content_of([path]).read == 3  # nobody could see a change within the same tick
    look = found.files[0]
    unseen = found._replace(files=(look._replace(sha256="0" * 64),))
    with pytest.raises(CorruptCheckpoint, match="changed while"):
        unseen.require_unchanged()
    found.require_unchanged()


def test_a_memory_that_is_nonsense_or_cannot_be_written_only_costs_time(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(content, "RECENT_NS", 0)
    (tmp_path / "a").write_bytes(b"aaa")
    time.sleep(0.02)
    first = cache.content_of([tmp_path / "a"])
    [memory] = (home / "digests").iterdir()
    memory.write_text("[3")
    assert cache.content_of([tmp_path / "a"]) == first
    shutil.rmtree(home)
    home.write_text("a file where the cache should be")
    assert cache.content_of([tmp_path / "a"]).digest == first.digest
    with pytest.raises(StorageError, match="make the folder"):
        cache.keep(None, RULES, fill)


# List, verify, prune


def kept(number: int, age: float = 0) -> Path:
    folder = cache.keep(None, {"number": str(number)}, fill, about={"source": f"/s/{number}"})
    use.end(folder)
    then = time.time() - age
    os.utime(folder / MADE_OF, (then, then))
    return folder


def test_the_oldest_go_first_until_the_rest_fits(home: Path):
    old, new, newest = (kept(number, age) for number, age in enumerate((900, 500, 100)))
    sizes = {entry.path: entry.bytes for entry in cache.entries()}
    assert [*sizes] == [newest, new, old]
    done = cache.prune(most=sizes[new] + sizes[newest])
    assert [entry.path for entry in done.removed] == [old] and not done.spared
    assert [entry.path for entry in cache.prune(older_than=300).removed] == [new]
    assert sorted(os.listdir(home / "made")) == [newest.name]
    assert len(cache.prune(everything=True).removed) == 1 and cache.entries() == []


def test_of_a_link_that_stands_for_a_folder_only_the_link_is_removed(home: Path, tmp_path: Path):
    folder = kept(1)
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert cache.find({"number": "1"}) == folder
    use.end(folder)
    assert [entry.path for entry in cache.prune(everything=True).removed] == [folder]
    assert os.listdir(home / "made") == [] and (tmp_path / "moved/inner/part-1").exists()


def test_what_was_made_again_meanwhile_stays_and_what_cannot_be_removed_keeps_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
):
    folders = [kept(number, age=900) for number in range(3)]
    listed = cache.entries()
    listed[0] = listed[0]._replace(state="damaged")  # as it was before somebody made it again
    remove = shutil.rmtree
    stuck = listed[1].path

    def busy(path: Path, **given: bool) -> None:
        if stuck.name in path.name:
            raise OSError(errno.EBUSY, "busy")
        remove(path, **given)

    monkeypatch.setattr(shelf, "entries", lambda: listed)
    monkeypatch.setattr(shelf.shutil, "rmtree", busy)
    with pytest.raises(StorageError, match="cannot remove"):
        cache.prune(older_than=300)
    assert [folder for folder in folders if folder.exists()] == [listed[0].path]


def test_it_is_found_though_another_asks_for_it_at_the_same_time():
    folder = kept(1)
    done = threading.Event()

    def touched() -> None:
        while not done.is_set():
            os.utime(folder / MADE_OF)

    other = threading.Thread(target=touched)
    other.start()
    found = [marker.is_made_of(folder, {"number": "1"}) for _ in range(300)]
    done.set()
    other.join()
    assert all(found)


def test_being_asked_for_keeps_it_young():
    folder = kept(1, age=900)
    assert cache.find({"number": "1"}) == folder
    use.end(folder)
    assert cache.prune(older_than=300).removed == ()


def test_what_a_process_uses_is_never_pruned_and_a_crash_gives_it_back(tmp_path: Path):
    folder = kept(1)

    def reads() -> None:
        cache.keep(None, {"number": "1"}, refuse)
        (tmp_path / "reading").touch()
        time.sleep(30)

    process = started(reads)
    while not (tmp_path / "reading").exists():
        time.sleep(0.01)
    try:
        [entry] = cache.entries()
        assert entry.in_use
        assert cache.prune(everything=True, most=0, older_than=0).spared[0].path == folder
        assert folder.is_dir()
    finally:
        os.kill(process, 9)
        ended(process)
    assert len(cache.prune(everything=True).removed) == 1 and not folder.exists()


def test_a_folder_made_again_after_the_cache_was_removed_by_hand_is_in_use(home: Path):
    folder = cache.keep(None, RULES, fill)
    shutil.rmtree(home)
    assert cache.keep(None, RULES, fill) == folder
    assert [entry.in_use for entry in cache.entries()] == [True]
    assert not cache.prune(everything=True).removed


def test_what_is_being_made_is_in_use(tmp_path: Path):
    def stay(folder: Path, journal: Journal) -> dict[str, str]:
        (tmp_path / "begun").touch()
        time.sleep(30)
        return {}

    process = started(lambda: cache.keep_in_steps(None, RULES, stay))
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    try:
        [entry] = cache.entries()
        assert (entry.state, entry.in_use) == ("unfinished", True)
        assert not cache.prune(everything=True).removed
    finally:
        os.kill(process, 9)
        ended(process)
    assert [entry.state for entry in cache.prune().removed] == ["unfinished"]


def test_verifying_reads_what_names_and_sizes_cannot_tell(capsys: pytest.CaptureFixture[str]):
    folder = kept(1)
    kept(2)
    assert main(["cache", "verify"]) == 0
    (folder / "inner/part-1").write_bytes(b"?" * 3000)
    (folder / "more").touch()
    assert main(["cache", "verify", folder.name[:8]]) == CorruptCheckpoint.exit_code
    said = capsys.readouterr().err
    assert "1 of 1" in said and "inner/part-1 changed, more added" in said
    assert main(["cache", "verify", "--json"]) == 4
    assert [bool(e["damage"]) for e in json.loads(capsys.readouterr().out)].count(True) == 1
    cure = re.search(r"`bioinit (cache prune \w+)`", said)
    assert cure and main(cure[1].split()) == 0
    assert cache.find({"number": "1"}) is None and len(cache.entries()) == 1
    assert main(["cache", "verify"]) == 0


def test_the_command_line_lists_and_prunes(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.startswith(f"0 in {home}")
    kept(1, age=3 * 86400)
    kept(2)
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].endswith("whole            /s/2")
    assert main(["cache", "prune", "--older-than", "2d", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 1
    assert main(["cache", "list", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["about"] == {"source": "/s/2"} and entry["state"] == "whole"
    cache.find({"number": "2"})
    assert main(["cache", "prune", "--most", "1KB"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0 removed") and "is in use, and stays" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "--all"], "--all means nothing to `cache list`"),
        (["prune", "--all", "abc"], "`cache prune --all` takes no keys"),
        (["list", "abc"], "`cache list` takes no keys"),
        (["verify", "abc"], "has a key that begins with 'abc'"),
        (["prune", "--older-than", "long"], "is no age. Write 30d"),
        (["prune", "--most", "much"], "--most='much' is no size"),
    ],
)
def test_words_that_mean_nothing_are_refused(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["cache", *words]) == 2
    assert says in capsys.readouterr().err
