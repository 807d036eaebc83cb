"""Zarr arrays, from zarr itself and from nobody in their right mind."""

import bz2
import contextlib
import gzip
import hashlib
import itertools
import json
import lzma
import math
import re
import shutil
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bioinit import formats
from bioinit.contexts.checkpoint import Checkpoint
from bioinit.errors import (
    BioinitError,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnfinishedCheckpoint,
)
from bioinit.formats import zarr as zarr_format
from bioinit.formats.zarr import codecs
from bioinit.formats.zarr.header import DTYPES, gaps
from bioinit.layout import Box, intersect
from bioinit.load.transfer import Job, Transfer
from bioinit.plan import Copy
from bioinit.storage import Folder

MEGATRON = {"sharded_backend": "zarr", "sharded_backend_version": 1}
UNKNOWN_TO_ZARR = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
READS_WHOLE = ("write_tiny_column_major",)  # a row of it lies all over the chunk


def halves(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of half the rows, as two tensor-parallel ranks write them; an odd row is left over."""
    return (-(-shape[0] // 2), *shape[1:]) if shape and shape[0] else shape


def header(shape: Any, chunks: Any, dtype: str = "<f4", **more: Any) -> dict[str, Any]:
    return {
        "chunks": list(chunks),
        "compressor": None,
        "dtype": dtype,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
        **more,
    }


def write_by_hand(folder: Path, tensor: torch.Tensor, found: dict[str, Any]) -> Path:
    """An array whose dtype zarr does not know, chunk by chunk."""
    folder.mkdir(parents=True)
    (folder / ".zarray").write_text(json.dumps(found, indent=4))
    chunk, separator = found["chunks"], found.get("dimension_separator", ".")
    width = tensor.dtype.itemsize
    data = tensor.reshape(-1).view(torch.uint8).numpy().reshape(*tensor.shape, width)
    counts = [-(-n // c) if n else 0 for n, c in zip(tensor.shape, chunk, strict=True)]
    for index in itertools.product(*map(range, counts)):
        whole = np.zeros((*chunk, width), np.uint8)
        part = data[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))]
        whole[tuple(slice(n) for n in part.shape)] = part
        if found["order"] == "F":
            whole = whole.transpose(*reversed(range(len(chunk))), len(chunk))
        path = folder / (separator.join(map(str, index)) or "0")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(whole.tobytes())
    return folder


def write_state(folder: Path, state: dict[str, torch.Tensor], **settings: Any) -> None:
    """Every tensor as an array in two chunks or more, with zarr where it knows the dtype."""
    for name, tensor in state.items():
        chunks = halves(tuple(tensor.shape))
        if tensor.dtype in UNKNOWN_TO_ZARR:
            code = str(tensor.dtype).removeprefix("torch.")
            found = header(tensor.shape, chunks, code, order=settings.get("order", "C"))
            if "dimension_separator" in settings:
                found["dimension_separator"] = settings["dimension_separator"]
            write_by_hand(folder / name, tensor, found)
            continue
        array = zarr.open_array(
            str(folder / name),
            mode="w",
            shape=tuple(tensor.shape),
            chunks=tuple(max(size, 1) for size in chunks) or True,
            dtype=tensor.numpy().dtype,
            fill_value=None,
            write_empty_chunks=True,
            **{"compressor": None, **settings},
        )
        array[...] = tensor.numpy()


def write_tiny(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """As Megatron-Core writes arrays: raw chunks, names with dots."""
    write_state(folder, state)


def write_megatron(folder: Path, state: dict[str, torch.Tensor], common: Any = None) -> None:
    """With the two files that Megatron-Core writes first and last."""
    torch.save({"iteration": 7} if common is None else common, folder / "common.pt")
    write_state(folder, state)
    (folder / "metadata.json").write_text(json.dumps(MEGATRON))


def write_tiny_column_major(folder: Path, state: dict[str, torch.Tensor]) -> None:
    write_state(folder, state, order="F")


def write_tiny_nested(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """A group of zarr's own, with a folder for every dim of a chunk."""
    zarr.open_group(str(folder), mode="w").attrs["about"] = "a test"
    write_state(folder, state, dimension_separator="/")


def opened(path: Path) -> formats.Contents:
    name, contents = formats.open_weights(Folder.at(path))
    assert name == "zarr"
    return contents


def checkpoint(path: Path) -> Checkpoint:
    return Checkpoint(Folder.at(path), "zarr", opened(path), None)


def one_array(folder: Path, found: Any, **files: bytes) -> Path:
    """A checkpoint of one array ``w`` with any header and any files."""
    (folder / "w").mkdir(parents=True)
    text = found if isinstance(found, bytes) else json.dumps(found).encode()
    (folder / "w" / ".zarray").write_bytes(text)
    for name, data in files.items():
        (folder / "w" / name.replace("_", ".")).write_bytes(data)
    return folder


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


# What the original software wrote


@pytest.mark.parametrize("name", ["bert_fp32_tp1_mcore0.12.3", "gpt_fp32_tp1_mcore0.15.3"])
def test_every_tensor_that_megatron_wrote_is_read_bit_for_bit(name, fixtures_dir):
    folder = fixtures_dir / "zarr" / name
    expected = json.loads((folder / "expected.json").read_text())
    with checkpoint(folder) as found:
        stored = {key: list(found.tensors[key].shape) for key in found.tensors}
        assert stored == {key: one["global_shape"] for key, one in expected["stored"].items()}
        for name, one in expected["tensors"].items():
            layer = re.search(r"\.layers\.(\d+)\.", name)
            key = expected["prefix"] + re.sub(r"\.layers\.\d+\.", ".layers.", name)
            key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            key = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
            tensor = found.read(key)
            if layer is not None:
                tensor = tensor[int(layer[1])]
            assert list(tensor.shape) == one["shape"]
            digest = hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()
            assert digest == one["sha256_f32"], name


def test_what_megatron_says_of_itself_is_told(fixtures_dir):
    found = opened(fixtures_dir / "zarr" / "bert_fp32_tp1_mcore0.12.3").metadata
    assert found["writer"] == "megatron-core, zarr 2" and found["parallel"] == {"tensor": 1}
    assert found["layout"] == "34 chunks of 22 zarr arrays"
    assert found["byte_objects"]["count"] == 9
    assert "model.output_layer._extra_state" in found["byte_objects"]["names"]


def test_what_the_writer_kept_beside_the_arrays_is_told(tmp_path):
    split = {f"module.{w}.weight": torch.ones(4, 4) for w in ("embedding.word_embeddings", "x")}
    write_megatron(tmp_path, split)
    found = opened(tmp_path).metadata
    assert found["iteration"] == 7 and found["objects"] == {"iteration": 7}
    assert found["parallel"] == {"tensor": 2}


def test_nothing_that_was_kept_beside_the_arrays_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    write_megatron(tmp_path, {"w": torch.ones(4)}, common={"x": Trap()})
    found = opened(tmp_path)
    assert list(found.tensors) == ["w"] and "exec" in str(found.metadata["objects"]["x"])


def test_relative_paths_and_links_are_as_good_as_any(fixtures_dir, tmp_path, monkeypatch):
    folder = fixtures_dir / "zarr" / "gpt_fp32_tp1_mcore0.15.3" / "weights"
    monkeypatch.chdir(folder.parent)
    names = set(opened(Path("weights")).tensors)
    (tmp_path / "link").symlink_to(folder)
    assert set(opened(tmp_path / "link").tensors) == names
    (tmp_path / "copy").mkdir()
    for inner in folder.iterdir():
        (tmp_path / "copy" / inner.name).symlink_to(inner)
    assert set(opened(tmp_path / "copy").tensors) == names


# Everything zarr can say


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_region_of_any_array_is_what_zarr_reads(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zarr")
    shape = tuple(data.draw(st.lists(st.integers(0, 7), max_size=4), "shape"))
    chunks = tuple(data.draw(st.integers(1, max(size, 1) + 2), "chunk") for size in shape)
    code = data.draw(st.sampled_from(["<f4", "<f2", "<f8", "|i1", "<i8", "<u2", "|b1"]), "dtype")
    compressor = data.draw(st.sampled_from([None, None, *COMPRESSORS.values()]), "compressor")
    array = zarr.open_array(
        str(folder / "w"),
        mode="w",
        shape=shape,
        chunks=chunks or True,
        dtype=code,
        order=data.draw(st.sampled_from("CF"), "order"),
        dimension_separator=data.draw(st.sampled_from("./"), "separator"),
        compressor=compressor,
        fill_value=data.draw(st.sampled_from([0, 1]), "fill"),
        write_empty_chunks=data.draw(st.booleans(), "empty chunks"),
    )
    number = math.prod(shape)
    array[...] = (np.arange(number).reshape(shape) % 5).astype(code)
    files = sorted(p for p in (folder / "w").rglob("*") if p.is_file() and p.name[0] != ".")
    for path in data.draw(st.lists(st.sampled_from(files), unique=True), "lost") if files else []:
        path.unlink()
    expected = array[...]
    with checkpoint(folder) as found:
        whole = found.read("w")
        assert torch.equal(whole, torch.from_numpy(np.array(expected, order="C")))
        offsets = tuple(data.draw(st.integers(0, size), "offset") for size in shape)
        sizes = tuple(
            data.draw(st.integers(0, size - at), "size")
            for size, at in zip(shape, offsets, strict=True)
        )
        region = tuple(slice(at, at + n) for at, n in zip(offsets, sizes, strict=True))
        assert torch.equal(found.read("w", (offsets, sizes)), whole[region])
    shutil.rmtree(folder)


@pytest.mark.parametrize("code", sorted(DTYPES))
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_dtype_keeps_its_bits(code, order, tmp_path):
    dtype = DTYPES[code]
    bits = torch.arange(15 * dtype.itemsize, dtype=torch.uint8)
    tensor = (bits % 2 if dtype == torch.bool else bits).view(dtype).view(5, 3)
    write_by_hand(tmp_path / "w", tensor, header((5, 3), (2, 2), code, order=order))
    with checkpoint(tmp_path) as found:
        assert found.tensors["w"].dtype == dtype
        read = found.read("w")
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_a_chunk_is_one_piece_in_place(tmp_path):
    write_tiny(tmp_path, {"w": torch.arange(24.0).view(4, 6)})
    contents = opened(tmp_path)
    assert [f.name for f in contents.files] == ["w/0.0", "w/1.0"]
    assert [p.box.offsets for p in contents.tensors["w"].pieces] == [(0, 0), (2, 0)]
    assert all(f.how is None and f.bytes_read == 0 for f in contents.files)


def test_column_major_chunks_are_read_in_place_too(tmp_path):
    write_tiny_column_major(tmp_path, {"w": torch.arange(24.0).view(4, 6)})
    contents = opened(tmp_path)
    assert {piece.box.strides for piece in contents.tensors["w"].pieces} == {(1, 2)}
    assert all(f.how is None for f in contents.files)


def test_keys_may_be_nested_in_groups(tmp_path):
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    write_state(tmp_path / "model" / "layers", {"w": torch.ones(2, 2)})
    (tmp_path / "model" / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / "model" / "layers" / ".zgroup").write_text('{"zarr_format": 2}')
    (tmp_path / ".zattrs").write_text("{}")
    (tmp_path / ".zmetadata").write_text("{}")
    assert list(opened(tmp_path).tensors) == ["model/layers/w"]


def test_chunks_in_folders_are_found_where_the_header_does_not_say_so(tmp_path):
    write_state(tmp_path, {"w": torch.arange(12.0).view(4, 3)}, dimension_separator="/")
    found = json.loads((tmp_path / "w" / ".zarray").read_text())
    del found["dimension_separator"]
    (tmp_path / "w" / ".zarray").write_text(json.dumps(found))
    with checkpoint(tmp_path) as read:
        assert torch.equal(read.read("w"), torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize("config", [MEGATRON, None], ids=["by megatron", "a bare model"])
def test_state_of_training_is_what_it_is_in_other_formats(config, tmp_path):
    always = ["optim.state.w", "all.optim.state.w", "optimizer/state/w", "chained_0.x"]
    perhaps = ["opt_param_scheduler.x", "scaler.mean"]
    names = [*always, *perhaps, "net.w"]
    write_state(tmp_path, {name: torch.ones(4) for name in names})
    if config is not None:
        (tmp_path / "metadata.json").write_text(json.dumps(config))
        torch.save({}, tmp_path / "common.pt")
    expected = {*always, *(perhaps if config is not None else ())}
    found = opened(tmp_path).tensors
    assert {name for name, stored in found.items() if stored.kind == "optimizer"} == expected


def test_optimizer_state_and_objects_are_told_from_weights(tmp_path):
    write_tiny(
        tmp_path,
        {
            "model.w": torch.ones(4),
            "optimizer.state.exp_avg.model.w": torch.ones(4),
            "chained_0.optimizer.state.exp_avg.model.w": torch.ones(4),
        },
    )
    (tmp_path / "optimizer.state.exp_avg.model.w.sync").mkdir()
    (tmp_path / "optimizer.state.exp_avg.model.w.sync" / ".zarray").write_bytes(b"")
    for name in ("shard_0_2.pt", "shard_1_2.pt", "shard_0.1.pt"):
        (tmp_path / "layers.3._extra_state").mkdir(exist_ok=True)
        (tmp_path / "layers.3._extra_state" / name).write_bytes(b"never read")
    contents = opened(tmp_path)
    kinds = {name: stored.kind for name, stored in contents.tensors.items()}
    assert kinds.pop("model.w") == "weight" and set(kinds.values()) == {"optimizer"}
    assert len(kinds) == 2
    assert contents.metadata["byte_objects"] == {"count": 3, "names": ["layers.*._extra_state"]}


def test_what_is_no_array_is_told(tmp_path):
    write_tiny(tmp_path, {"w": torch.ones(4)})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    (tmp_path / "w" / ".DS_Store").write_text("x")
    assert opened(tmp_path).metadata["ignored"] == {"notes/": "it holds no zarr array"}


def test_opening_reads_headers_only(tmp_path):
    write_tiny(tmp_path, {f"layers.{n}.w": torch.ones(8, 8) for n in range(4)})
    contents = opened(tmp_path)
    assert sum(f.bytes_read for f in contents.files) == 0
    assert not any(f.opened for f in contents.files)


def test_a_checkpoint_of_five_thousand_chunks_opens_in_a_second(tmp_path):
    found = json.dumps(header((80, 64), (1, 8), "bfloat16"))
    for name in range(8):
        (tmp_path / f"layers.w{name}").mkdir()
        (tmp_path / f"layers.w{name}" / ".zarray").write_text(found)
        for i, j in itertools.product(range(80), range(8)):
            (tmp_path / f"layers.w{name}" / f"{i}.{j}").write_bytes(bytes(16))
    begin = time.process_time()
    contents = opened(tmp_path)
    assert time.process_time() - begin < 1
    assert len(contents.files) == 5120


# Chunks that are not stored


def test_a_chunk_that_is_not_stored_has_the_fill_value(tmp_path):
    one_array(tmp_path, header((4,), (2,), fill_value=1.5), **{"1": floats(3, 4)})
    contents = opened(tmp_path)
    assert contents.metadata["missing_chunks"] == {"w": 1}
    assert [file.how for file in contents.files] == [None, "fill value 1.5"]
    assert checkpoint(tmp_path).read("w").tolist() == [1.5, 1.5, 3, 4]


def test_where_no_fill_value_is_named_it_is_zero(tmp_path):
    one_array(tmp_path, header((4,), (2,)), **{"0": floats(3, 4)})
    assert opened(tmp_path).metadata["missing_chunks"] == {"w": 1}
    assert checkpoint(tmp_path).read("w").tolist() == [3, 4, 0, 0]


@pytest.mark.parametrize("stored", [0, 1])
def test_an_array_without_most_of_its_chunks_is_unfinished(stored, tmp_path):
    files = {str(n): floats(1, 2) for n in range(stored)}
    one_array(tmp_path, header((8,), (2,)), **files)
    with pytest.raises(UnfinishedCheckpoint, match=f"{stored} of the 4 chunks of 'w'"):
        opened(tmp_path)


def test_an_array_of_nothing_but_a_fill_value_is_whole(tmp_path):
    one_array(tmp_path, header((4,), (2,), fill_value=2))
    assert checkpoint(tmp_path).read("w").tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("code", "fill", "expected"),
    [
        ("<f4", "NaN", math.nan),
        ("<f4", "Infinity", math.inf),
        ("<f8", "-Infinity", -math.inf),
        ("<f2", 1, 1.0),
        ("bfloat16", 1.5, 1.5),
        ("bfloat16", "NaN", math.nan),
        ("<V2", "gD8=", 1.0),
        ("float8_e4m3fn", 2.0, 2.0),
        ("<i8", -7, -7),
        ("<u8", 2**64 - 1, 2**64 - 1),
        ("|b1", True, True),
        ("|b1", 0, False),
        ("|u1", 255, 255),
        ("<c8", [1.0, -2.0], 1 - 2j),
    ],
)
def test_fill_values_of_every_spelling(code, fill, expected, tmp_path):
    one_array(tmp_path, header((3,), (2,), code, fill_value=fill))
    found = checkpoint(tmp_path).read("w").view(-1)
    found = found.float() if found.dtype.itemsize < 4 and found.dtype.is_floating_point else found
    for element in found.tolist():
        assert element == expected or (element != element and expected != expected)


@pytest.mark.parametrize(
    ("code", "fill"),
    [
        ("<f4", "nan"),
        ("<f4", [1]),
        ("<f4", {}),
        ("<f4", "gD8="),
        ("bfloat16", "gD8/gD8="),
        ("<i4", 1.5),
        ("<i4", 2**31),
        ("|u1", -1),
        ("|b1", 2),
        ("<c8", [1, 2, 3]),
        ("<f4", 10**400),
    ],
)
def test_a_fill_value_that_is_needed_and_impossible_is_corrupt(code, fill, tmp_path):
    one_array(tmp_path, header((3,), (2,), code, fill_value=fill))
    with pytest.raises(CorruptCheckpoint, match=r"w/\.zarray is damaged: its fill_value"):
        opened(tmp_path)


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    chance=st.randoms(use_true_random=False),
)
def test_gaps_are_all_that_is_not_there_and_each_once(counts, chance):
    every = list(itertools.product(*map(range, counts)))
    present = sorted(chance.sample(every, chance.randint(0, len(every))))
    seen = list(present)
    boxes = list(gaps(present, counts))
    for first, cells in boxes:
        seen += itertools.product(*(range(at, at + n) for at, n in zip(first, cells, strict=True)))
    assert sorted(seen) == every
    assert len(boxes) <= (len(present) + 1) * len(counts)


def test_a_grid_larger_than_the_world_costs_nothing(tmp_path):
    found = header((10**9, 10**8), (1, 1), fill_value=1, dtype="|i1")
    one_array(tmp_path, found, **{"5_7": b"\3"})
    begin = time.process_time()
    contents = opened(tmp_path)
    assert time.process_time() - begin < 1
    assert contents.metadata["missing_chunks"] == {"w": 10**17 - 1}
    assert len(contents.tensors["w"].pieces) < 10
    assert sum(file.size for file in contents.files) == 2
    assert checkpoint(tmp_path).read("w", ((4, 6), (3, 3))).tolist() == [
        [1, 1, 1],
        [1, 3, 1],
        [1, 1, 1],
    ]


def test_chunks_strewn_over_many_dims_end_in_an_error_and_soon(tmp_path):
    one_array(tmp_path, header([4] * 30, [1] * 30, "|i1", fill_value=0))
    chance = np.random.default_rng(3)
    for _ in range(2500):
        (tmp_path / "w" / ".".join(map(str, chance.integers(4, size=30)))).write_bytes(b"x")
    begin = time.process_time()
    with pytest.raises(UnfinishedCheckpoint, match="more than 50000 places"):
        opened(tmp_path)
    assert time.process_time() - begin < 3


# Codecs

COMPRESSORS = {
    "blosc": zarr.Blosc(cname="lz4", shuffle=1),
    "blosc_zstd": zarr.Blosc(cname="zstd", shuffle=2),
    "zlib": zarr.Zlib(level=1),
    "gzip": zarr.GZip(level=1),
    "bz2": zarr.BZ2(),
    "lzma": zarr.LZMA(),
    "lz4": zarr.LZ4(),
    "zstd": zarr.Zstd(),
}
each_codec = pytest.mark.parametrize("codec", list(COMPRESSORS))
NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (64, 48)).astype("<f4"))


