"""Safetensors files, from the real writer and from nobody in their right mind."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bioinit import formats
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats.safetensors import DTYPES
from bioinit.storage import Folder


def write_tiny(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_tiny_sharded(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Two shards and an index, as transformers writes them; the first has nearly everything."""
    names = list(state)
    placed = {}
    for number, part in enumerate((names[:-1], names[-1:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        placed.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tiny_without_index(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    save_file({name: state[name] for name in names[1:]}, folder / "body.safetensors")
    save_file({name: state[name] for name in names[:1]}, folder / "head.safetensors")


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def opened(path: Path) -> formats.Contents:
    return formats.open_weights(Folder.at(path))[1]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_reads_every_dtype_of_the_format_that_torch_has(name, file):
    item = DTYPES[name].itemsize
    raw(file, {"w": entry(0, 6 * item, [2, 3], name)}, bytes(6 * item))
    stored = opened(file).tensors["w"]
    assert (stored.dtype, stored.shape) == (DTYPES[name], (2, 3))


def test_agrees_with_the_library_on_every_dtype_it_writes(file):
    state = {}
    for dtype in set(DTYPES.values()) - {getattr(torch, "float8_e8m0fnu", None)}:
        state[str(dtype)] = torch.zeros(2, 3, dtype=torch.uint8).to(dtype)
    save_file(state, file)
    assert {name: t.dtype for name, t in opened(file).tensors.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }


def test_gives_the_metadata_of_the_writer(file):
    save_file({"w": torch.ones(1)}, file, metadata={"format": "pt", "made": "by hand"})
    assert opened(file).metadata == {"format": "pt", "made": "by hand"}


def test_a_file_without_the_suffix_is_known_by_its_content(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "blob")
    assert formats.open_weights(Folder.at(tmp_path / "blob"))[0] == "safetensors"


def test_tensors_of_the_same_shape_share_one_box(file):
    save_file({f"w{i}": torch.ones(2, 3) for i in range(3)}, file)
    boxes = {id(stored.pieces[0].box) for stored in opened(file).tensors.values()}
    assert len(boxes) == 1


def test_entries_in_any_order_of_keys_and_offsets_are_read(file):
    header = {
        "b": {"data_offsets": [4, 8], "shape": [1], "dtype": "F32"},
        "a": entry(0, 4, [1]),
    }
    raw(file, header, bytes(8))
    starts = {name: stored.pieces[0].offset for name, stored in opened(file).tensors.items()}
    assert starts["b"] - starts["a"] == 4


CORRUPT = {
    "shorter than its length": (b"", b"", None, "truncated|takes 8"),
    "header longer than the file": ({}, b"", 1000, "truncated"),
    "header of a terabyte": ({}, b"", 1 << 40, "more than the"),
    "header that is no JSON": (b'{"a": ', b"", None, "not JSON"),
    "header that is not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "header nested without end": (b'{"w":' * 100_000, b"", None, "not JSON"),
    "header that is a list": (b"[1, 2]", b"", None, "begins with"),
    "entry that is a number": ({"w": 3}, b"", None, "'w'"),
    "entry without offsets": ({"w": {"dtype": "F32", "shape": [1]}}, bytes(4), None, "'w'"),
    "entry with a key too many": ({"w": {**entry(0, 4, [1]), "x": 1}}, bytes(4), None, "'w'"),
    "unknown dtype": ({"w": entry(0, 4, [1], "F33")}, bytes(4), None, "'F33'"),
    "negative size": ({"w": entry(0, 4, [-1])}, bytes(4), None, "'w'"),
    "size that is no whole number": ({"w": entry(0, 4, [1.5])}, bytes(4), None, "'w'"),
    "shape without end": ({"w": entry(0, 4, [10**18] * 60)}, bytes(4), None, "'w'"),
    "shape of too many dims": ({"w": entry(0, 4, [1] * 65)}, bytes(4), None, "'w'"),
    "size that no stride can hold": ({"w": entry(0, 0, [0, 2**63])}, b"", None, "'w'"),
    "sizes that no stride can hold": ({"w": entry(0, 0, [0, 2**62, 2**62])}, b"", None, "'w'"),
    "offset of thousands of digits": (
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [%s, 4]}}' % (b"9" * 4000),
        *(bytes(4), None, "9{50}"),
    ),
    "offsets that are not numbers": (
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        *(bytes(4), None, "'w'"),
    ),
    "offsets that do not fit the shape": ({"w": entry(0, 8, [1])}, bytes(8), None, "takes 4 bytes"),
    "offsets before the data": ({"w": entry(-4, 0, [1])}, bytes(4), None, "-4"),
    "offsets beyond the file": ({"w": entry(0, 400, [100])}, bytes(4), None, "truncated"),
    "two tensors in one place": (
        {"a": entry(0, 4, [1]), "b": entry(0, 4, [1])},
        *(bytes(4), None, "'b'"),
    ),
    "overlapping tensors": (
        {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
        *(bytes(12), None, "inside tensor 'a'"),
    ),
    "hole between tensors": (
        {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
        *(bytes(12), None, "no tensor owns"),
    ),
    "hole before the first": ({"a": entry(4, 8, [1])}, bytes(8), None, "no tensor owns"),
    "bytes after the last": ({"a": entry(0, 4, [1])}, bytes(9), None, "last 5 bytes"),
    "name that is no text": (
        b'{"\\ud800": %s}' % json.dumps(entry(0, 4, [1])).encode(),
        *(bytes(4), None, "no text"),
    ),
    "metadata that is half a character": (
        b'{"__metadata__": {"a": "\\udfff"}}',
        b"",
        None,
        "texts",
    ),
    "metadata that is a list": ({"__metadata__": [1]}, b"", None, "__metadata__"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_refuses_a_header_that_contradicts_itself(case, file):
    header, data, length, words = CORRUPT[case]
    if case == "shorter than its length":
        file.write_bytes(b"\x01\x02\x03")
    else:
        raw(file, header, data, length)
    with pytest.raises(CorruptCheckpoint, match=words) as caught:
        opened(file)
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("item", [b"[]", b"{}", b"[ [1]]"])
def test_a_large_header_of_nested_lists_is_refused_before_it_is_parsed(item, file):
    shape = b",".join([item] * 500_000)
    raw(file, b'{"w":{"dtype":"F32","shape":[' + shape + b'],"data_offsets":[0,4]}}', bytes(4))
    tracemalloc.start()
    with pytest.raises(CorruptCheckpoint, match="nests"):
        opened(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * file.stat().st_size


def test_brackets_in_the_texts_of_a_large_header_are_only_text(file):
    metadata = {"config": json.dumps({"sizes": [[1, 2], [3]], "note": '"[['}), "x": "x" * 2_000_000}
    raw(file, {"__metadata__": metadata, "w[[0], [1]]": entry(0, 4, [1])}, bytes(4))
    assert set(opened(file).tensors) == {"w[[0], [1]]"}


def test_a_name_that_stands_twice_is_corrupt(file):
    one = json.dumps(entry(0, 4, [1]))
    raw(file, f'{{"w": {one}, "w": {json.dumps(entry(4, 8, [1]))}}}'.encode(), bytes(8))
    with pytest.raises(CorruptCheckpoint, match="'w' twice"):
        opened(file)


def test_a_key_that_stands_twice_in_an_entry_is_corrupt(file):
    raw(
        file,
        b'{"w": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        bytes(4),
    )
    with pytest.raises(CorruptCheckpoint, match="'w'"):
        opened(file)


def test_packed_numbers_are_refused_as_quantized(file):
    raw(file, {"w": entry(0, 4, [8], "F4")}, bytes(4))
    with pytest.raises(RefusedCheckpoint, match="quantized"):
        opened(file)


def test_a_git_lfs_pointer_says_how_to_get_the_file(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(RefusedCheckpoint, match="git lfs pull"):
            opened(tmp_path / name)


def test_many_tensors_take_little_time_each(file):
    """Guards against work per tensor that nobody meant; the real figure is under 6 microseconds."""
    import time

    num_tensors = 20_000
    header = {f"layers.{i}.weight": entry(4 * i, 4 * i + 4, [1]) for i in range(num_tensors)}
    raw(file, header, bytes(4 * num_tensors))
    best = min(_seconds(file, time.process_time) for _ in range(3))
    assert best / num_tensors < 40e-6


def _seconds(file, clock):
    start = clock()
    opened(file)
    return clock() - start
