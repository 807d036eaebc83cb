"""What every format promises, for every format there is.

A format is found by its file in ``bioinit/formats``. Its tests, ``tests/formats/test_<name>.py``,
bring one or more functions ``write_tiny*(folder, state)`` that write ``state`` into an empty
folder with the format's own writer. Nothing here is edited when a format is added.
"""

import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bioinit import formats
from bioinit.contexts import Checkpoint, open_checkpoint
from bioinit.errors import CheckpointError, CorruptCheckpoint
from bioinit.formats.protocol import Contents
from bioinit.layout import Dims, numel
from bioinit.storage import Folder

TESTS = Path(__file__).parents[1] / "formats"
SIBLINGS = [
    n for n in formats.names() if formats.load(n).__class__.__module__.startswith("bioinit")
]
Writer = Callable[[Path, dict[str, torch.Tensor]], None]

SMALL = {
    "float32": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "float16": torch.arange(6, dtype=torch.float16).view(6),
    "bfloat16": torch.arange(10, dtype=torch.bfloat16).view(5, 2),
    "float64": torch.arange(4, dtype=torch.float64).view(2, 2),
    "int64": torch.arange(3),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "layers.0.weight": torch.arange(100, 106.0).view(3, 2),
}
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
SHAPES = ((), (1,), (0, 3), (7,), (5, 8), (3, 4, 5), (2, 1, 3, 2))
WEIGHTS = {f"layers.{i}.weight": torch.arange(1024.0).view(32, 32) + i for i in range(8)}
HEADER_BYTES = 200_000