def write_compressed(folder: Path, codec: str, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_state(folder, {"w": NOISE}, compressor=COMPRESSORS[codec], **more)
    return folder


@each_codec
@pytest.mark.parametrize("order", ["C", "F"])
def test_compressed_chunks_are_decoded_when_they_are_read(codec, order, tmp_path):
    write_compressed(tmp_path, codec, order=order)
    with checkpoint(tmp_path) as found:
        assert sum(file.bytes_read for file in found.files) == 0
        assert {file.how for file in found.files} == {
            f"zarr chunk, {codec.split('_')[0]}, decoded whole"
        }
        assert torch.equal(found.read("w"), NOISE)
        assert torch.equal(found.read("w", ((30, 3), (5, 7))), NOISE[30:35, 3:10])


@each_codec
@pytest.mark.parametrize("kept", [0, 3, 0.5, -1])
def test_a_truncated_compressed_chunk_is_corrupt_and_named(codec, kept, tmp_path):
    file = write_compressed(tmp_path, codec) / "w" / "1.0"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CorruptCheckpoint, match=r"w/1\.0 is damaged"):
        checkpoint(tmp_path).read("w")


@each_codec
def test_a_damaged_compressed_chunk_is_an_error_of_ours_or_harmless(codec, tmp_path):
    file = write_compressed(tmp_path, codec) / "w" / "0.0"
    whole, chance, caught = file.read_bytes(), np.random.default_rng(1), 0
    for trial in range(60):
        data = bytearray(whole)
        at = trial if trial < 30 else int(chance.integers(len(data)))
        data[at] ^= 1 << int(chance.integers(8))
        file.write_bytes(bytes(data))
        try:
            checkpoint(tmp_path).read("w")
        except CheckpointError as error:
            caught += 1
            assert "w/0.0" in str(error)
    assert caught
    file.write_bytes(chance.bytes(4096))
    with pytest.raises(CorruptCheckpoint, match=r"w/0\.0"):
        checkpoint(tmp_path).read("w")


