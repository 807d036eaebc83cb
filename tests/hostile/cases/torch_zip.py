"""What torch.save writes today: a zip archive with a pickle and the storages."""

import argparse
import datetime
import io
import pathlib
import struct
import zipfile
from pathlib import Path

import numpy
import torch

from tests.hostile.corpus import DAMAGED, REFUSED, Group, Target
from tests.hostile.craft import EXABYTE, FLOATS, STATE, archive, pickled, saved, storage, tensor

GROUP = Group("torch_zip")
NAME = "model.pt"
GOOD = pickled({"a": tensor(storage())})
HELD = {"0": FLOATS}


def lie(name: str, data: bytes, **said: object) -> None:
    def make(folder: Path) -> None:
        (folder / NAME).write_bytes(data)

    GROUP.add(name, make, **{"file": NAME, **said})


def of(*args: object, **said: object) -> bytes:
    """A file of one tensor called 'a' that is rebuilt from these arguments."""
    return archive(pickled({"a": tensor(*args)}), HELD)


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


def in_directory(member: str, at: int, form: str, value: int) -> bytes:
    """A good file, with a field changed in the directory entry of ``member``."""
    data = archive(GOOD, HELD)
    entry = data.rindex(f"archive/{member}".encode()) - 46
    return patched(data, entry + at, form, value)


def at_end(at: int, form: str, value: int) -> bytes:
    data = archive(GOOD, HELD)
    return patched(data, data.rindex(b"PK\x05\x06") + at, form, value)


