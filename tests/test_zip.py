"""Archives whose directory says another thing than what lies in them."""

import struct
import zipfile

import pytest
import torch

from bioinit.contexts import open_checkpoint
from bioinit.errors import CorruptCheckpoint
from bioinit.storage import File
from bioinit.storage.zip import data_start, members

ENTRY_HEADER = 42


@pytest.fixture
def path(tmp_path):
    torch.save({"a": torch.zeros(16), "b": torch.ones(16)}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def entries(data):
    """Where the directory has each member, by the last part of its name."""
    found, at = {}, data.find(b"PK\x01\x02")
    while data[at : at + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<3H", data, at + 28)
        found[bytes(data[at + 46 : at + 46 + name]).decode().partition("/")[2]] = at
        at += 46 + name + extra + comment
    return found


def place(data, at):
    return slice(at + ENTRY_HEADER, at + ENTRY_HEADER + 4)


def exchanged(data, at):
    one, other = place(data, at["data/0"]), place(data, at["data/1"])
    data[one], data[other] = data[other], data[one]


def both_at_one(data, at):
    data[place(data, at["data/1"])] = data[place(data, at["data/0"])]


def one_inside_the_other(data, at):
    (header,) = struct.unpack_from("<I", data, at["data/0"] + ENTRY_HEADER)
    struct.pack_into("<I", data, at["data/1"] + ENTRY_HEADER, header + 40)


def longer_than_its_place(data, at):
    for field in (20, 24):
        struct.pack_into("<I", data, at["data/0"] + field, 400)


def pushed_into_the_next(data, at):
    (header,) = struct.unpack_from("<I", data, at["data/0"] + ENTRY_HEADER)
    (extra,) = struct.unpack_from("<H", data, header + 28)
    struct.pack_into("<H", data, header + 28, extra + 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (exchanged, "data/0 begins at byte .* and another does"),
        (both_at_one, "begins at byte"),
        (one_inside_the_other, "begins at byte"),
        (longer_than_its_place, "begins at byte"),
        (pushed_into_the_next, "data/0 ends at byte"),
    ],
)
def test_a_member_that_lies_elsewhere_is_corrupt(change, said, path):
    data = bytearray(path.read_bytes())
    change(data, entries(data))
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=said):
        open_checkpoint(path)


def test_names_that_are_no_text_and_members_out_of_order_are_found(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("aa", "bb"):
            archive.writestr(name, name * 5)
        archive.filelist.reverse()
    path.write_bytes(path.read_bytes().replace(b"bb", b"\xff\xfe"))
    file = File.at(path)
    found = members(file)
    assert [file.read(data_start(file, n, m), m.size)[:1] for n, m in found.items()] == [
        b"\xff",
        b"a",
    ]