def write_growing(folder: Path, name: str, size: int) -> None:
    """One chunk of so many bytes, all zeros."""
    array = zarr.open_array(
        str(folder / name),
        mode="w",
        shape=(size,),
        chunks=(size,),
        dtype="u1",
        fill_value=None,
        compressor=zarr.Zstd(),
    )
    array[:] = 0


def test_a_chunk_that_grows_to_more_than_it_may_take_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_format, "LARGEST_CHUNK", 1 << 20)
    write_growing(tmp_path, "w", 1 << 20)
    opened(tmp_path)
    write_growing(tmp_path, "v", (1 << 20) + 1)
    with pytest.raises(RefusedCheckpoint, match=r"v/0 has \d+ bytes and is decoded to 1048577"):
        opened(tmp_path)


def test_such_a_chunk_of_an_optimizer_does_not_keep_weights_from_opening(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_format, "LARGEST_CHUNK", 1 << 20)
    write_growing(tmp_path, "w", 10)
    write_growing(tmp_path, "optimizer.state.exp_avg.w", (1 << 20) + 1)
    found = opened(tmp_path)
    assert set(found.tensors) == {"w"}
    assert "is decoded to" in found.metadata["unreadable"]["optimizer.state.exp_avg.w"]


def test_a_large_chunk_that_was_hardly_compressed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_format, "LARGEST_CHUNK", 1)
    write_compressed(tmp_path, "zstd")
    with checkpoint(tmp_path) as found:
        assert torch.equal(found.read("w"), NOISE)


