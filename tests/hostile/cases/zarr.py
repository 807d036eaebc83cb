"""Directories of zarr arrays: a header and a file per chunk, some of them packed."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hostile.corpus import REFUSED, UNFINISHED, Group, canary
from tests.hostile.craft import (
    CONFIG,
    EXABYTE,
    STATE,
    archive,
    pickled,
    write_array,
    write_zarr,
)
from tests.hostile.craft import Call as Calls

GROUP = Group("zarr")
NAME = "a.weight"
HEADER = ".zarray"
CHUNK = "0.0"
ZLIB = {"id": "zlib", "level": 1}


def header(
    name: str,
    *,
    text: bytes | None = None,
    drop: str = "",
    kind: str = "bad",
    errors: str = "CorruptCheckpoint|RefusedCheckpoint|UnfinishedCheckpoint",
    says: str = NAME,
    **said: Any,
) -> None:
    """A good checkpoint, in the header of one array of which something else stands."""

    def make(folder: Path) -> None:
        write_zarr(folder)
        file = folder / NAME / HEADER
        held = {**json.loads(file.read_text()), **said}
        held.pop(drop, None)
        file.write_bytes(json.dumps(held).encode() if text is None else text)

    GROUP.add(name, make, kind=kind, errors=errors, says=says, file=NAME)


header("header_is_empty", text=b"")
header("header_is_no_json", text=b"{")
header("header_is_a_list", text=b"[]")
header("header_is_not_utf8", text=b'{"\xff": 1}')
header("header_is_nested_100000_deep", text=b"[" * 100_000)
header("header_is_of_2_mib", text=b" " * (2 << 20) + b"{}")
header("shape_stands_twice", text=b'{"shape": [3, 4], "shape": [3, 5], "chunks": [3, 4]}')
for key in ("shape", "chunks", "dtype", "zarr_format"):
    header(f"{key}_is_missing", drop=key)
header("format_is_3", zarr_format=3)
header("shape_is_negative", shape=[-3, 4])
header("shape_holds_fractions", shape=[3.0, 4.0])
header("shape_holds_booleans", shape=[True, 4])
header("shape_is_a_number", shape=12)
header("shape_is_an_exabyte", shape=[EXABYTE, 4])
header("shape_is_an_exabyte_and_chunks_too", shape=[EXABYTE, 4], chunks=[EXABYTE, 4])
header("shape_is_an_exabyte_of_zeros", shape=[EXABYTE // 4, 1], chunks=[3, 4], fill_value=0.0)
header(
    "shape_is_an_exabyte_of_zeros_in_one_chunk",
    shape=[1 << 40, 1 << 18],
    chunks=[1 << 40, 1 << 18],
    fill_value=0.0,
)
header("shape_overflows", shape=[1 << 63, 1 << 63])
header("shape_has_10_to_the_5_dims", shape=[1] * 100_000, chunks=[1] * 100_000)
header("shape_of_a_thousand_digits", shape=[10**1000, 4])
header("a_number_of_5000_digits", text=b'{"shape": [' + b"9" * 5000 + b"]}")
header("chunks_are_zero", chunks=[0, 4])
header("chunks_are_negative", chunks=[-3, 4])
header("chunks_have_other_dims", chunks=[12])
header("chunks_are_smaller_than_the_file", chunks=[1, 4])
header("chunks_are_larger_than_the_file", chunks=[6, 4])
header("chunks_are_larger_than_anything", chunks=[EXABYTE, EXABYTE])
header("ten_to_the_18_chunks", shape=[10**9, 10**9], chunks=[1, 1])
header("dtype_is_unknown", dtype="<f77")
header("dtype_is_an_object", dtype="|O", errors=REFUSED + "|CorruptCheckpoint")
header("dtype_is_structured", dtype=[["a", "<f4"], ["b", "<i4"]])
header("dtype_is_text", dtype="<U4")
header("dtype_is_void", dtype="|V4")
header("dtype_is_big_endian", dtype=">f4", kind="either")
header("dtype_is_wider_than_the_file", dtype="<f8")
header("dtype_is_null", dtype=None)
header("order_is_unknown", order="K")
header("order_is_fortran", order="F", kind="either")
header("fill_value_is_a_target", fill_value={"_target_": "os.system"}, kind="either")
header("separator_leads_up", dimension_separator="/../")
header("separator_is_a_nul", dimension_separator="\0")
header("separator_is_empty", dimension_separator="")
header("compressor_is_text", compressor="zlib")
header("compressor_is_unknown", compressor={"id": "evil"}, errors=REFUSED, says="evil")
header("compressor_is_a_pickle", compressor={"id": "pickle"}, errors=REFUSED, says="pickle")
header("compressor_has_no_name", compressor={"level": 1})
header("compressor_is_a_list", compressor=[ZLIB])
header("filter_makes_objects", filters=[{"id": "vlen-utf8"}], errors=REFUSED, says="vlen")
header("filter_is_a_pickle", filters=[{"id": "pickle"}], errors=REFUSED, says="pickle")
header("filters_are_a_dict", filters={"id": "delta"})
header("a_thousand_filters", filters=[{"id": "delta", "dtype": "<f4"}] * 1000, kind="either")
header("delta_of_objects", filters=[{"id": "delta", "dtype": "|O"}])
header("chunk_is_not_packed_as_it_says", compressor=ZLIB)


def packed(name: str, chunk: bytes, compressor: Any = None, size: int = 1024, **said: Any) -> None:
    """An array of ``size`` floats in one chunk, which is ``chunk``."""

    def make(folder: Path) -> None:
        write_array(
            folder,
            NAME,
            torch.zeros(size),
            compressor=compressor or ZLIB,
            pack=lambda raw: chunk,
            **said.get("header", {}),
        )

    options = {key: value for key, value in said.items() if key != "header"}
    GROUP.add(name, make, **{"file": NAME, **options})


RAW = bytes(4096)
GZIP = {"id": "gzip", "level": 1}
BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
packed("zlib_bomb", zlib.compress(bytes(200 << 20)))
packed("zlib_bomb_of_zlib", zlib.compress(zlib.compress(bytes(200 << 20))))
packed("zlib_is_cut", zlib.compress(RAW)[:-5])
packed("zlib_is_damaged", zlib.compress(os.urandom(4096))[:40] + b"x" * 40)
packed("zlib_of_too_little", zlib.compress(RAW[:-1]))
packed("zlib_of_too_much", zlib.compress(RAW + b"x"))
packed("zlib_is_empty", b"")
packed("gzip_is_garbage", b"\x1f\x8b" + b"x" * 100, GZIP)
packed(
    "blosc_header_claims_2_gib",
    b"\x02\x01\x01\x04" + struct.pack("<III", 0x7FFFFFFF, 4096, 80) + bytes(64),
    BLOSC,
)
packed("blosc_header_is_short", b"\x02\x01\x01", BLOSC)
packed("blosc_is_all_ones", b"\xff" * 200, BLOSC)
packed("blosc_of_too_little", b"\x02\x01\x02\x04" + struct.pack("<III", 4, 4, 20) + bytes(4), BLOSC)
packed(
    "zstd_claims_an_exabyte",
    b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", EXABYTE) + bytes(30),
    {"id": "zstd", "level": 1},
)
packed("zstd_is_garbage", b"\x28\xb5\x2f\xfd" + b"x" * 100, {"id": "zstd", "level": 1})
packed("lz4_claims_2_gib", struct.pack("<I", 0x7FFFFFFF) + bytes(50), {"id": "lz4"})
packed("lz4_claims_a_negative_size", struct.pack("<i", -1) + bytes(50), {"id": "lz4"})
packed("bz2_is_garbage", b"BZh9" + b"x" * 100, {"id": "bz2", "level": 1})
packed("lzma_is_garbage", b"\xfd7zXZ\0" + b"x" * 100, {"id": "lzma"})
packed(
    "a_filter_between_divides_by_nothing",
    zlib.compress(RAW),
    header={
        "filters": [
            {"id": "fixedscaleoffset", "scale": 0, "offset": 0, "dtype": "<f4", "astype": "<f4"}
        ]
    },
    kind="either",
)


def zstd_bomb(folder: Path) -> None:
    numcodecs = pytest.importorskip("numcodecs")
    write_array(
        folder,
        NAME,
        torch.zeros(1024),
        compressor={"id": "zstd", "level": 1},
        pack=lambda raw: bytes(numcodecs.Zstd().encode(bytes(100 << 20))),
    )


GROUP.add("zstd_bomb", zstd_bomb, file=NAME)


@GROUP.bad(file=NAME, says="0.0")
def a_chunk_is_cut(folder):
    write_zarr(folder)
    os.truncate(folder / NAME / CHUNK, 47)


@GROUP.bad(file=NAME, says="9.9")
def a_chunk_outside_of_the_grid(folder):
    write_zarr(folder)
    (folder / NAME / "9.9").write_bytes(bytes(48))


@GROUP.bad(file=NAME, says="-1")
def a_chunk_with_a_negative_place(folder):
    write_zarr(folder)
    (folder / NAME / "-1.0").write_bytes(bytes(48))


@GROUP.bad(file=NAME, errors=UNFINISHED)
def most_chunks_are_missing(folder):
    write_zarr(folder)
    (folder / NAME / CHUNK).unlink()


@GROUP.bad(file=NAME, errors=UNFINISHED, says="partial")
def a_chunk_whose_writer_was_stopped(folder):
    write_zarr(folder)
    (folder / NAME / f"0.0.{'a' * 32}.partial").write_bytes(b"x")


@GROUP.bad(file=NAME)
def the_header_is_missing(folder):
    write_zarr(folder)
    (folder / NAME / HEADER).unlink()


@GROUP.bad(errors=UNFINISHED, file="metadata.json")
def the_last_file_is_missing(folder):
    write_zarr(folder)
    (folder / "metadata.json").unlink()


@GROUP.bad(file="metadata.json", errors=REFUSED)
def of_a_newer_version(folder):
    write_zarr(folder)
    said = {**CONFIG, "sharded_backend": "zarr", "sharded_backend_version": 2}
    (folder / "metadata.json").write_text(json.dumps(said))


@GROUP.either(errors="CorruptCheckpoint|RefusedCheckpoint|StorageError")
def a_chunk_links_to_a_device(folder):
    write_zarr(folder)
    (folder / NAME / CHUNK).unlink()
    (folder / NAME / CHUNK).symlink_to("/dev/zero")


@GROUP.bad(errors="CorruptCheckpoint")
def no_array_at_all(folder):
    write_zarr(folder, {})


@GROUP.either()
def a_group_that_links_to_itself(folder):
    write_zarr(folder)
    (folder / "group").mkdir()
    (folder / "group" / ".zgroup").write_text('{"zarr_format": 2}')
    (folder / "group" / "again").symlink_to("..")


@GROUP.either()
def groups_nested_200_deep(folder):
    write_zarr(folder)
    inner = folder
    for _ in range(200):
        inner = inner / "g"
        inner.mkdir()
        (inner / ".zgroup").write_text('{"zarr_format": 2}')


@GROUP.inert()
def sharded_objects_are_counted_and_never_read(folder):
    write_zarr(folder)
    (folder / "x._extra_state").mkdir()
    evil = pickled(Calls(os.system, f"touch {canary(folder)}"))
    (folder / "x._extra_state" / "shard_0_1.pt").write_bytes(archive(evil))


@GROUP.inert()
def what_is_beside_the_arrays_asks_for_a_call(folder):
    write_zarr(folder)
    evil = pickled({"iteration": 1, "x": Calls(os.system, f"touch {canary(folder)}")})
    (folder / "common.pt").write_bytes(archive(evil))


@GROUP.good()
def raw_and_packed(folder):
    state = {**STATE, "c": torch.arange(40.0).view(8, 5)}
    write_array(folder, "c", state["c"], (4, 5), zlib.compress, compressor=ZLIB)
    write_zarr(folder)
    return state


@GROUP.good()
def a_missing_chunk_has_the_fill_value(folder):
    data = torch.ones(4, 4)
    write_array(folder, "a", data, (1, 4), fill_value=2.5)
    (folder / "a" / "2.0").unlink()
    data[2] = 2.5
    return {"a": data}


@GROUP.good()
def an_array_of_no_elements(folder):
    write_array(folder, "a", torch.ones(2))
    (folder / "b").mkdir()
    said = {**json.loads((folder / "a" / HEADER).read_text()), "shape": [0, 3], "chunks": [1, 3]}
    (folder / "b" / HEADER).write_text(json.dumps(said))
    return {"a": torch.ones(2), "b": torch.empty(0, 3)}
