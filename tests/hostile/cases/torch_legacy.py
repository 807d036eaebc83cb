"""What torch.save wrote before 1.6: five pickles in a row, then the storages."""

import io
import pickle
import struct
from pathlib import Path

import torch

from tests.hostile.corpus import REFUSED, Group, canary
from tests.hostile.craft import EXABYTE, FLOATS, STATE, Call, pickled, saved, storage, tensor

GROUP = Group("torch_legacy")
NAME = "pytorch_model.bin"
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}


def legacy(
    value: object,
    keys: object = ("0",),
    storages: bytes = struct.pack("<q", 4) + FLOATS,
    *,
    magic: object = MAGIC,
    version: object = 1001,
    system: object = SYSTEM,
) -> bytes:
    parts = (magic, version, system, value, list(keys) if isinstance(keys, tuple) else keys)
    return b"".join(map(pickled, parts)) + storages


def old_storage(numel: object = 4, key: str = "0", view: object = None):
    pid = storage(key, numel)
    pid.value = (*pid.value, view)
    return pid


GOOD = {"a": tensor(old_storage())}


def lie(name: str, data: bytes, **said: object) -> None:
    def make(folder: Path) -> None:
        (folder / NAME).write_bytes(data)

    GROUP.add(name, make, **{"file": NAME, **said})


def count(number: int) -> bytes:
    return struct.pack("<q", number) + FLOATS


lie("magic_and_nothing_else", pickled(MAGIC))
lie("wrong_version", legacy(GOOD, version=7), says="1001")
lie("version_is_text", legacy(GOOD, version="1001"), says="1001")
lie("big_endian", legacy(GOOD, system={"little_endian": False}), errors=REFUSED, says="byte")
lie("keys_are_a_dict", legacy(GOOD, {"0": 1}), says="dict")
lie("keys_are_numbers_of_a_thousand_digits", legacy(GOOD, [10**1000]))
lie("key_is_missing", legacy(GOOD, ()), says="'0'")
lie("key_is_unknown", legacy(GOOD, ("0", "1"), count(4) * 2), says="'1'")
lie("key_stands_twice", legacy(GOOD, ("0", "0"), count(4) * 2), kind="either")
lie("count_is_negative", legacy(GOOD, storages=count(-4)), says="-4")
lie("count_is_an_exabyte", legacy(GOOD, storages=count(EXABYTE)), says=str(EXABYTE))
lie(
    "both_counts_are_an_exabyte",
    legacy({"a": tensor(old_storage(EXABYTE))}, storages=count(EXABYTE)),
    says="'0'",
)
lie("storages_end_early", legacy(GOOD, storages=count(4)[:-1]), says="'0'")
lie("storages_are_missing", legacy(GOOD, storages=b""))
lie("tensor_reaches_beyond_its_storage", legacy({"a": tensor(old_storage(), 1)}), says="'a'")
lie("tensor_has_negative_strides", legacy({"a": tensor(old_storage(), 3, (4,), (-1,))}), says="'a'")
lie("tensor_begins_before_its_storage", legacy({"a": tensor(old_storage(), -1)}), says="'a'")
lie(
    "view_reaches_beyond_its_storage",
    legacy({"a": tensor(old_storage(view=("1", 2, 50)), 0, (50,))}),
    says="'a'",
)
lie("view_is_no_view", legacy({"a": tensor(old_storage(view=(1, 2, 3, 4)))}))
lie("a_pickle_in_the_middle_breaks_off", legacy(GOOD)[:60])


@GROUP.bad(file=NAME, errors=REFUSED, says="tar")
def a_tar_of_torch_0_1(folder):
    import tarfile

    with tarfile.open(folder / NAME, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


@GROUP.inert()
def an_object_beside_the_weights_asks_for_a_call(folder):
    import os

    evil = Call(os.system, f"touch {canary(folder)}")
    (folder / NAME).write_bytes(legacy({**GOOD, "optimizer": evil}))


@GROUP.bad(file=NAME, errors="CorruptCheckpoint")
def the_keys_are_the_result_of_a_call(folder):
    import os

    evil = Call(os.system, f"touch {canary(folder)}")
    (folder / NAME).write_bytes(legacy(GOOD, evil))


@GROUP.bad(file=NAME, errors="CorruptCheckpoint")
def the_magic_number_is_the_result_of_a_call(folder):
    import os

    evil = Call(os.system, f"touch {canary(folder)}")
    (folder / NAME).write_bytes(pickled(MAGIC)[:-1] + b"0" + pickled(evil)[2:] + legacy(GOOD))


@GROUP.good()
def as_it_should_be(folder):
    (folder / NAME).write_bytes(saved(STATE, old=True))
    return STATE


@GROUP.good()
def views_of_one_storage(folder):
    base = torch.arange(24.0)
    state = {
        "all": base,
        "back": base[3:9],
        "turned": base.view(4, 6).T,
        "same": torch.tensor(1.5).expand(3, 4),
        "column": base.view(4, 6)[:, 2],
    }
    (folder / NAME).write_bytes(saved(state, old=True))
    return state


@GROUP.good()
def the_object_is_pickled_by_protocol_4(folder):
    buffer = io.BytesIO()
    torch.save(
        STATE, buffer, _use_new_zipfile_serialization=False, pickle_protocol=pickle.HIGHEST_PROTOCOL
    )
    (folder / NAME).write_bytes(buffer.getvalue())
    return STATE