BOMBS = {  # each is made when its test runs: this file is loaded often
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "gzip, in parts": lambda zeros: gzip.compress(b"") * 1000 + gzip.compress(zeros),
    "bz2": bz2.compress,
    "lzma": lzma.compress,
    "blosc": COMPRESSORS["blosc_zstd"].encode,
    "lz4": COMPRESSORS["lz4"].encode,
    "zstd": COMPRESSORS["zstd"].encode,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_chunk_never_unfolds_to_more_than_it_should_have(bomb, tmp_path, peak):
    codec, data = bomb.split(",")[0], BOMBS[bomb](bytes(50_000_000))
    found = header((1000,), (1000,), compressor={"id": codec})
    one_array(tmp_path, found, **{"0": data})
    with peak(10_000_000), pytest.raises(CorruptCheckpoint, match="w/0 is damaged"):
        checkpoint(tmp_path).read("w")


@pytest.fixture
def peak():
    """A context in which no more bytes are allocated than allowed, as Python counts them."""

    @contextlib.contextmanager
    def limited(most):
        tracemalloc.start()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < most
        finally:
            tracemalloc.stop()

    return limited


@pytest.mark.parametrize("codec", ["zlib", "gzip", "bz2", "lzma", "blosc", "lz4", "zstd"])
def test_a_chunk_that_claims_more_than_its_bytes_can_hold_is_corrupt_at_once(codec, tmp_path):
    found = header((2**50,), (2**50,), compressor={"id": codec})
    one_array(tmp_path, found, **{"0": zlib.compress(bytes(1000))})
    with pytest.raises(CorruptCheckpoint, match=r"w/0 is damaged: its \d+ bytes cannot hold"):
        opened(tmp_path)


def test_a_frame_that_claims_an_exabyte_makes_no_room_for_it(tmp_path):
    frame = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", 2**60) + bytes(100)
    one_array(tmp_path, header((4,), (4,), compressor={"id": "zstd"}), **{"0": frame})
    with pytest.raises(CorruptCheckpoint, match=f"says {2**60} bytes, not 16"):
        checkpoint(tmp_path).read("w")


FILTERS = [
    {"id": "shuffle", "elementsize": 4},
    {"id": "delta", "dtype": "<f4"},
    {"id": "delta", "dtype": "<f4", "astype": "<f8"},
    {"id": "fixedscaleoffset", "offset": 0, "scale": 1, "dtype": "<f4", "astype": "<i2"},
    {"id": "quantize", "digits": 3, "dtype": "<f4", "astype": "<f2"},
    {"id": "bitround", "keepbits": 12},
    {"id": "astype", "encode_dtype": "<i2", "decode_dtype": "<f4"},
    {"id": "crc32"},
    {"id": "adler32"},
    {"id": "fletcher32"},
]


@pytest.mark.parametrize("found", FILTERS, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("codec", [None, "blosc", "zlib"])
def test_filters_are_undone(found, codec, tmp_path):
    compressor = COMPRESSORS[codec] if codec else None
    write_state(tmp_path, {"w": NOISE}, compressor=compressor, filters=[numcodecs.get_codec(found)])
    with checkpoint(tmp_path) as read:
        assert torch.equal(read.read("w"), NOISE)


def test_bits_are_unpacked(tmp_path):
    bits = NOISE > 20
    write_state(tmp_path, {"w": bits}, filters=[numcodecs.PackBits()])
    with checkpoint(tmp_path) as read:
        assert torch.equal(read.read("w"), bits)


@pytest.mark.parametrize(
    "name",
    ["pickle", "json2", "msgpack2", "vlen-utf8", "vlen-array", "categorize", "zfpy", "os.system"],
)
@pytest.mark.parametrize("place", ["compressor", "filters"])
def test_codecs_that_are_not_on_the_list_are_refused_by_name(name, place, tmp_path):
    config = {"id": name}
    found = header((4,), (4,), **{place: config if place == "compressor" else [config]})
    one_array(tmp_path, found, **{"0": b"cos\nsystem\n(S'true'\ntR."})
    with pytest.raises(RefusedCheckpoint, match=rf"w/\.zarray asks for the codec '{name}'"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"compressor": 3},
        {"compressor": {}},
        {"compressor": {"id": 5}},
        {"compressor": []},
        {"filters": {"id": "delta"}},
        {"filters": [None]},
        {"filters": [{"id": "delta"}]},
        {"filters": [{"id": "delta", "dtype": "O"}]},
        {"filters": [{"id": "delta", "dtype": "<f4", "astype": "|O8"}]},
        {"filters": [{"id": "shuffle", "elementsize": "x"}]},
        {"filters": [{"id": "shuffle", "elementsize": [4]}]},
        {"filters": [{"id": "crc32", "location": "middle"}]},
    ],
    ids=str,
)
def test_codecs_that_make_no_sense_are_corrupt(more, tmp_path):
    one_array(tmp_path, header((4,), (4,), **more), **{"0": floats(1, 2, 3, 4)})
    with pytest.raises(CheckpointError, match=r"w/\.zarray"):
        opened(tmp_path)
        checkpoint(tmp_path).read("w")


