"""Reading files and folders, and writing a folder whole or not at all."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bioinit.errors import BioinitError, CorruptCheckpoint, RefusedCheckpoint, StorageError
from bioinit.storage import File, Folder, Journal, atomic_folder, require_free
from bioinit.storage import file as file_room
from bioinit.storage import handle as handle_room
from bioinit.storage import write as write_room
from bioinit.storage.zip import data_start, first_name, members
from tests.forks import ended, started

BYTES = bytes(range(256)) * 16


@pytest.fixture
def path(tmp_path):
    (tmp_path / "x.bin").write_bytes(BYTES)
    return tmp_path / "x.bin"


# Files


def test_a_file_is_opened_at_the_first_byte_and_only_once(path):
    file = File.at(path)
    assert (file.size, file.opened, file.bytes_read) == (len(BYTES), 0, 0)
    assert file.read(10, 3) == BYTES[10:13]
    assert file.read(0, 0) == b""
    assert (file.opened, file.bytes_read) == (1, 3)


def test_a_closed_file_opens_again(path):
    file = File.at(path)
    file.read(0, 1)
    file.close()
    assert file.read(1, 1) == BYTES[1:2]
    assert file.opened == 2


def test_bytes_are_scattered_over_buffers_in_order(path):
    file = File.at(path)
    buffers = [bytearray(3), bytearray(0), bytearray(5)]
    file.read_into(7, buffers)
    assert b"".join(buffers) == BYTES[7:15]
    assert file.bytes_read == 8


def test_buffers_may_be_memory_of_tensors(path):
    tensor = torch.zeros(8, dtype=torch.int16)
    File.at(path).read_into(4, [tensor.numpy()])
    assert tensor.numpy().tobytes() == BYTES[4:20]


def test_more_buffers_than_one_call_takes_are_all_filled(path):
    buffers = [bytearray(1) for _ in range(3000)]
    File.at(path).read_into(5, buffers)
    assert b"".join(buffers) == BYTES[5:3005]


def test_short_answers_of_the_kernel_are_asked_again(path, monkeypatch):
    real = os.preadv

    def stingy(descriptor, buffers, offset):
        first = next(b for b in buffers if len(b))
        return real(descriptor, [first[: max(1, len(first) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    buffers = [bytearray(100), bytearray(1), bytearray(1000)]
    File.at(path).read_into(3, buffers)
    assert b"".join(buffers) == BYTES[3:1104]


def test_large_reads_are_cut_at_what_one_call_may_take(path, monkeypatch):
    monkeypatch.setattr(file_room, "MOST_BYTES_PER_READ", 100)
    buffers = [bytearray(30), bytearray(250), bytearray(7)]
    File.at(path).read_into(3, buffers)
    assert b"".join(buffers) == BYTES[3:290]


@pytest.mark.parametrize(("offset", "size"), [(0, 5000), (4096, 1), (-1, 4), (5000, 0)])
def test_bytes_beyond_the_file_are_an_error_before_anything_is_read(offset, size, path):
    file = File.at(path)
    with pytest.raises(CorruptCheckpoint, match=r"x\.bin has 4096 bytes, but"):
        file.read(offset, size)
    with pytest.raises(CorruptCheckpoint):
        file.read_into(offset, [bytearray(size)])
    assert file.opened == 0


def test_a_file_that_got_shorter_says_where_it_ends(path, monkeypatch):
    file = File.at(path)
    file.read(0, 1)
    os.truncate(path, 100)
    monkeypatch.setattr(handle_room, "monotonic", lambda: 0.0)  # nobody looks in between
    for read in (lambda: file.read(90, 20), lambda: file.read_into(90, [bytearray(20)])):
        with pytest.raises(CorruptCheckpoint, match="ends at byte 100, but 20 bytes were wanted"):
            read()


def test_an_error_of_the_disk_says_which_file(path, monkeypatch):
    file = File.at(path)

    def broken(*args):
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "pread", broken)
    for read in (lambda: file.read(0, 1), lambda: file.read_into(0, [bytearray(1)])):
        with pytest.raises(StorageError, match=r"cannot read .*x\.bin: input/output error"):
            read()


def test_windows_count_from_their_own_start_and_share_the_descriptor(path):
    file = File.at(path)
    inner = file.window("a/b", 100, 50).window("c", 10, 5)
    assert (inner.offset, inner.size, inner.name) == (110, 5, "c")
    assert inner.read(1, 2) == BYTES[111:113]
    assert file.read(0, 1) and inner.opened == file.opened == 1
    assert inner.fileno() == file.fileno()
    assert str(inner) == f"{path} (c)" and str(file) == str(path)
    with pytest.raises(CorruptCheckpoint):
        inner.read(0, 6)
    with pytest.raises(CorruptCheckpoint):
        file.window("d", 4000, 97)


def test_a_forgotten_file_gives_its_descriptor_back(path):
    file = File.at(path)
    descriptor = file.fileno()
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_threads_may_read_at_once(path):
    file, wrong = File.at(path), []

    def read():
        for offset in range(0, 4000, 7):
            buffer = bytearray(9)
            file.read_into(offset, [buffer])
            if bytes(buffer) != BYTES[offset : offset + 9]:
                wrong.append(offset)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and file.opened == 1
    assert file.bytes_read == 4 * 9 * len(range(0, 4000, 7))


# Folders


def test_a_single_file_is_a_folder_of_one(path):
    folder = Folder.at(path)
    assert folder.is_file and folder.names() == ("x.bin",) and folder.folders() == ()
    assert folder.has("x.bin") and not folder.has("y.bin")
    assert folder.file("x.bin").read(0, 2) == BYTES[:2]
    assert folder.around.names() == ("x.bin",)
    (path.parent / "y.bin").write_bytes(b"")
    with pytest.raises(StorageError):
        folder.file("y.bin")


def test_names_are_sorted_and_deeper_ones_come_on_demand(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.txt", "a.txt", "b/2.txt", "b/c/1.txt"):
        (tmp_path / name).write_text(name)
    folder = Folder.at(tmp_path)
    assert folder.names() == ("a.txt", "z.txt") and folder.folders() == ("b",)
    assert folder.names(deep=True) == ("a.txt", "b/2.txt", "b/c/1.txt", "z.txt")
    assert folder.has("b/c/1.txt") and not folder.has("b/c") and not folder.has("b")
    assert folder.folder("b").names() == ("2.txt",)
    assert folder.read_text("b/2.txt") == "b/2.txt"
    assert folder.around is None


def test_links_into_a_cache_are_files_and_pipes_are_not(tmp_path):
    (tmp_path / "blob").write_text("x")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model").symlink_to("../blob")
    (tmp_path / "snapshot" / "gone").symlink_to("../nothing")
    os.mkfifo(tmp_path / "snapshot" / "pipe")
    assert Folder.at(tmp_path / "snapshot").names() == ("model",)
    with pytest.raises(StorageError, match="neither a file nor a directory"):
        Folder.at(tmp_path / "snapshot" / "pipe")


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "", ".", "a/../x.bin", "x\0y"])
def test_names_that_lead_out_are_refused(name, path):
    folder = Folder.at(path.parent)
    assert not folder.has(name)
    with pytest.raises(RefusedCheckpoint, match="leads out"):
        folder.file(name)


def test_a_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"nothing\.bin: no such file"):
        Folder.at(tmp_path).file("nothing.bin")
    with pytest.raises(StorageError):
        Folder.at(tmp_path).folder("nothing")


def test_the_same_name_gives_the_same_file_and_closing_closes_all(path):
    folder = Folder.at(path.parent)
    file = folder.file("x.bin")
    assert folder.file("x.bin") is file and folder.lone("x.bin").file("x.bin") is file
    with folder:
        descriptor = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{'a': 1}", b'{"a": 1, "a": 2}', b"\xff", b"[" * 99999]
)
def test_unusable_json_is_corrupt_and_named(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=r"x\.json"):
        Folder.at(tmp_path).read_json("x.json")


def test_json_nested_deep_is_corrupt_before_anybody_walks_over_it(tmp_path):
    (tmp_path / "x.json").write_text('{"a":' * 150 + "1" + "}" * 150)
    with pytest.raises(CorruptCheckpoint, match=r"x\.json.*nested deeper"):
        Folder.at(tmp_path).read_json("x.json")
    (tmp_path / "x.json").write_text("[" * 90 + "]" * 90)
    assert Folder.at(tmp_path).read_json("x.json")


def test_a_key_that_stands_twice_among_many_is_found_at_once(tmp_path):
    items = ",".join(f'"{n}":0' for n in range(90_000))
    (tmp_path / "x.json").write_text("{" + items + ',"89999":1}')
    begin = time.process_time()
    with pytest.raises(CorruptCheckpoint, match="'89999' stands twice"):
        Folder.at(tmp_path).read_json("x.json")
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x/\ud800/y"])
def test_characters_that_no_path_can_hold_are_a_storage_error(name, tmp_path):
    with pytest.raises(StorageError, match="such characters"):
        Folder.at(str(tmp_path / "x") + name)
    folder = Folder.at(tmp_path)
    assert not folder.has(name)
    with pytest.raises(RefusedCheckpoint):
        folder.file(name)


def test_a_name_too_long_for_the_disk_says_so(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="too long") as caught:
        Folder.at(tmp_path).has("b/" + "a" * 300)
    assert "shorter" in str(caught.value)


def test_what_a_killed_writer_left_is_named_where_its_folder_is_missing(tmp_path):
    for kind in ("partial", "old"):
        (tmp_path / f".out.999999999.0123abcd.{kind}").mkdir()
        with pytest.raises(StorageError, match=f"0123abcd.{kind}.*rename it back"):
            Folder.at(tmp_path / "out")


def test_a_home_directory_is_expanded(path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert Folder.at("~/x.bin").path == path


# Zip archives


def test_members_of_an_archive_are_ranges_of_its_bytes(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a", "b/c"):
            archive.writestr(name, name * 5)
    file = File.at(tmp_path / "x.zip")
    found = members(file)
    assert first_name(file) == "a" and list(found) == ["a", "b/c"]
    for name, member in found.items():
        assert file.read(data_start(file, name, member), member.size) == (name * 5).encode()


def test_an_archive_may_carry_a_comment(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "text")
        archive.comment = b"written by hand" * 1000
    assert list(members(File.at(tmp_path / "x.zip"))) == ["a"]


def test_many_members_are_counted_in_the_second_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(70_000):
            archive.writestr(zipfile.ZipInfo(str(number)), b"")
    assert len(members(File.at(tmp_path / "x.zip"))) == 70_000


def test_two_members_of_one_name_are_corrupt(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a", "2")
    with pytest.raises(CorruptCheckpoint, match="two members called 'a'"):
        members(File.at(tmp_path / "x.zip"))


# Writing a folder


def left_beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    final = tmp_path / "deep" / "out"
    with atomic_folder(final) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x").write_text("x")
        assert not final.exists()
    assert (final / "inner" / "x").read_text() == "x"
    assert left_beside(final) == []


def full(folder: Path, **files: str) -> Path:
    """A folder that holds something."""
    folder.mkdir(parents=True)
    for name, text in {"config.json": "{}", **files}.items():
        (folder / name).write_text(text)
    return folder


def test_an_empty_folder_is_replaced_and_a_full_one_is_not(tmp_path):
    final = tmp_path / "out"
    final.mkdir()
    with atomic_folder(final) as folder:
        (folder / "x").write_text("1")
    with pytest.raises(StorageError, match=r"not empty, it holds 'x'"), atomic_folder(final):
        pytest.fail("the block must not run")
    assert (final / "x").read_text() == "1" and left_beside(final) == []


def test_overwriting_replaces_the_whole_of_what_was_there(tmp_path):
    final = full(tmp_path / "out", old="x")
    with pytest.raises(StorageError, match=r"output\.overwrite=true"), atomic_folder(final):
        pytest.fail("the block must not run")
    assert (final / "old").exists()
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [p.name for p in final.iterdir()] == ["new"] and left_beside(final) == []


@pytest.mark.parametrize("where", ["home", "home/work", "."])
def test_a_home_or_the_current_directory_is_never_replaced(where, tmp_path, monkeypatch):
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    with pytest.raises(StorageError, match=r"directory\. Choose"):
        require_free(tmp_path / where, overwrite=True)


def test_what_is_written_meanwhile_by_somebody_else_is_not_replaced(tmp_path):
    final = tmp_path / "out"
    with (
        pytest.raises(StorageError, match="was written there"),
        atomic_folder(final) as folder,
    ):
        (folder / "x").write_text("x")
        final.mkdir()
        (final / "precious").write_text("mine")
    assert (final / "precious").read_text() == "mine" and left_beside(final) == []


@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("proj/ck", "is"),
        ("proj", "holds"),
        ("alias/ck", "is"),
        ("alias", "holds"),
        ("proj/ck/../../proj", "holds"),
        ("blobs", "holds"),
    ],
)
def test_what_is_being_read_is_never_written_over(out, relation, tmp_path):
    full(tmp_path / "proj")
    kept = full(tmp_path / "proj" / "ck")
    blob = full(tmp_path / "blobs") / "weights"
    blob.write_text("w")
    (kept / "weights").symlink_to(blob)
    (tmp_path / "alias").symlink_to(tmp_path / "proj")
    with pytest.raises(StorageError, match=f"it {relation} the checkpoint.*apart from it"):
        require_free(tmp_path / out, overwrite=True, keep=(kept, kept / "weights"))
    assert blob.read_text() == "w" and (kept / "config.json").exists()


def test_a_folder_beside_a_single_file_that_is_read_is_free(tmp_path):
    (tmp_path / "weights").write_text("w")
    found = require_free(tmp_path / "out", keep=(tmp_path / "weights",))
    assert found == tmp_path / "out" and not found.exists()


def test_the_question_before_loading_is_that_of_the_writer(tmp_path, monkeypatch):
    """Both refuse the same places, and asking makes nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("~/file", "~/file/out", "~/full", "~/link", "~/link/out", "~/" + "n" * 300):
        with pytest.raises(StorageError) as asked:
            require_free(name)
        with pytest.raises(StorageError) as told, atomic_folder(name):
            pytest.fail("the block must not run")
        assert str(asked.value) == str(told.value)
    assert require_free("~/a/b") == tmp_path / "a" / "b"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_or_link_in_the_way_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with (
            pytest.raises(StorageError, match="a file or a link"),
            atomic_folder(tmp_path / name, overwrite=True),
        ):
            pytest.fail("the block must not run")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_leaves_everything_as_it_was(error, overwrite, tmp_path):
    final = tmp_path / "out"
    if overwrite:
        full(final)
    with pytest.raises(type(error)), atomic_folder(final, overwrite=overwrite) as folder:
        (folder / "x").write_text("x")
        raise error
    assert left_beside(final) == []
    names = [p.name for p in tmp_path.rglob("*")]
    assert names == (["out", "config.json"] if overwrite else [])


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "permission"), (errno.EFBIG, "ulimit -f")],
)
def test_an_error_of_the_system_is_told_with_its_cure(number, cure, tmp_path):
    with (
        pytest.raises(StorageError, match=f"{os.strerror(number).lower()}.*{cure}"),
        atomic_folder(tmp_path / "out"),
    ):
        raise OSError(number, "x")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_stays_what_it_is(tmp_path):
    with pytest.raises(BioinitError, match=r"^mine$") as caught, atomic_folder(tmp_path / "out"):
        raise CorruptCheckpoint("mine")
    assert type(caught.value) is CorruptCheckpoint


