"""Pickles that run code, or drive an unpickler mad, in every place where a checkpoint has one.

A checkpoint of torch may be one, its distributed index is one, and so are ``common.pt`` and the
items inside ``.distcp``. ``{}`` stands for the name of the file that a payload tries to make.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

from tests.hostile.corpus import Group, canary
from tests.hostile.craft import FLOATS, archive, distcp, edit_index, place_of, write_dcp

GROUP = Group("pickles")


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def touch(path: str) -> str:
    return f"touch {path}"


def code(path: str) -> str:
    return f"open({path!r}, 'w')"


CALLS: dict[str, Callable[[str], bytes]] = {
    "os_system": lambda p: b"cos\nsystem\n(" + text(touch(p)) + b"tR.",
    "posix_system": lambda p: b"cposix\nsystem\n" + text(touch(p)) + b"\x85R.",
    "eval": lambda p: b"c__builtin__\neval\n(" + text(code(p)) + b"tR.",
    "exec_of_builtins": lambda p: b"\x80\x04cbuiltins\nexec\n" + text(code(p)) + b"\x85R.",
    "open_for_writing": lambda p: b"cbuiltins\nopen\n(" + text(p) + text("w") + b"tR.",
    "popen": lambda p: b"csubprocess\nPopen\n(]" + text("touch") + b"a" + text(p) + b"atR.",
    "getattr_of_os": lambda p: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n("
        + text("os")
        + b"tR"
        + text("system")
        + b"tR("
        + text(touch(p))
        + b"tR."
    ),
    "inst": lambda p: b"(" + text(touch(p)) + b"ios\nsystem\n.",
    "obj": lambda p: b"(cos\nsystem\n" + text(touch(p)) + b"o.",
    "newobj_of_popen": lambda p: b"\x80\x02cos\npopen\n" + text(touch(p)) + b"\x85\x81.",
    "newobj_ex": lambda p: b"\x80\x04cos\nsystem\n" + text(touch(p)) + b"\x85}\x92.",
    "stack_global": lambda p: (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93" + text(touch(p)) + b"\x85R."
    ),
    "stack_global_of_a_computed_name": lambda p: (
        b"\x80\x04\x8c\x02oscbuiltins\ngetattr\n\x8c\x01.\x8c\x04join\x86R]\x8c\x06systema\x85R"
        b"\x93" + text(touch(p)) + b"\x85R."
    ),
    "stack_global_of_a_dotted_name": lambda p: (
        b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93" + text(touch(p)) + b"\x85R."
    ),
    "dotted_global": lambda p: (
        b"\x80\x04ctorch\nserialization.os.system\n" + text(touch(p)) + b"\x85R."
    ),
    "torch_hub": lambda p: b"ctorch.hub\nload\n(" + text(p) + text("x") + b"tR.",
    "torch_load": lambda p: b"ctorch\nload\n(" + text(p) + b"tR.",
    "torch_extension": lambda p: b"ctorch.utils.cpp_extension\nload_inline\n(" + text(p) + b"tR.",
    "importlib": lambda p: b"cimportlib\nimport_module\n(" + text("antigravity") + b"tR.",
    "a_module_by_its_name_alone": lambda p: b"cantigravity\nfly\n(tR.",
    "shutil": lambda p: b"cshutil\nrmtree\n(" + text(p) + b"tR.",
    "urllib": lambda p: b"curllib.request\nurlopen\n(" + text("http://127.0.0.1:9/") + b"tR.",
    "build_with_setstate": lambda p: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}"
        + text("__setstate__")
        + b"cos\nsystem\nsb"
        + text(touch(p))
        + b"b."
    ),
    "build_on_a_symbol": lambda p: (
        b"\x80\x02cos\nsystem\n}"
        + text("build")
        + b"cbuiltins\neval\nsb"
        + text(touch(p))
        + b"\x85R."
    ),
    "build_with_slots": lambda p: (
        b"\x80\x02ctorch\nSize\n)RN}" + text("__reduce__") + b"cos\nsystem\ns\x86b."
    ),
    "reconstructor": lambda p: (
        b"ccopyreg\n_reconstructor\n(cos\nsystem\ncos\nsystem\n" + text(touch(p)) + b"tR."
    ),
    "newobj_function": lambda p: b"ccopyreg\n__newobj__\n(cos\nsystem\n" + text(touch(p)) + b"tR.",
    "partial_with_state": lambda p: (
        b"cfunctools\npartial\n(cos\nsystem\ntR(cos\nsystem\n(" + text(touch(p)) + b"t}Ntb)R."
    ),
    "rebuild_from_type": lambda p: (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n("
        + text(touch(p))
        + b"t}tR."
    ),
    "operator_attrgetter": lambda p: (
        b"coperator\nattrgetter\n("
        + text("system")
        + b"tR(ctorch.serialization\nos\ntR("
        + text(touch(p))
        + b"tR."
    ),
    "reduce_inside_reduce": lambda p: (
        b"cbuiltins\nmap\n(cos\nsystem\n(" + text(touch(p)) + b"ltR0cbuiltins\nlist\n"
        b"(cbuiltins\nmap\n(cos\nsystem\n(" + text(touch(p)) + b"ltRtR."
    ),
    "persistent_id_that_calls": lambda p: (
        b"\x80\x02("
        + text("storage")
        + b"cos\nsystem\n("
        + text(touch(p))
        + b"tR"
        + text("0")
        + text("cpu")
        + b"K\x04tQ."
    ),
    "persistent_id_module": lambda p: (
        b"\x80\x02("
        + text("module")
        + b"cos\nsystem\n("
        + text(touch(p))
        + b"tR"
        + text("x")
        + text("y")
        + b"tQ."
    ),
    "persistent_id_as_text": lambda p: b"Pcos system\n.",
}

# These do nothing where they are run: they ask in ways that only a careless reader would follow.
LIFELESS = (
    *("newobj_of_popen", "newobj_ex", "reconstructor", "newobj_function", "build_on_a_symbol"),
    *("build_with_slots", "torch_load", "persistent_id_as_text"),
    *("torch_hub", "torch_extension", "importlib", "a_module_by_its_name_alone"),
    *("urllib", "shutil"),
)

BROKEN: dict[str, bytes] = {
    "empty": b"",
    "only_a_stop": b".",
    "no_stop": b"\x80\x02}q\x00",
    "unknown_opcode": b"\x80\x02\xff.",
    "protocol_250": b"\x80\xfa}.",
    "stack_underflow": b"\x80\x02R.",
    "pop_of_nothing": b"0000.",
    "mark_missing": b"\x80\x02t.",
    "tuple3_of_one": b"\x80\x02N\x87.",
    "get_of_nothing": b"\x80\x02h\x07.",
    "get_of_text": b"gx\n.",
    "get_of_a_negative": b"g-1\n.",
    "put_at_4_billion": b"\x80\x02}r\xff\xff\xff\xff.",
    "put_at_10_to_the_18": b"}p1000000000000000000\n.",
    "put_of_nothing": b"q\x00.",
    "memoize_nothing": b"\x80\x04\x94.",
    "ext1": b"\x80\x02\x82\x01.",
    "ext4": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "long4_of_2_gib": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "long4_negative": b"\x80\x02\x8b\xff\xff\xff\xff\x01.",
    "binbytes8_of_an_exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "binunicode8_of_an_exabyte": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytearray8_of_an_exabyte": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
    "binstring_negative": b"T\xff\xff\xff\xffx.",
    "frame_of_an_exabyte": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
    "text_is_not_utf8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "int_of_a_million_digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "long_of_a_million_digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "float_of_nonsense": b"Fone\n.",
    "string_without_quotes": b"Sabc\n.",
    "buffers_out_of_band": b"\x80\x05\x97.",
    "setitem_on_a_number": b"\x80\x02K\x01K\x01K\x01s.",
    "append_to_itself": b"\x80\x02]q\x00h\x00a" * 3 + b".",
    "unhashable_key": b"\x80\x02}]K\x01s.",
    "key_that_is_itself": b"\x80\x02}q\x00h\x00K\x01s.",
    "keys_of_one_hash": b"\x80\x02}("
    + b"".join(
        b"\x8a\x11" + (i * ((1 << 61) - 1) + 1 + (1 << 100)).to_bytes(17, "little") + b"N"
        for i in range(2000)
    )
    + b"u.",
    "tuples_that_double": b"\x80\x02)" + b"2\x86" * 60 + b".",
    "lists_nested_30000_deep": b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b".",
    "tuples_nested_30000_deep": b"\x80\x02)" + b"\x85" * 30_000 + b".",
    "dup_a_hundred_thousand_times": b"\x80\x02N" + b"2" * 100_000 + b".",
    "marks_a_hundred_thousand_times": b"\x80\x02" + b"(" * 100_000 + b".",
    "global_without_end": b"cos\nsystem",
    "global_with_empty_names": b"c\n\n)R.",
    "stack_global_of_numbers": b"\x80\x04K\x01K\x02\x93.",
    "decimal_of_an_exponent": b"cdecimal\nDecimal\n(" + text("1e999999999") + b"tR.",
    "range_of_an_exabyte_as_a_list": b"cbuiltins\nlist\n(cbuiltins\nrange\n(K\x00\x8a\x08"
    + b"\xff" * 7
    + b"\x7fK\x01tRtR.",
    "bytes_of_an_exabyte": b"cbuiltins\nbytes\n\x8a\x08" + b"\xff" * 7 + b"\x7f\x85R.",
    "bytearray_of_an_exabyte": b"cbuiltins\nbytearray\n\x8a\x08" + b"\xff" * 7 + b"\x7f\x85R.",
    "numpy_scalar_of_an_object": b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n("
    + text("O8")
    + b"I0\nI1\ntRC\x08"
    + bytes(8)
    + b"tR.",
}


def whole(folder: Path, data: bytes) -> None:
    """The object of a file of torch is that."""
    (folder / "model.pt").write_bytes(archive(data, {"0": FLOATS}))


def bare(folder: Path, data: bytes) -> None:
    """The file is that, without an archive."""
    (folder / "model.pt").write_bytes(data)


def index(folder: Path, data: bytes) -> None:
    """The index of a distributed checkpoint is that."""
    write_dcp(folder)
    (folder / ".metadata").write_bytes(data)


def common(folder: Path, data: bytes) -> None:
    """What Megatron saved beside the tensors is that."""
    write_dcp(folder, common=archive(data))


def item(folder: Path, data: bytes) -> None:
    """A tensor of a distributed checkpoint is that."""
    write_dcp(folder)
    file = distcp(folder)
    image = archive(data, {"0": FLOATS})

    def change(held: object) -> None:
        place = place_of(held, "a.weight")
        place.offset, place.length = file.stat().st_size, len(image)

    edit_index(folder, change)
    with file.open("ab") as stream:
        stream.write(image)


def beside(folder: Path, data: bytes) -> None:
    """An entry beside the weights is that."""
    from tests.hostile.craft import pickled, storage, tensor

    start = pickled({"a": tensor(storage())})[:-1]
    body = data[2:-1] if data.startswith(b"\x80") else data[:-1]
    (folder / "model.pt").write_bytes(archive(start + text("x") + body + b"s.", {"0": FLOATS}))


HOSTS = {"whole": "model.pt", "index": ".metadata", "item": ".distcp", "common": "common.pt"}
# Objects of a class that nobody knows, and plain values, are kept as data: no weight is in them.
INERT = {
    "whole": (
        "newobj_of_popen",
        "newobj_ex",
        "reconstructor",
        "newobj_function",
        "decimal_of_an_exponent",
        "numpy_scalar_of_an_object",
    ),
    "common": ("global_with_empty_names",),
}
_AS_VALUES = (
    "tuples_that_double",
    "lists_nested_30000_deep",
    "tuples_nested_30000_deep",
    "append_to_itself",
    "only_a_stop",
    "decimal_of_an_exponent",
    "frame_of_an_exabyte",
    "dup_a_hundred_thousand_times",
    "marks_a_hundred_thousand_times",
    "text_is_not_utf8",
    "numpy_scalar_of_an_object",
    "keys_of_one_hash",
)


def _case(host: str, data: Callable[[str], bytes]) -> Callable[[Path], None]:
    return lambda folder: globals()[host](folder, data(os.fspath(canary(folder))))


for host, file in HOSTS.items():
    for name, payload in CALLS.items():
        # What lies beside the weights is kept as data, with a mark where a call would have been.
        kind = "either" if host == "common" else "bad"
        kind = "inert" if name in INERT.get(host, ()) else kind
        GROUP.add(f"{host}_{name}", _case(host, payload), file=file, kind=kind)
    for name, broken in BROKEN.items():
        kind = "either" if host == "common" and name in _AS_VALUES else "bad"
        if name in (
            "dup_a_hundred_thousand_times",
            "marks_a_hundred_thousand_times",
            "frame_of_an_exabyte",
        ):
            kind = "either"  # odd, and yet the value of it is plain
        kind = "inert" if name in INERT.get(host, ()) else kind
        GROUP.add(
            f"{host}_{name}",
            _case(host, lambda p, b=broken: b),
            file=file,
            kind=kind,
            errors="CorruptCheckpoint|RefusedCheckpoint",
        )
for name, payload in CALLS.items():
    GROUP.add(
        f"bare_{name}",
        _case("bare", payload),
        file="model.pt",
        errors="UnknownFormat|CorruptCheckpoint|RefusedCheckpoint",
    )
    if b"Q." not in payload("") and name != "persistent_id_as_text":
        GROUP.add(f"beside_{name}", _case("beside", payload), file="model.pt", kind="either")