def test_a_compressor_before_a_filter_is_refused(tmp_path):
    filters = [{"id": "zlib"}, {"id": "crc32"}]
    one_array(tmp_path, header((4,), (4,), filters=filters), **{"0": b"x"})
    with pytest.raises(RefusedCheckpoint, match="'zlib' before another"):
        opened(tmp_path)


@pytest.mark.parametrize("codec", ["blosc", "lz4", "zstd"])
def test_without_numcodecs_the_extra_is_named(codec, tmp_path, monkeypatch):
    write_compressed(tmp_path, codec)
    monkeypatch.setitem(sys.modules, f"numcodecs.{codec}", None)
    with pytest.raises(ConfigError, match=r"pip install 'bioinit\[zarr\]'") as caught:
        opened(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("codec", ["zlib", "gzip", "bz2", "lzma"])
def test_without_numcodecs_the_standard_library_does_what_it_can(codec, tmp_path, monkeypatch):
    write_compressed(tmp_path, codec)
    for name in [n for n in sys.modules if n.split(".")[0] in ("numcodecs", "zarr")]:
        monkeypatch.setitem(sys.modules, name, None)
    with checkpoint(tmp_path) as found:
        assert torch.equal(found.read("w"), NOISE)


def test_readers_of_one_chunk_decode_it_once_between_them():
    cache, calls, found = codecs.Cache(), [], []

    def decode():
        calls.append(1)
        time.sleep(0.05)
        return memoryview(b"abc")

    threads = [
        threading.Thread(target=lambda: found.append(bytes(cache.get("x", decode))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found == [b"abc"] * 4


def test_only_a_few_decoded_chunks_are_kept():
    cache, calls = codecs.Cache(most=10), []

    def ask(key, size=4):
        cache.get(key, lambda: calls.append(key) or memoryview(bytes(size)))

    for key in "aab":
        ask(key)
    ask("c")  # drops the oldest
    ask("b")
    ask("a")
    ask("big", 100)  # drops all others, but not itself
    ask("big")
    cache.drop("big")
    ask("big")
    assert "".join(calls) == "abcabigbig"


def test_closing_drops_what_was_decoded(tmp_path):
    write_compressed(tmp_path, "zlib")
    found = checkpoint(tmp_path)
    found.read("w")
    before = found.files[0].bytes_read
    found.read("w")
    assert found.files[0].bytes_read == before
    found.close()
    found.read("w")
    assert found.files[0].bytes_read > before


# What is not as it should be


@pytest.mark.parametrize("size", [0, 7, 9, 4096])
def test_a_chunk_of_the_wrong_size_is_corrupt_and_says_what_it_should_be(size, tmp_path):
    one_array(tmp_path, header((4,), (2,)), **{"0": floats(1, 2), "1": bytes(size)})
    with pytest.raises(CorruptCheckpoint, match=rf"w/1 is damaged: it has {size} bytes.*has 8"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["2", "9999999999999999999999", "0.0", "-1", "00", "01"])
def test_a_chunk_outside_of_the_grid_is_corrupt_and_named(name, tmp_path):
    one_array(tmp_path, header((4,), (2,)), **{"0": floats(1, 2), "1": floats(3, 4)})
    (tmp_path / "w" / name).write_bytes(floats(5, 6))
    with pytest.raises(CorruptCheckpoint, match=re.escape(f"w/{name} is damaged")):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["0.a1b2" + "0" * 28 + ".partial", "0.__lock"])
def test_a_chunk_that_was_being_written_is_unfinished(name, tmp_path):
    one_array(tmp_path, header((4,), (4,)), **{"0": floats(1, 2, 3, 4)})
    (tmp_path / "w" / name).write_bytes(b"")
    with pytest.raises(UnfinishedCheckpoint, match="stopped"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"shape": None},
        {"shape": [4.0]},
        {"shape": [-4]},
        {"shape": [True]},
        {"shape": [2**63]},
        {"shape": [2**31, 2**31, 4], "chunks": [1, 1, 1]},
        {"shape": [4, 4]},
        {"shape": [1] * 33, "chunks": [1] * 33},
        {"chunks": [0]},
        {"chunks": "4"},
        {"chunks": [2**62]},
        {"order": "A"},
        {"order": ["C"]},
        {"dimension_separator": "\\"},
        {"dimension_separator": [1]},
        {"dtype": None},
        {"dtype": 4},
        {"dtype": "f4x"},
        {"dtype": {"a": 1}},
    ],
    ids=str,
)
def test_headers_that_make_no_sense_are_corrupt_and_named(more, tmp_path):
    one_array(tmp_path, header((4,), (4,)) | more, **{"0": floats(1, 2, 3, 4)})
    with pytest.raises(CorruptCheckpoint, match=r"w/\.zarray is damaged"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b'{"a":' * 200, b"\xff", b" " * 2_000_000]
)
def test_headers_that_are_no_json_object_are_corrupt_and_named(text, tmp_path):
    one_array(tmp_path, text)
    with pytest.raises(CorruptCheckpoint, match=r"w/\.zarray"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "code", ["|O", "<U4", "|S8", "<M8[ns]", "|V1", "<V16", "int4", "float8_e3m4", [["a", "<f4"]]]
)
def test_what_is_no_number_of_a_weight_is_refused(code, tmp_path):
    one_array(tmp_path, header((4,), (4,), code), **{"0": b"x"})
    with pytest.raises(RefusedCheckpoint, match=r"w/\.zarray stores"):
        opened(tmp_path)


