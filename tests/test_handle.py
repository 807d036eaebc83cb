"""Many files through few descriptors."""

import errno
import os
import threading
import time

import pytest

from bioinit.errors import StorageError
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