@pytest.mark.parametrize("writer", ["python", "safetensors", "torch"])
def test_a_full_disk_in_the_middle_of_a_file_leaves_nothing(writer, tmp_path):
    """A limit on file sizes stands for the full disk; each library reports it in its own way."""
    state = {"w": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (
            pytest.raises(StorageError, match=r"cannot write .*out"),
            atomic_folder(tmp_path / "out") as folder,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            if writer == "python":
                (folder / "x").write_bytes(bytes(400_000))
            elif writer == "safetensors":
                save_file(state, folder / "x.safetensors")
            else:
                torch.save(state, folder / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_forbidden_place_is_a_storage_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="permission"):
        require_free(tmp_path / "deep" / "out")
    with pytest.raises(StorageError, match="permission"), atomic_folder(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_a_parent_that_is_a_file_is_a_storage_error(path):
    with pytest.raises(StorageError, match="cannot make the folder"), atomic_folder(path / "out"):
        pytest.fail("the block must not run")


def test_of_two_writers_the_second_is_told_at_once(tmp_path):
    final = tmp_path / "out"
    with atomic_folder(final) as folder:
        with pytest.raises(StorageError, match="another process is writing"), atomic_folder(final):
            pytest.fail("the block must not run")
        (folder / "x").write_text("first")
    assert (final / "x").read_text() == "first" and left_beside(final) == []


def test_without_locks_the_rename_lets_only_one_win(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "x")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    final = tmp_path / "out"
    with pytest.raises(StorageError, match="in the meantime"), atomic_folder(final) as late:
        (late / "x").write_text("late")
        with atomic_folder(final) as first:
            (first / "x").write_text("first")
    assert (final / "x").read_text() == "first" and left_beside(final) == []


KILLED = """
import os, signal, sys
from bioinit.storage import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_only_what_the_next_one_removes(tmp_path):
    final = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(final)], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    assert all(name.startswith(".out.") for name in left_beside(final))
    with atomic_folder(final) as folder:
        (folder / "x").write_text("whole")
    assert (final / "x").read_text() == "whole" and left_beside(final) == []


KILLED_WHILE_REPLACING = """
import os, signal, sys
from pathlib import Path
import bioinit.storage.write as write

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "after":
    move = write.exchange
    write.exchange = lambda *args: move(*args) and die()
else:
    write.exchange = die
with write.atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "new").write_text("new")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
@pytest.mark.parametrize(("when", "holds"), [("before", "old"), ("after", "new")])
def test_a_writer_killed_while_it_replaces_leaves_the_old_or_the_new(when, holds, tmp_path):
    final = full(tmp_path / "out", old="old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_REPLACING, str(final), when],
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == -signal.SIGKILL
    assert (holds in os.listdir(final)) and {"old", "new"} - {holds} - set(os.listdir(final))
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "newer").write_text("newer")
    assert os.listdir(final) == ["newer"] and left_beside(final) == []


def test_where_folders_cannot_change_places_they_are_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(write_room, "exchange", lambda one, other: False)
    final = full(tmp_path / "out", old="old")
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert os.listdir(final) == ["new"] and left_beside(final) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 250, "shorter name"), ("é" * 120, "shorter name"), ("a\0b", "characters")],
)
def test_a_name_that_cannot_be_written_is_told_before_anything_is_loaded(name, words, tmp_path):
    with pytest.raises(StorageError, match=words):
        require_free(tmp_path / name)
    require_free(tmp_path / ("x" * 200))


