"""Safetensors files: the header is JSON, and every number in it can be a lie."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.corpus import REFUSED, Group, Target
from tests.hostile.craft import EXABYTE, STATE, entry, safetensors

GROUP = Group("safetensors")
NAME = "model.safetensors"
FOUR = bytes(4)


def lie(name: str, header: object, data: bytes = FOUR, says: str = "", **said: object) -> None:
    """A case of one file whose header is ``header``."""

    def make(folder: Path) -> None:
        (folder / NAME).write_bytes(safetensors(header, data))

    GROUP.add(name, make, file=NAME, says=says, **{"errors": "CorruptCheckpoint", **said})


def raw(name: str, data: bytes, **said: object) -> None:
    def make(folder: Path) -> None:
        (folder / NAME).write_bytes(data)

    GROUP.add(name, make, file=NAME, **said)


raw("header_length_is_an_exabyte", struct.pack("<Q", EXABYTE) + b"{}" * 50, says=r"\d{6}")
raw("header_length_is_all_ones", b"\xff" * 8 + b"{}" * 50)
raw("header_length_is_beyond_the_file_by_one", safetensors({"a": entry(0, 4)}, length=500))
raw("header_length_is_zero", bytes(8) + b"{}" + FOUR)
raw("only_the_length", struct.pack("<Q", 2))
raw("seven_bytes", b"\x02" + bytes(6), errors="CorruptCheckpoint|UnknownFormat")
raw("header_is_no_json", safetensors(b'{"a": ' + b"x" * 20))
raw("header_is_not_utf8", safetensors(b'{"\xff\xfe": 1}' + b" " * 20))
raw("header_is_cut_in_the_middle", safetensors({"a": entry(0, 4)}, FOUR)[:40])
raw("header_has_a_byte_order_mark", safetensors(b"\xef\xbb\xbf" + json.dumps({}).encode()))
raw("header_begins_with_blanks", safetensors(b"  " + json.dumps({"a": entry(0, 4)}).encode(), FOUR))
raw("header_is_nested_100000_deep", safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
raw(
    "header_has_nan", safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR)
)
raw(
    "key_stands_twice",
    safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
    ),
    says="a",
)
raw(
    "field_stands_twice",
    safetensors(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
    ),
    kind="either",
)
raw(
    "number_of_5000_digits",
    safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', FOUR),
)

lie("header_is_a_list", [1, 2])
lie("header_is_null", None)
lie("entry_is_a_number", {"a": 3}, says="a")
lie("entry_is_empty", {"a": {}}, says="a")
lie("no_offsets", {"a": {"dtype": "F32", "shape": [1]}}, says="a")
lie("three_offsets", {"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, says="a")
lie("offsets_are_text", {"a": {**entry(0, 4), "data_offsets": ["0", "4"]}}, says="a")
lie("offsets_are_fractions", {"a": {**entry(0, 4), "data_offsets": [0.0, 4.0]}}, says="a")
lie(
    "offsets_are_booleans",
    {"a": {**entry(0, 1, (1,), "U8"), "data_offsets": [False, True]}},
    b"\0",
    says="a",
)
lie("offsets_are_negative", {"a": entry(-4, 0)}, says="a")
lie("offsets_run_backwards", {"a": entry(4, 0)}, says="a")
lie("offsets_overlap", {"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), says="b")
lie("offsets_leave_a_gap", {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), says="b")
lie("offsets_are_the_same", {"a": entry(0, 4), "b": entry(0, 4)}, says="b")
lie("data_ends_early", {"a": entry(0, 400, (100,))}, says="4")
lie("data_goes_on", {"a": entry(0, 4)}, bytes(100), says="96")
lie("shape_does_not_multiply", {"a": entry(0, 4, (2, 3))}, says="a")
lie("shape_is_negative", {"a": entry(0, 4, (-1, -1))}, says="a")
lie("shape_is_a_number", {"a": {**entry(0, 4), "shape": 1}}, says="a")
lie("shape_holds_text", {"a": entry(0, 4, ("1",))}, says="a")
lie("shape_holds_a_fraction", {"a": entry(0, 4, (1.0,))}, says="a")
lie("shape_of_an_exabyte", {"a": entry(0, EXABYTE, (EXABYTE // 4,))}, says=str(EXABYTE))
lie("shape_that_overflows_64_bits", {"a": entry(0, 0, (1 << 32, 1 << 32, 4))}, b"", says="a")
lie("shape_of_zero_and_an_exabyte_squared", {"a": entry(0, 4, (0, 1 << 62, 1 << 62))}, says="a")
lie("a_hundred_thousand_dims", {"a": entry(0, 4, (1,) * 100_000)}, says="a", kind="either")
lie("unknown_dtype", {"a": entry(0, 4, (1,), "F77")}, says="F77")
lie("dtype_is_null", {"a": {**entry(0, 4), "dtype": None}}, says="a")
lie("dtype_is_a_list", {"a": {**entry(0, 4), "dtype": ["F32"]}}, says="a")
lie("dtype_is_a_long_text", {"a": entry(0, 4, (1,), "F" * 1_000_000)}, says="a")
lie("metadata_is_a_list", {"__metadata__": [1], "a": entry(0, 4)})
lie("metadata_holds_numbers", {"__metadata__": {"a": 1}, "a": entry(0, 4)})
lie("name_is_half_a_character", {"\ud800": entry(0, 4)})
lie(
    "many_tensors_at_one_place",
    {f"t{i}": entry(0, 4) for i in range(30_000)},
    says="t",
)
lie(
    "tensors_of_nothing_and_one_lie",
    {**{f"t{i}": entry(0, 0, (0,)) for i in range(30_000)}, "u": entry(0, 8)},
    says="u",
)


@GROUP.bad(file=NAME, errors=REFUSED, says="LFS")
def a_pointer_of_git_lfs(folder):
    (folder / NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@GROUP.bad(file=NAME, errors=REFUSED, says="web page")
def a_web_page(folder):
    (folder / NAME).write_text("<!DOCTYPE html><html>404</html>")


@GROUP.bad(file="", errors="StorageError|UnknownFormat|CorruptCheckpoint", says="model.safetensors")
def the_file_is_a_folder(folder):
    (folder / NAME).mkdir()


@GROUP.good()
def names_with_dots_slashes_blanks_stars(folder):
    names = ("a.b.c", "a/b", "a b", "*", "layers.*.weight", "..", "../../x", "/abs", "ünï", "日本")
    state = {name: torch.tensor([float(i)]) for i, name in enumerate((*names, "", "a\\b", "a\nb"))}
    save_file(state, folder / NAME)
    return state


@GROUP.good()
def zero_size_and_scalar(folder):
    state = {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "none": torch.empty(2, 0, 4)}
    save_file(state, folder / NAME)
    return state


@GROUP.good()
def an_aligned_header_and_metadata_with_a_target(folder):
    said = {"format": "pt", "_target_": "os.system", "x": "!!python/object/apply:os.system"}
    save_file(STATE, folder / NAME, metadata=said)
    return STATE


@GROUP.good()
def pointed_at_the_file_itself(folder):
    save_file(STATE, folder / "any_name.safetensors")
    return Target("any_name.safetensors", STATE)


@GROUP.good()
def no_tensor_at_all_beside_one(folder):
    save_file({}, folder / "model-00001-of-00002.safetensors")
    save_file(STATE, folder / "model-00002-of-00002.safetensors")
    return STATE