@pytest.mark.parametrize("code", [">f4", ">i8"])
def test_the_highest_byte_first_is_refused_with_the_cure(code, tmp_path):
    one_array(tmp_path, header((4,), (4,), code), **{"0": b"x"})
    with pytest.raises(RefusedCheckpoint, match=f"Write it again as '<{code[1:]}'"):
        opened(tmp_path)


@pytest.mark.parametrize("version", [1, 3, "2", None, 2.0])
def test_other_versions_of_zarr_are_refused(version, tmp_path):
    one_array(tmp_path, header((4,), (4,), zarr_format=version), **{"0": b"x"})
    with pytest.raises(RefusedCheckpoint, match="only 2 is read"):
        opened(tmp_path)


@pytest.mark.parametrize("place", ["zarr.json", "w/zarr.json"])
def test_zarr_3_is_refused_by_name(place, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / place).write_text('{"zarr_format": 3}')
    with pytest.raises(RefusedCheckpoint, match="zarr format 3"):
        opened(tmp_path)


def test_a_single_array_is_refused_with_the_cure(tmp_path):
    one_array(tmp_path, header((4,), (4,)), **{"0": floats(1, 2, 3, 4)})
    with pytest.raises(RefusedCheckpoint, match="Point at the folder around it"):
        opened(tmp_path / "w")