def test_a_replacement_that_was_killed_between_two_renames_is_undone(tmp_path):
    final = tmp_path / "out"
    old = tmp_path / ".out.999999999.0123abcd.old"
    old.mkdir()
    (old / "x").write_text("old")
    with pytest.raises(StorageError, match="not empty"), atomic_folder(final):
        pytest.fail("the block must not run")
    assert (final / "x").read_text() == "old" and left_beside(final) == []


@pytest.mark.parametrize("locks", [True, False])
def test_what_is_left_is_known_by_the_lock_and_only_without_one_by_who_runs(
    locks, tmp_path, monkeypatch
):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "x")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", unsupported)
    dead = started(lambda: None)
    try:
        os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)  # a zombie, until somebody waits for it
        # The number of a process that was killed may be that of another one by now.
        living, killed = (tmp_path / f".out.{n}.0123abcd.partial" for n in (os.getppid(), dead))
        living.mkdir()
        killed.mkdir()
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("x")
        assert (living.exists(), killed.exists()) == (not locks, False)
    finally:
        assert ended(dead) == 0


# Journals


def _journal(folder: Path, *lines: bytes) -> Path:
    path = folder / Journal.NAME
    path.write_bytes(b"".join(lines))
    return path


BEGUN = b'{"work": "w"}\n'
NOTE = b'{"key": "a", "value": 1}\n'


