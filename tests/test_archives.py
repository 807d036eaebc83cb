"""Members of tar archives, plain and packed with gzip, are windows: nothing is unpacked."""

import gzip
import io
import os
import random
import tarfile
import threading
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioinit.errors import BioinitError, CheckpointError, CorruptCheckpoint, RefusedCheckpoint
from bioinit.storage import File, Folder
from bioinit.storage import gzip as gzip_room
from bioinit.storage import tar as tar_room
from bioinit.storage.tar import BLOCK, first_name, members

CONTENT = {
    "model_config.yaml": b"nemo_version: 1.23.0\n",
    "model_weights.ckpt": random.Random(0).randbytes(30_000),
    "mp_rank_00/model_weights.ckpt": random.Random(1).randbytes(1024),
    "empty": b"",
}
DIALECTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
MODES = ("w:", "w:gz")
each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=["ustar", "gnu", "pax"])
each_mode = pytest.mark.parametrize("mode", MODES, ids=["plain", "gzip"])


def pack(path, content, *, mode="w:", dialect=tarfile.PAX_FORMAT, root="./", **fields):
    """An archive as the standard library writes it."""
    with tarfile.open(path, mode, format=dialect) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(root + name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def header(name=b"./x", size=b"%011o\0", held=0, kind=b"0", link=b"", **at):
    """One block that may say anything, with a checksum that fits it."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = (b"0000644\0", b"0000000\0", b"0000000\0")
    block[124:136] = (size % held if b"%" in size else size).ljust(12, b"\0")[:12]
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\00000"
    for place, value in at.items():
        start = int(place.removeprefix("at_"))
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def block(data):
    return data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


def record(key, value):
    body = b" " + key + b"=" + value + b"\n"
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size += 1
    return str(size).encode() + body


def pax(*pairs, kind=b"x"):
    data = b"".join(record(key, value) for key, value in pairs)
    return header(b"PaxHeader", held=len(data), kind=kind) + block(data)


END = bytes(2 * BLOCK)
GOOD = header(b"./good", held=3) + block(b"abc")


def opened(tmp_path, data, name="x.nemo"):
    (tmp_path / name).write_bytes(data)
    return members(File.at(tmp_path / name))


def contents(found):
    return {name: file.read(0, file.size) for name, file in found.items()}


# Good archives


@each_mode
@each_dialect
def test_every_member_is_a_window_with_its_bytes(tmp_path, dialect, mode):
    path = pack(tmp_path / "x.nemo", CONTENT, mode=mode, dialect=dialect)
    assert contents(members(File.at(path))) == CONTENT


@each_mode
@each_dialect
def test_long_names_are_whole(tmp_path, dialect, mode):
    name = "a" * 90 + "/" + "b" * 95
    path = pack(tmp_path / "x.nemo", {name: b"1"}, mode=mode, dialect=dialect, root="")
    assert list(members(File.at(path))) == [name]


@pytest.mark.parametrize("dialect", DIALECTS[1:], ids=["gnu", "pax"])
def test_names_longer_than_a_header_and_of_any_script_are_whole(tmp_path, dialect):
    name = "m/" + "ä" * 200
    assert list(members(File.at(pack(tmp_path / "x", {name: b"1"}, dialect=dialect)))) == [name]


def test_names_are_plain_whatever_stands_before_them(tmp_path):
    data = header(b"././/a/./b", held=1) + block(b"1") + header(b"./", kind=b"5") + END
    assert contents(opened(tmp_path, data)) == {"a/b": b"1"}


def test_only_headers_are_read(tmp_path):
    path = pack(tmp_path / "x.nemo", {f"{i}": bytes(100_000) for i in range(20)})
    found = members(File.at(path))
    assert len(found) == 20 and next(iter(found.values())).bytes_read < 22 * BLOCK + 2


def test_a_member_beyond_eight_gib_is_a_window(tmp_path):
    size = 9 << 30
    with (tmp_path / "x.nemo").open("wb") as stream:  # a hole of the file system: no disk is used
        stream.write(header(b"./big", size=b"\x80" + size.to_bytes(11, "big")))
        stream.seek(BLOCK + size)
        stream.write(header(b"./after", held=2) + block(b"ok") + END)
    found = members(File.at(tmp_path / "x.nemo"))
    assert found["big"].size == size and found["after"].read(0, 2) == b"ok"


def test_an_extended_header_overrules_the_size_of_the_next_member_only(tmp_path):
    data = pax((b"size", b"3")) + header(b"./a", held=0) + block(b"abc")
    data += header(b"./b", held=2) + block(b"de") + END
    assert contents(opened(tmp_path, data)) == {"a": b"abc", "b": b"de"}


@pytest.mark.parametrize("number_of_end_blocks", [0, 1, 2, 20])
def test_a_last_member_that_is_whole_may_lack_the_end(tmp_path, number_of_end_blocks):
    assert contents(opened(tmp_path, GOOD + bytes(number_of_end_blocks * BLOCK))) == {
        "good": b"abc"
    }


def test_a_folder_over_members_reads_like_a_directory(tmp_path):
    path = pack(tmp_path / "x.nemo", CONTENT)
    folder = Folder.over(path, members(File.at(path)))
    assert folder.names() == ("empty", "model_config.yaml", "model_weights.ckpt")
    assert folder.folders() == ("mp_rank_00",)
    assert folder.folder("mp_rank_00").file("model_weights.ckpt").size == 1024


def test_the_first_name_is_told_from_one_block_and_of_tars_only(tmp_path):
    assert first_name(header(b"./model_config.yaml")) == "./model_config.yaml"
    assert first_name(bytes(BLOCK)) is None
    assert first_name(random.Random(0).randbytes(BLOCK)) is None
    assert first_name(header()[:-1]) is None


# Archives that a person should not trust, or that are damaged


REFUSED = {
    "an absolute name": header(b"/etc/passwd", held=1) + block(b"1"),
    "a name that leads out": header(b"../x", held=1) + block(b"1"),
    "a name that leads out inside": header(b"./a/../../x", held=1) + block(b"1"),
    "a name that leads out, extended": pax((b"path", b"../x")) + header(held=1) + block(b"1"),
    "an absolute name, extended": pax((b"path", b"/x")) + header(held=1) + block(b"1"),
    "a folder that leads out": header(b"../../", kind=b"5"),
    "a symbolic link": header(b"./x", kind=b"2", link=b"/etc/passwd"),
    "a symbolic link inside": header(b"./x", kind=b"2", link=b"good"),
    "a hard link": header(b"./x", kind=b"1", link=b"./good"),
    "a character device": header(b"./x", kind=b"3"),
    "a block device": header(b"./x", kind=b"4"),
    "a named pipe": header(b"./x", kind=b"6"),
    "a sparse file of GNU": header(b"./x", kind=b"S", held=1) + block(b"1"),
    "a sparse file, extended": pax((b"GNU.sparse.major", b"1")) + header(held=1) + block(b"1"),
    "a part of several archives": header(b"./x", kind=b"M", held=1) + block(b"1"),
    "a kind nobody knows": header(b"./x", kind=b"Q", held=1) + block(b"1"),
}
DAMAGED = {
    "a wrong checksum": b"\1" + GOOD[1:],
    "a wrong checksum after a good member": GOOD[:-1] + b"\0" + b"\1" + GOOD[1:],
    "no header at all": b"x" * BLOCK,
    "a size beyond the archive": header(b"./x", held=1 << 20) + block(b"1"),
    "an exabyte": header(b"./x", size=b"\x80" + (1 << 60).to_bytes(11, "big")),
    "eight times the whole address space": header(b"./x", size=b"\x80" + b"\xff" * 11),
    "a negative size": header(b"./x", size=b"\xff" * 12),
    "a negative size in digits": header(b"./x", size=b"-0000000001\0"),
    "a size that is no number": header(b"./x", size=b"00000000009\0"),
    "a size with an underscore": header(b"./x", size=b"0000000_001\0"),
    "a negative size, extended": pax((b"size", b"-1")) + header(b"./x"),
    "a size of twenty-one digits": pax((b"size", b"1" * 21)) + header(b"./x"),
    "a size of a hundred thousand digits": pax((b"size", b"1" * 100_000)) + header(b"./x"),
    "one file twice": GOOD + GOOD,
    "one file twice by other spellings": GOOD + header(b"good", held=3) + block(b"abc"),
    "a file and its folder": GOOD + header(b"./good/x", held=1) + block(b"1"),
    "a folder and its file": header(b"./good/x", held=1) + block(b"1") + GOOD,
    "a folder that is a file": GOOD + header(b"./good/", kind=b"5"),
    "a folder with bytes": header(b"./x/", kind=b"5", held=512) + block(b"1"),
    "a file without a name": header(b"", held=1) + block(b"1"),
    "a file called like the root": header(b"./.", held=1) + block(b"1"),
    "a name with a zero in it": pax((b"path", b"a\0b")) + header(held=1) + block(b"1"),
    "a name of 5000 letters": pax((b"path", b"a" * 5000)) + header(held=1) + block(b"1"),
    "a name of 1000 folders": pax((b"path", b"a/" * 1000 + b"b")) + header(held=1) + block(b"1"),
    "an extension of a gigabyte": header(b"PaxHeader", held=1 << 30, kind=b"x"),
    "an extension that is cut off": header(b"PaxHeader", held=1000, kind=b"x") + block(b"1"),
    "an extension that is no list": header(b"P", held=9, kind=b"x") + block(b"not a list"),
    "a record longer than its header": header(b"P", held=9, kind=b"x") + block(b"99 path=x\n"),
    "a record of no bytes": header(b"P", held=9, kind=b"x") + block(b"0 path=x\n"),
    "a record that ends before it begins": header(b"P", held=9, kind=b"x") + block(b"1 path=x\n"),
    "a record without a value": header(b"P", held=7, kind=b"x") + block(b"7 path\n"),
    "an extension of nothing": GOOD + pax((b"path", b"x")),
    "two extensions of one name": pax((b"path", b"x")) + pax((b"path", b"y")) + GOOD,
    "one name for all": pax((b"path", b"x"), kind=b"g") + GOOD,
    "nothing but the end": b"",
    "nothing but folders": header(b"./x/", kind=b"5"),
}
each_refused = pytest.mark.parametrize("what", REFUSED)
each_damaged = pytest.mark.parametrize("what", DAMAGED)


@each_mode
@each_refused
def test_what_leads_out_or_is_no_file_is_refused(tmp_path, what, mode):
    data = GOOD + REFUSED[what] + END
    with pytest.raises(RefusedCheckpoint, match=r"x\.nemo"):
        opened(tmp_path, data if mode == "w:" else gzip.compress(data))


@each_mode
@each_damaged
def test_what_contradicts_itself_is_corrupt(tmp_path, what, mode):
    data = DAMAGED[what] + END
    began = time.monotonic()
    with pytest.raises(CorruptCheckpoint, match=r"x\.nemo"):
        opened(tmp_path, data if mode == "w:" else gzip.compress(data))
    assert time.monotonic() - began < 2


def test_an_archive_cut_anywhere_is_corrupt_or_whole(tmp_path):
    path = pack(tmp_path / "x.nemo", {"a": b"1" * 700, "b": b"2" * 20})
    whole, found = path.read_bytes(), {}
    for size in range(0, len(whole), 64):
        try:
            found = contents(opened(tmp_path, whole[:size]))
        except CorruptCheckpoint:
            continue
        assert size % BLOCK == 0 and found in ({"a": b"1" * 700}, {"a": b"1" * 700, "b": b"2" * 20})
    assert found


def test_an_announcement_of_announcements_does_not_recurse(tmp_path):
    chain = b"".join(header(b"L", held=2, kind=b"K") + block(b"x") for _ in range(5000))
    assert list(opened(tmp_path, chain + GOOD + END)) == ["good"]


def test_more_headers_than_any_checkpoint_has_are_refused_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_room, "MOST_HEADERS", 1000)
    many = b"".join(header(b"./%d" % i) for i in range(1001))
    with pytest.raises(RefusedCheckpoint, match="1000 headers"):
        opened(tmp_path, many + END)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_of_ours_or_harmless(tmp_path_factory, data):
    parts = data.draw(
        st.lists(
            st.sampled_from([*REFUSED.values(), *DAMAGED.values(), GOOD, END]),
            min_size=1,
            max_size=4,
        )
    )
    whole = bytearray(b"".join(parts))
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        for file in opened(tmp_path_factory.getbasetemp(), bytes(whole)).values():
            assert file.offset >= BLOCK and file.offset + file.size <= len(whole)
    except BioinitError:
        pass


# gzip


def packed(path, data, **how):
    path.write_bytes(gzip.compress(data, **how))
    return path


def nothing():
    return None
    yield (0, 0)


def unpacked(path):
    return gzip_room.unpacked(File.at(path), path.name, nothing())[0]


@pytest.fixture
def small_steps(monkeypatch):
    """So small that a few hundred kilobytes have many states, and states are thinned out."""
    monkeypatch.setattr(gzip_room, "INPUT_BYTES", 1000)
    monkeypatch.setattr(gzip_room, "OUTPUT_BYTES", 3000)
    monkeypatch.setattr(gzip_room, "FIRST_STRETCH", 4096)
    monkeypatch.setattr(gzip_room, "MOST_STATES", 16)


def text(size, seed=0):
    """Bytes that shrink to about a half."""
    return bytes(random.Random(seed).choices(range(16), k=size))


def test_any_part_is_that_part_of_the_whole(tmp_path, small_steps):
    data = text(200_000)
    made = unpacked(packed(tmp_path / "x.gz", data))
    assert made.size == len(data) and made.how == "gzip, decompressed while reading"
    chance = random.Random(3)
    for _ in range(200):
        at = chance.randrange(len(data))
        size = chance.choice([0, 1, 10, 5000, 50_000])
        size = min(size, len(data) - at)
        assert made.read(at, size) == data[at : at + size]


def test_reading_in_order_decompresses_once(tmp_path, small_steps, monkeypatch):
    data = text(200_000)
    path = packed(tmp_path / "x.gz", data)
    made = unpacked(path)
    before = made.bytes_read
    for at in range(0, len(data), 1000):
        assert made.read(at, 1000) == data[at : at + 1000]
    assert made.bytes_read - before <= path.stat().st_size + 17 * 1000


def test_threads_read_at_once(tmp_path, small_steps):
    data = text(300_000)
    made = unpacked(packed(tmp_path / "x.gz", data))
    wrong = []

    def work(seed):
        chance = random.Random(seed)
        for _ in range(60):
            at = chance.randrange(len(data) - 5000)
            if made.read(at, 5000) != data[at : at + 5000]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_gzip_files_one_after_the_other_are_one(tmp_path, small_steps):
    parts = [text(70_000, 1), b"", text(10, 2), text(50_000, 3)]
    path = tmp_path / "x.gz"
    path.write_bytes(b"".join(gzip.compress(part) for part in parts))
    made, whole = unpacked(path), b"".join(parts)
    assert made.read(0, made.size) == whole
    assert made.read(69_999, 12) == whole[69_999 : 69_999 + 12]


def test_zeros_after_the_end_are_filling(tmp_path):
    path = packed(tmp_path / "x.gz", b"abc")
    path.write_bytes(path.read_bytes() + bytes(100_000))
    assert unpacked(path).read(0, 3) == b"abc"


def test_a_name_and_a_comment_in_the_header_are_skipped(tmp_path):
    plain = gzip.compress(b"abc")
    (tmp_path / "x.gz").write_bytes(plain[:3] + b"\x18" + plain[4:10] + b"n\0c\0" + plain[10:])
    assert unpacked(tmp_path / "x.gz").read(0, 3) == b"abc"


@pytest.mark.parametrize("kept", [3, 12, 0.3, 0.9, -9, -8, -4, -1])
def test_a_truncated_gzip_file_is_corrupt(tmp_path, kept):
    path = packed(tmp_path / "x.gz", text(50_000))
    data = path.read_bytes()
    size = int(len(data) * kept) if isinstance(kept, float) else kept
    path.write_bytes(data[:size])
    with pytest.raises(CorruptCheckpoint, match=r"x\.gz.*truncated"):
        unpacked(path)


@pytest.mark.parametrize("at", [-1, -5, 5000])
def test_a_wrong_byte_is_noticed_when_it_is_opened(tmp_path, at):
    path = packed(tmp_path / "x.gz", text(50_000))
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=r"x\.gz"):
        unpacked(path)


def test_something_else_behind_it_is_corrupt(tmp_path):
    path = packed(tmp_path / "x.gz", b"abc")
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(CorruptCheckpoint, match="something else follows"):
        unpacked(path)


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path):
    squeezed = zlib.compressobj(9, zlib.DEFLATED, 31)
    with (tmp_path / "x.gz").open("wb") as stream:
        for _ in range(120):
            stream.write(squeezed.compress(bytes(1 << 20)))
        stream.write(squeezed.flush())
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(RefusedCheckpoint, match="grows from"):
        unpacked(tmp_path / "x.gz")
    assert time.monotonic() - began < 5 and tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_swarm_of_empty_gzip_files_is_corrupt(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"") * 100_000)
    began = time.monotonic()
    with pytest.raises(CorruptCheckpoint, match="gzip files in"):
        unpacked(tmp_path / "x.gz")
    assert time.monotonic() - began < 2


def test_the_states_of_a_long_file_take_a_bounded_memory(tmp_path, small_steps):
    path = packed(tmp_path / "x.gz", text(2_000_000))
    tracemalloc.start()
    made = unpacked(path)
    assert tracemalloc.get_traced_memory()[0] < 17 * 60_000
    tracemalloc.stop()
    assert made.size == 2_000_000


def test_a_file_that_changed_since_is_an_error_of_ours(tmp_path, small_steps):
    path = packed(tmp_path / "x.gz", text(200_000))
    made = unpacked(path)
    path.write_bytes(os.urandom(path.stat().st_size))
    with pytest.raises(CheckpointError):
        made.read(0, made.size)


def test_the_headers_of_a_packed_archive_cost_no_pass_of_their_own(tmp_path):
    path = pack(tmp_path / "x.nemo", {f"{i}": text(20_000, i) for i in range(20)}, mode="w:gz")
    found = members(File.at(path))
    assert next(iter(found.values())).bytes_read <= path.stat().st_size + 2
    assert contents(found) == {f"{i}": text(20_000, i) for i in range(20)}