@pytest.mark.parametrize("lost", ["metadata.json", "common.pt"])
def test_a_save_that_never_finished_is_called_so(lost, tmp_path):
    write_megatron(tmp_path, {"w": torch.ones(4)})
    (tmp_path / lost).unlink()
    with pytest.raises(UnfinishedCheckpoint, match=rf"but no {re.escape(lost)}"):
        opened(tmp_path)


def test_a_checkpoint_without_arrays_says_so(tmp_path):
    write_megatron(tmp_path, {})
    with pytest.raises(CorruptCheckpoint, match="holds no array"):
        opened(tmp_path)


def test_chunks_without_a_header_are_corrupt_and_named(tmp_path):
    write_tiny(tmp_path, {"v": torch.ones(4), "w": torch.ones(4)})
    (tmp_path / "w" / ".zarray").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"w is damaged: it holds chunks \(0\), but no"):
        opened(tmp_path)


def test_another_version_of_the_writer_is_refused(tmp_path):
    write_megatron(tmp_path, {"w": torch.ones(4)})
    found = MEGATRON | {"sharded_backend_version": 2}
    (tmp_path / "metadata.json").write_text(json.dumps(found))
    with pytest.raises(RefusedCheckpoint, match="version 2 of the zarr backend"):
        opened(tmp_path)


