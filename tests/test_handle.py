"""Many files through few descriptors."""

import errno
import os
import threading
import time

import pytest

from bioinit.errors import CorruptCheckpoint, StorageError
from bioinit.storage import File
from bioinit.storage import handle as handle_room


@pytest.fixture
def files(tmp_path):
    found = []
    for number in range(20):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes([number]) * 100)
        found.append(File.at(path))
    return found


@pytest.fixture
def pool(monkeypatch):
    own = handle_room.Pool(lambda: 5)
    monkeypatch.setattr(handle_room, "POOL", own)
    return own


def test_no_more_files_are_open_than_there_may_be(files, pool):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number, file in enumerate(files):
            assert file.read(7, 2) == bytes([number]) * 2
            assert len(pool) <= 5
    assert len(os.listdir("/proc/self/fd")) - before <= 5
    assert all(file.opened == 2 for file in files)


def test_what_is_read_again_and_again_stays_open(files, pool):
    for file in files[1:]:
        files[0].read(0, 1)
        file.read(0, 1)
    assert files[0].opened == 1


def test_a_descriptor_that_was_asked_for_stays_open_until_it_is_closed(files, pool):
    descriptor = files[0].fileno()
    for file in files[1:]:
        file.read(0, 1)
    assert os.pread(descriptor, 1, 0) == b"\0" and files[0].fileno() == descriptor
    files[0].close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_readers_in_threads_never_lose_the_file_they_are_reading(files, pool, monkeypatch):
    real, wrong = os.pread, []

    def slow(descriptor, size, offset):
        time.sleep(0.0002)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", slow)

    def read(start):
        for step in range(60):
            number = (start + step * 7) % len(files)
            if files[number].read(3, 4) != bytes([number]) * 4:
                wrong.append(number)
            if step % 5 == 0:
                files[(number + 1) % len(files)].close()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool) <= 8


def test_closing_a_file_that_is_being_read_waits_for_the_reader(files, pool, monkeypatch):
    real, file = os.pread, files[3]
    seen = []

    def closing(descriptor, size, offset):
        seen.append(descriptor)
        file.close()
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", closing)
    assert file.read(0, 1) == b"\3"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(seen[0])


def test_where_the_process_may_open_no_more_it_goes_on_with_fewer(files, pool, monkeypatch):
    for file in files[:4]:
        file.read(0, 1)
    real, refused = os.open, []

    def full(path, flags):
        if len(pool) > 2:
            refused.append(path)
            raise OSError(errno.EMFILE, "x")
        return real(path, flags)

    monkeypatch.setattr(os, "open", full)
    assert files[5].read(0, 1) == b"\5"
    assert refused


def test_where_nothing_can_be_opened_the_cure_is_named(files, pool, monkeypatch):
    def full(path, flags):
        raise OSError(errno.EMFILE, "x")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StorageError, match="ulimit -n"):
        files[0].read(0, 1)


def test_forgotten_files_leave_the_pool(files, pool):
    for file in files:
        file.read(0, 1)
    assert len(pool)
    del file
    files.clear()
    assert not len(pool)


@pytest.mark.parametrize(("soft", "most"), [(20_000, 512), (256, 128), (2, 4), (-1, 512)], ids=str)
def test_the_limit_follows_what_the_process_may_open(soft, most, monkeypatch):
    monkeypatch.setattr(handle_room.resource, "getrlimit", lambda _: (soft, soft))
    assert handle_room.most_descriptors() == most


def renamed_onto(path):
    other = path.with_name("other")
    other.write_bytes(b"x" * 100)
    os.utime(other, ns=(0, os.stat(path).st_mtime_ns))  # as archives that write no times leave it
    os.replace(other, path)


def written_over(path):
    with open(path, "r+b") as stream:
        stream.write(b"x" * 100)
    os.utime(path, ns=(0, 1))


def cut(path):
    os.truncate(path, 50)


CHANGES = (renamed_onto, written_over, cut)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_before_it_was_opened_is_not_read(change, files, pool):
    change(files[0].path)
    with pytest.raises(CorruptCheckpoint, match=r"0\.bin changed since it was opened: it had 100"):
        files[0].read(0, 10)
    with pytest.raises(CorruptCheckpoint, match="changed"):
        files[0].fileno()
    assert not len(pool)


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "evicted"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_not_read_when_it_is_opened_again(change, is_closed, files, pool):
    files[0].read(0, 10)
    for file in files[1:]:
        file.read(0, 1)
    if is_closed:
        files[0].read(0, 10)
        files[0].close()
    change(files[0].path)
    with pytest.raises(CorruptCheckpoint, match="changed since it was opened"):
        files[0].window("w", 10, 20).read_into(0, (bytearray(5),))
    assert files[1].read(0, 1) == b"\1"


@pytest.mark.parametrize("change", [written_over, cut])
def test_a_file_that_changes_while_it_is_open_is_noticed_by_the_next_read(change, files, pool):
    files[0].read(0, 10)
    change(files[0].path)
    time.sleep(2 * handle_room.SECONDS_BETWEEN_LOOKS)
    with pytest.raises(CorruptCheckpoint, match="changed since it was opened"):
        files[0].read(0, 10)
    files[0].close()
    assert not len(pool)


def test_a_file_that_is_replaced_while_it_is_open_is_read_to_its_end(files, pool):
    files[0].read(0, 10)
    renamed_onto(files[0].path)
    time.sleep(2 * handle_room.SECONDS_BETWEEN_LOOKS)
    assert files[0].read(50, 50) == bytes(50)


def test_looking_whether_a_file_changed_does_not_cost_each_read(files, pool, monkeypatch):
    real, looks = os.fstat, []
    monkeypatch.setattr(os, "fstat", lambda descriptor: looks.append(1) or real(descriptor))
    begin = time.monotonic()
    for _ in range(2000):
        files[0].read(0, 10)
    spent = time.monotonic() - begin
    assert len(looks) <= 1 + spent / handle_room.SECONDS_BETWEEN_LOOKS


def test_a_file_too_large_for_memory_is_told_with_its_size(tmp_path):
    path = tmp_path / "sparse"
    for size in (1 << 46, (1 << 63) - 1):
        try:
            with open(path, "wb") as stream:
                os.truncate(stream.fileno(), size)
        except OSError:
            continue  # this file system knows no such sizes
        with pytest.raises(CorruptCheckpoint, match=rf"sparse has {size} bytes.*into memory"):
            File.at(path).read(0, size)


def test_a_name_cannot_write_lines_of_its_own(tmp_path):
    path = tmp_path / "x\nbioinit: all is well\x1b[2J\udcff"
    path.write_bytes(b"x")
    file = File.at(path)
    for text in (str(file), str(file.window("in\nside", 0, 1))):
        assert text.isprintable() and "x\\nbioinit" in text and "\\udcff" in text
    os.truncate(path, 0)
    with pytest.raises(CorruptCheckpoint) as caught:
        file.read(0, 1)
    assert str(caught.value).isprintable()
    path.unlink()
    with pytest.raises(StorageError) as gone:
        file.read(0, 1)
    assert str(gone.value).isprintable()