@pytest.mark.parametrize(
    "bad",
    [
        b"\0" * 40 + b"\n",
        b'{"key": "b", "va\n',
        b"\xff\xfe\n",
        b"[1]\n",
        b"null\n",
        b'{"key": ["b"], "value": 1}\n',
        b'{"key": "b"}\n',
        b"\n",
        b"[" * 100_000 + b"\n",
        b'{"key": "b", "value": 2}',
    ],
    ids=[
        "nuls",
        "half",
        "no text",
        "a list",
        "null",
        "no name",
        "no value",
        "empty",
        "deep",
        "cut",
    ],
)
def test_a_journal_ends_at_the_first_line_that_is_no_note_and_goes_on_from_there(tmp_path, bad):
    path = _journal(tmp_path, BEGUN, NOTE, bad, b'{"key": "c", "value": 3}\n')
    with Journal(tmp_path, "w") as journal:
        assert dict(journal.notes) == {"a": 1}
        journal.note("d", 4)
    assert path.read_bytes() == BEGUN + NOTE + b'{"key": "d", "value": 4}\n'
    with Journal(tmp_path, "w") as journal:
        assert dict(journal.notes) == {"a": 1, "d": 4}


@pytest.mark.parametrize("first", [b"\0" * 8 + b"\n", b"[]\n", b'{"work": "else"}\n', b"", b"{"])
def test_a_journal_whose_first_line_does_not_say_the_same_work_is_begun_anew(tmp_path, first):
    path = _journal(tmp_path, first, NOTE if first.endswith(b"\n") else b"")
    with Journal(tmp_path, "w") as journal:
        assert not journal.notes
    assert path.read_bytes() == BEGUN