def test_links_that_lead_back_end(tmp_path):
    (tmp_path / ".zgroup").write_text('{"zarr_format": 2}')
    write_state(tmp_path, {"w": torch.ones(4)})
    for name in ("a", "b", "c"):
        (tmp_path / name).symlink_to(tmp_path)
    assert list(opened(tmp_path).tensors) == ["w"]


def test_folders_of_chunks_that_lead_back_are_corrupt(tmp_path):
    one_array(tmp_path, header([2] * 30, [1] * 30, dimension_separator="/", fill_value=0))
    for name in "01":
        (tmp_path / "w" / name).symlink_to(tmp_path / "w")
    with pytest.raises(CorruptCheckpoint, match="leads back"):
        opened(tmp_path)


def test_other_formats_keep_what_is_theirs(tmp_path):
    found = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (tmp_path / "metadata.json").write_text(json.dumps(found))
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / ".zarray").write_text("{}")
    assert formats.load("zarr").recognizes(Folder.at(tmp_path)) is False


def test_nothing_that_is_read_leads_to_another_exception(tmp_path):
    """Any byte of a header may be anything: what comes of it is an error of ours, or a reading."""
    write_tiny(tmp_path, {"w": torch.ones(4)})
    file = tmp_path / "w" / ".zarray"
    whole, chance, caught = file.read_bytes(), np.random.default_rng(2), 0
    for _ in range(400):
        data = bytearray(whole)
        at = int(chance.integers(len(data)))
        data[at] = int(chance.choice(list(b'0123456789[]{}",:.-enltx|<>')))
        file.write_bytes(bytes(data))
        try:
            opened(tmp_path)
        except BioinitError:
            caught += 1
    assert caught > 50


# Through the loader


def loaded(folder: Path, name: str, dtype: torch.dtype, workers: int = 4) -> torch.Tensor:
    contents = opened(folder)
    stored = contents.tensors[name]
    target = torch.full(stored.shape, -1, dtype=dtype)
    jobs = []
    for file, offset, box in stored.pieces:
        overlap = intersect(box, Box.contiguous(stored.shape))
        assert overlap is not None
        jobs.append(Job(Copy(file, offset, stored.dtype, overlap), target))
    Transfer(contents.files, workers, torch.device("cpu")).move(jobs)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("codec", [None, "zlib", "blosc"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_loader_puts_every_chunk_in_its_place(dtype, codec, order, tmp_path):
    compressor = COMPRESSORS[codec] if codec else None
    write_state(tmp_path, {"w": NOISE}, compressor=compressor, order=order)
    assert torch.equal(loaded(tmp_path, "w", dtype), NOISE.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loader_fills_what_is_not_stored(dtype, tmp_path):
    found = header((6, 5), (2, 2), fill_value=1.5)
    one_array(tmp_path, found, **{"1_1": floats(1, 2, 3, 4)})
    expected = torch.full((6, 5), 1.5, dtype=dtype)
    expected[2:4, 2:4] = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(loaded(tmp_path, "w", dtype), expected)


def test_many_workers_decode_a_chunk_once(tmp_path, monkeypatch):
    large = torch.arange(2**21, dtype=torch.float32)  # some tens of parts of a staged read
    array = zarr.open_array(
        str(tmp_path / "w"), mode="w", shape=large.shape, chunks=large.shape, dtype="<f4",
        compressor=COMPRESSORS["zlib"],
    )  # fmt: skip
    array[...] = large.numpy()
    calls, real = [], zlib.decompressobj

    def counting():
        calls.append(1)
        return real()

    monkeypatch.setitem(
        codecs.COMPRESSORS, "zlib", codecs.Codec("zlib", codecs._streams(counting), 1100)
    )
    assert torch.equal(loaded(tmp_path, "w", torch.float64), large.double())
    assert len(calls) == 1


def test_ranks_that_wrote_their_own_shards_are_put_together(tmp_path):
    """Two pipeline stages of two tensor-parallel ranks, stacked layers, as Megatron-Core did."""
    whole = torch.arange(4 * 12 * 8, dtype=torch.float32).view(4, 12, 8)
    cuts = {"layers.qkv": (4, 2, 1), "layers.proj": (4, 1, 2)}
    for name, fragments in cuts.items():
        chunks = tuple(n // f for n, f in zip(whole.shape, fragments, strict=True))
        array = zarr.open_array(
            str(tmp_path / name), mode="w", shape=whole.shape, chunks=chunks, dtype="<f4",
            compressor=None, fill_value=None, write_empty_chunks=True,
        )  # fmt: skip
        for index in itertools.product(*map(range, fragments)):
            place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))
            array[place] = whole[place].numpy()
    with checkpoint(tmp_path) as found:
        for name in cuts:
            assert len(found.tensors[name].pieces) == 8
            assert torch.equal(found.read(name), whole)
            assert torch.equal(loaded(tmp_path, name, torch.float32), whole)
            part = found.read(name, ((1, 3, 2), (2, 6, 5)))
            assert torch.equal(part, whole[1:3, 3:9, 2:7])