lie("storage_is_missing", archive(GOOD), says="'0'")
lie("storage_is_too_short", archive(GOOD, {"0": FLOATS[:-1]}), says="data/0")
lie("storage_key_leads_up", archive(pickled({"a": tensor(storage("../../x"))}), HELD), says="x")
lie("storage_key_is_absolute", archive(pickled({"a": tensor(storage("/etc/passwd"))}), HELD))
lie("storage_has_negative_length", of(storage(numel=-1)))
lie("storage_is_an_exabyte", of(storage(numel=EXABYTE), 0, (EXABYTE,)), says="data/0")
lie("storage_length_has_a_thousand_digits", of(storage(numel=10**1000)))
lie("storage_length_is_a_fraction", of(storage(numel=4.0)))
lie("storage_kind_is_quantized", of(storage(kind=torch.QInt8Storage)), errors=REFUSED)
lie("storage_kind_is_text", of(storage(kind="FloatStorage")))
lie("offset_is_negative", of(storage(), -1), says="'a'")
lie("offset_is_beyond", of(storage(), 4, (1,)), says="'a'")
lie("offset_is_an_exabyte", of(storage(), EXABYTE, (1,)), says="'a'")
lie("offset_is_text", of(storage(), "0"))
lie("size_is_too_large", of(storage(), 0, (5,)), says="'a'")
lie("size_is_negative", of(storage(), 0, (-4,)), says="'a'")
lie("size_is_boolean", of(storage(), 0, (True,)), says="'a'")
lie("size_is_a_list", of(storage(), 0, [4]))
lie(
    "size_has_a_hundred_thousand_dims", of(storage(), 0, (1,) * 100_000, (1,) * 100_000), says="'a'"
)
lie("size_overflows_64_bits", of(storage(), 0, (1 << 32, 1 << 32), (0, 0)), says="'a'")
lie("strides_are_negative", of(storage(), 3, (4,), (-1,)), says="'a'")
lie("strides_are_too_few", of(storage(), 0, (2, 2), (1,)), says="'a'")
lie("strides_reach_beyond", of(storage(), 0, (2, 2), (4, 1)), says="'a'")
lie("strides_of_zero_claim_an_exabyte", of(storage(), 0, (1 << 40, 1 << 18), (0, 0)), says="a")
lie(
    "storage_says_one_dtype_and_another",
    kind="either",
    data=archive(
        pickled({"a": tensor(storage()), "b": tensor(storage(kind=torch.DoubleStorage), 0, (2,))}),
        HELD,
    ),
)
lie(
    "two_names_fold_to_one",
    archive(pickled({"a.b": tensor(storage()), "a": {"b": tensor(storage())}}), HELD),
    says="a.b",
)
lie("value_is_a_tensor", saved(torch.ones(2)), errors=REFUSED)
lie(
    "value_is_nested_in_itself",
    archive(b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01h\x00s.", HELD),
    kind="either",
)
lie("two_pickles", archive(GOOD, HELD, extra=[("other/data.pkl", GOOD)]), says="2")
lie("no_pickle", archive(GOOD, HELD).replace(b"data.pkl", b"data.pkx"))
lie("pickle_member_twice", archive(GOOD, HELD, extra=[("archive/data.pkl", GOOD)]), says="data.pkl")
lie("storage_member_twice", archive(GOOD, HELD, extra=[("archive/data/0", FLOATS)]), says="data/0")
lie("member_leads_up", archive(GOOD, HELD, extra=[("../../evil", b"x")]), kind="either")
lie("compressed", archive(GOOD, HELD, method=zipfile.ZIP_DEFLATED), errors=REFUSED)
lie(
    "compressed_bomb",
    archive(
        pickled({"a": tensor(storage(numel=1 << 24), 0, (1 << 24,))}),
        {"0": bytes(1 << 26)},
        method=zipfile.ZIP_DEFLATED,
    ),
    errors=REFUSED,
)
lie(
    "compressed_pickle_bomb",
    archive(
        b"\x80\x02B" + struct.pack("<I", 1 << 26) + bytes(1 << 26) + b".",
        method=zipfile.ZIP_DEFLATED,
    ),
    errors=REFUSED,
)
lie("encrypted", in_directory("data.pkl", 8, "<H", 1), errors=REFUSED)
lie("size_in_directory_is_4_gib", in_directory("data/0", 24, "<I", 0xFFFFFFFE))
lie("size_in_directory_is_in_a_missing_extra", in_directory("data/0", 24, "<I", 0xFFFFFFFF))
lie(
    "both_sizes_in_directory_are_wrong",
    patched(
        in_directory("data/0", 24, "<I", 1 << 30),
        archive(GOOD, HELD).rindex(b"archive/data/0") - 46 + 20,
        "<I",
        1 << 30,
    ),
    says="data/0",
)
lie("header_of_a_member_is_elsewhere", in_directory("data/0", 42, "<I", 3), says="data/0")
lie("header_of_a_member_is_beyond", in_directory("data/0", 42, "<I", 0x7FFFFFFF))
lie("name_in_directory_is_endless", in_directory("data/0", 28, "<H", 0xFFFF))
lie("directory_has_more_members", at_end(10, "<H", 500), says="500")
lie("directory_has_fewer_members", at_end(10, "<H", 1))
lie("directory_is_beyond_the_file", at_end(16, "<I", 0x7FFFFFFF))
lie("directory_is_of_zip64_and_missing", at_end(10, "<H", 0xFFFF))
lie("a_million_members_in_20_bytes", at_end(12, "<I", 0))
lie("torchscript", archive(GOOD, HELD, extra=[("archive/code/__torch__.py", b"x")]), errors=REFUSED)
lie("big_endian", archive(GOOD, HELD).replace(b"little", b"bigger"), errors=DAMAGED + "|" + REFUSED)
lie("byteorder_of_4_gib", in_directory("byteorder", 24, "<I", 0xFFFFFFF0), kind="either")


@GROUP.bad(file=NAME)
def two_archives_one_after_the_other(folder):
    """Which one is meant depends on who reads it: places in the second count from its own start."""
    evil = archive(pickled({"a": tensor(storage(), 0, (3,))}), HELD)
    (folder / NAME).write_bytes(evil + archive(GOOD, HELD))


def good(value: object) -> object:
    """A file of ``value``, of which the tensors are what is expected."""

    def make(folder: Path) -> dict[str, torch.Tensor]:
        (folder / NAME).write_bytes(saved(value))
        return {name: t for name, t in value.items() if isinstance(t, torch.Tensor)}

    return make


BASE = torch.arange(24.0)
for name, value in {
    "views_of_one_storage": {
        "whole": BASE,
        "part": BASE[5:9],
        "turned": BASE.view(4, 6).T,
        "steps": BASE[::3],
        "last": BASE[-1:],
        "column": BASE.view(4, 6)[:, 1:3],
    },
    "strides_of_zero": {"a": torch.tensor([2.0]).expand(4, 5), "b": torch.ones(3, 1).expand(3, 4)},
    "zero_size_and_scalar": {"a": torch.empty(0, 7), "b": torch.tensor(True), "c": torch.tensor(9)},
    "odd_names": {"ünï": BASE, "a/b": BASE, "": BASE, "*": BASE, "a b": BASE, "a.b": BASE},
    "numbers_as_names": {"0": BASE, "1.2": BASE},
    "objects_beside_weights": {
        "a": BASE,
        "args": argparse.Namespace(path=pathlib.PurePosixPath("/x"), n=numpy.int64(3)),
        "time": datetime.timedelta(seconds=3),
        "numbers": {"f": numpy.float32(1), "b": numpy.bool_(True), "c": complex(1, 2)},
        "nothing": b"",
        "loss": float("nan"),
    },
}.items():
    GROUP.add(name, good(value), kind="good")


@GROUP.good()
def written_by_a_program_that_streams(folder):
    """Members of which the local headers do not know the size."""

    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *args: int) -> int:
            raise io.UnsupportedOperation

        def tell(self) -> int:
            raise io.UnsupportedOperation

    out = Unseekable()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", GOOD)
        file.writestr("archive/data/0", FLOATS)
    (folder / NAME).write_bytes(out.getvalue())
    return {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}


@GROUP.good()
def zip64_throughout(folder):
    with zipfile.ZipFile(folder / NAME, "w") as file:
        for name, data in {"archive/data.pkl": GOOD, "archive/data/0": FLOATS}.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(data)
    return {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}


@GROUP.good()
def wrapped_by_lightning(folder):
    value = {
        "state_dict": STATE,
        "epoch": 1,
        "callbacks": {},
        "hyper_parameters": {"_target_": "os"},
    }
    (folder / "last.ckpt").write_bytes(saved(value))
    return Target("last.ckpt", STATE)