def module_for(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", TESTS / f"test_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def writers() -> Iterator[tuple[str, str]]:
    for name in SIBLINGS:
        if (TESTS / f"test_{name}.py").exists():
            found = [n for n in vars(module_for(name)) if n.startswith("write_tiny")]
            yield from ((name, writer) for writer in found)


each_format = pytest.mark.parametrize("name", SIBLINGS)
each_writer = pytest.mark.parametrize(("name", "writer"), sorted(writers()))


def written(folder: Path, name: str, writer: str, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    getattr(module_for(name), writer)(folder, state)
    return folder


def writable(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` without the dtypes that the original writer has not."""
    unwritten = getattr(module_for(name), "UNWRITTEN", ())
    return {key: value for key, value in state.items() if value.dtype not in unwritten}


def as_stored(name: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` under the names its reader gives, where that puts something before them."""
    spell = getattr(module_for(name), "stored_name", str)
    return {spell(key): tensor for key, tensor in state.items()}


def opened(path: Path) -> Contents:
    return formats.open_weights(Folder.at(path))[1]


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def through_pieces(contents: Contents, name: str) -> torch.Tensor:
    """A stored tensor put together from the bytes that its pieces name."""
    stored = contents.tensors[name]
    whole = torch.empty(stored.shape, dtype=stored.dtype)
    seen = torch.zeros(stored.shape, dtype=torch.bool)
    for piece in stored.pieces:
        region = tuple(
            slice(at, at + size)
            for at, size in zip(piece.box.offsets, piece.box.sizes, strict=True)
        )
        seen[region] = True
        if 0 in piece.box.sizes:
            continue
        steps = zip(piece.box.sizes, piece.box.strides, strict=True)
        reach = 1 + sum((size - 1) * step for size, step in steps)
        item = stored.dtype.itemsize
        data = contents.files[piece.file].read(piece.offset + piece.box.start * item, reach * item)
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(stored.dtype)
        whole[region] = flat.as_strided(piece.box.sizes, piece.box.strides)
    assert bool(seen.all()), f"the pieces of {name} do not cover it"
    return whole


def assert_pieces_are_inside(contents: Contents) -> None:
    for stored in contents.tensors.values():
        for file, offset, box in stored.pieces:
            assert len(box.sizes) == len(box.strides) == len(box.offsets) == len(stored.shape)
            assert box.start >= 0 and offset >= 0
            steps = zip(box.sizes, box.strides, strict=True)
            reach = 1 + sum((size - 1) * step for size, step in steps)
            end = offset + (box.start + reach) * stored.dtype.itemsize
            assert numel(box.sizes) == 0 or end <= contents.files[file].size


@each_format
def test_has_a_test_file_that_writes_a_tiny_checkpoint(name):
    assert (TESTS / f"test_{name}.py").exists(), f"write tests/formats/test_{name}.py"
    assert [n for n in vars(module_for(name)) if n.startswith("write_tiny")], (
        f"tests/formats/test_{name}.py needs a write_tiny(folder, state)"
    )


@each_writer
def test_is_recognized_by_exactly_one_format(name, writer, tmp_path):
    folder = written(tmp_path, name, writer, writable(name, SMALL))
    assert formats.open_weights(Folder.at(folder))[0] == name


@each_writer
def test_gives_every_tensor_bit_for_bit(name, writer, tmp_path):
    contents = opened(written(tmp_path, name, writer, writable(name, SMALL)))
    state = as_stored(name, writable(name, SMALL))
    assert set(contents.tensors) == set(state)
    for key, tensor in state.items():
        found = through_pieces(contents, key)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert contents.tensors[key].kind == "weight"
        assert torch.equal(
            found.contiguous().view(-1).view(torch.uint8) if found.dim() else found,
            tensor.contiguous().view(-1).view(torch.uint8) if tensor.dim() else tensor,
        )


@each_writer
def test_reads_headers_only(name, writer, tmp_path):
    if writer in getattr(module_for(name), "READS_WHOLE", ()):
        pytest.skip("its table of contents is found by reading it whole, once")
    big = {"w": torch.zeros(1024, 1024), "x": torch.ones(512, 1024)}
    contents = opened(written(tmp_path, name, writer, big))
    assert sum(f.bytes_read for f in contents.files) < HEADER_BYTES
    assert all(f.opened <= 1 for f in contents.files)


@each_writer
def test_lists_the_files_that_hold_the_pieces(name, writer, tmp_path):
    contents = opened(written(tmp_path, name, writer, WEIGHTS))
    assert contents.files
    assert all(file.path.is_relative_to(tmp_path) for file in contents.files)
    used = {piece.file for stored in contents.tensors.values() for piece in stored.pieces}
    assert used <= set(range(len(contents.files)))
    assert_pieces_are_inside(contents)


@each_writer
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.97, -1])
def test_a_truncated_file_is_corrupt_and_named(name, writer, kept, tmp_path):
    file = largest_file(written(tmp_path, name, writer, WEIGHTS))
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(int(size * kept) if kept > 0 else size + kept)
    with pytest.raises(CorruptCheckpoint) as caught:
        opened(tmp_path)
    assert file.name in str(caught.value)


@each_writer
def test_an_empty_file_is_an_error_that_names_it(name, writer, tmp_path):
    file = largest_file(written(tmp_path, name, writer, WEIGHTS))
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=file.name):
        opened(tmp_path)


@each_writer
def test_garbage_is_an_error_that_names_the_file(name, writer, tmp_path):
    file = largest_file(written(tmp_path, name, writer, WEIGHTS))
    file.write_bytes(random.Random(0).randbytes(4096))
    with pytest.raises(CheckpointError, match=file.name):
        opened(tmp_path)


@each_writer
def test_a_flipped_bit_is_an_error_of_ours_or_harmless(name, writer, tmp_path):
    """Whatever a flipped bit in a header does, no other exception and no byte outside the file."""
    file = largest_file(written(tmp_path, name, writer, {"a": torch.ones(2), "b": torch.ones(3)}))
    whole, chance = file.read_bytes(), random.Random(0)
    caught = 0
    for _ in range(200):
        at = chance.randrange(len(whole))
        flipped = bytes([whole[at] ^ (1 << chance.randrange(8))])
        file.write_bytes(whole[:at] + flipped + whole[at + 1 :])
        try:
            assert_pieces_are_inside(opened(tmp_path))
        except CheckpointError:
            caught += 1
    assert caught > 0


@each_format
def test_does_not_raise_on_what_it_does_not_know(name, tmp_path):
    chance = random.Random(1)
    known = formats.load(name)
    for number, content in enumerate(
        [
            b"",
            b"\x80",
            b"PK\x03\x04",
            b"{}",
            b"\xff" * 600,
            *(chance.randbytes(700) for _ in range(40)),
        ]
    ):
        file = tmp_path / f"{number}.bin"
        file.write_bytes(content)
        assert known.recognizes(Folder.at(file)) in (True, False)
    assert known.recognizes(Folder.at(tmp_path)) is False


@each_writer
def test_no_other_format_claims_it(name, writer, tmp_path):
    folder = written(tmp_path, name, writer, writable(name, SMALL))
    others = [formats.load(other) for other in SIBLINGS if other != name]
    known = formats.load(name)
    files = [p for p in folder.iterdir() if p.is_file() and known.recognizes(Folder.at(p))]
    for path in (folder, *files):  # a folder may be made of files that are a format themselves
        assert not any(other.recognizes(Folder.at(path)) for other in others)


def of_every_kind() -> dict[str, torch.Tensor]:
    """A tensor of each dtype in each shape, of random bits."""
    chance = random.Random(3)
    state = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            count = numel(shape)
            bits = bytearray(chance.randbytes(max(1, count) * dtype.itemsize))
            if dtype is torch.bool:
                bits = bytearray(bit & 1 for bit in bits)
            flat = torch.frombuffer(bits, dtype=dtype)[:count]
            state[f"{dtype}.{'x'.join(map(str, shape)) or 'scalar'}"] = flat.reshape(shape)
    return state


def random_box(chance: random.Random, shape: tuple[int, ...]) -> tuple[Dims, Dims]:
    offsets = tuple(chance.randint(0, size) for size in shape)
    return offsets, tuple(
        chance.randint(0, size - low) for size, low in zip(shape, offsets, strict=True)
    )


@each_writer
def test_any_region_is_that_region_of_the_whole(name, writer, tmp_path):
    state = writable(name, of_every_kind())
    chance = random.Random(4)
    with open_checkpoint(written(tmp_path / "it", name, writer, state)) as checkpoint:
        state = as_stored(name, state)
        assert set(checkpoint.tensors) == set(state)
        for key, tensor in state.items():
            regions = [None, *(random_box(chance, tuple(tensor.shape)) for _ in range(6))]
            for region in regions:
                found = checkpoint.read(key, region)
                expected = tensor
                for dim, (low, size) in enumerate(zip(*(region or ((), ())), strict=True)):
                    expected = expected.narrow(dim, low, size)
                assert same_bits(found, expected), (key, region)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


@each_writer
def test_a_region_of_rows_costs_its_own_bytes(name, writer, tmp_path):
    if writer in getattr(module_for(name), "READS_WHOLE", ()):
        pytest.skip("bytes that are made are not read by region")
    big = {"w": torch.arange(1024 * 512.0).view(1024, 512)}
    with open_checkpoint(written(tmp_path / "it", name, writer, big)) as checkpoint:
        before = sum(count_of(checkpoint))
        (key,) = as_stored(name, big)
        found = checkpoint.read(key, ((100, 0), (256, 512)))
        assert torch.equal(found, big["w"][100:356])
        assert sum(count_of(checkpoint)) - before <= 1.02 * 256 * 512 * 4


def count_of(checkpoint: Checkpoint) -> Iterator[int]:
    """Bytes read from each file of the disk; windows of one share a count."""
    seen: dict[int, int] = {}
    for file in checkpoint.files:
        seen[id(file._handle)] = file.bytes_read
    yield from seen.values()
