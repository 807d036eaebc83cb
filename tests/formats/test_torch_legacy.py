"""The layout of `torch.save` before version 1.6."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch

from bioinit import formats
from bioinit.errors import CorruptCheckpoint, RefusedCheckpoint
from bioinit.formats.protocol import Contents
from bioinit.formats.torch_legacy import FIRST_READ
from bioinit.storage import Folder


def save(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_tiny(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save(state, folder / "pytorch_model.bin")


def write_tiny_sharded(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    placed = {}
    for number, part in enumerate((names[:-1], names[-1:]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        save({name: state[name] for name in part}, folder / file)
        placed.update(dict.fromkeys(part, file))
    index = {"weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def opened(path: Path) -> Contents:
    return formats.open_weights(Folder.at(path))[1]


def value_of(contents: Contents, name: str) -> torch.Tensor:
    stored = contents.tensors[name]
    (piece,) = stored.pieces
    steps = zip(piece.box.sizes, piece.box.strides, strict=True)
    reach = 1 + sum((size - 1) * step for size, step in steps)
    data = contents.files[piece.file].read(piece.offset, reach * stored.dtype.itemsize)
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
    return flat.as_strided(stored.shape, piece.box.strides)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.pt"


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(protocol, file):
    tensor = torch.arange(6.0).view(2, 3)
    torch.save({"w": tensor}, file, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert formats.open_weights(Folder.at(file))[0] == "torch_legacy"
    assert torch.equal(value_of(opened(file), "w"), tensor)


def test_views_transposed_and_shared_storages_come_out_right(file):
    whole = torch.arange(60.0).view(5, 4, 3)
    state = {"whole": whole, "late": whole[3:, 1:], "turned": whole.permute(2, 0, 1)}
    save({"state_dict": state, "epoch": 3}, file)
    contents = opened(file)
    for name, tensor in state.items():
        assert torch.equal(value_of(contents, name), tensor)
    assert contents.metadata == {"state_dict": "state_dict", "objects": {"epoch": 3}}


def test_several_storages_follow_each_other(file):
    state = {f"w{i}": torch.arange(i + 1.0) + i for i in range(20)}
    state["half"] = torch.arange(7, dtype=torch.bfloat16)
    save(state, file)
    contents = opened(file)
    for name, tensor in state.items():
        assert torch.equal(value_of(contents, name), tensor)


def test_pickles_longer_than_the_first_read_are_read_whole(file):
    state = {f"layers.{i}.a.rather.long.name.of.a.weight": torch.full((2,), i) for i in range(2000)}
    save(state, file)
    contents = opened(file)
    assert contents.files[0].bytes_read > FIRST_READ
    assert torch.equal(
        value_of(contents, "layers.1999.a.rather.long.name.of.a.weight"), torch.full((2,), 1999)
    )


def test_a_pickle_that_runs_a_program_is_refused_and_does_not_run(file, tmp_path):
    trace = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    save(Runs(), file)
    with pytest.raises(RefusedCheckpoint, match=r"posix\.system"):
        opened(file)
    assert not trace.exists()


def test_storages_that_do_not_fit_the_pickle_are_corrupt(file):
    save({"w": torch.ones(4)}, file)
    whole = file.read_bytes()
    at = whole.rfind((4).to_bytes(8, "little"))
    for count in (3, 5, -1, 1 << 60):
        file.write_bytes(whole[:at] + count.to_bytes(8, "little", signed=True) + whole[at + 8 :])
        with pytest.raises(CorruptCheckpoint, match=str(count)):
            opened(file)


def test_bytes_written_highest_first_are_refused(file):
    save({"w": torch.ones(4)}, file)
    whole = file.read_bytes()
    assert whole.count(b"little_endianq\x02\x88") == 1
    file.write_bytes(whole.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    with pytest.raises(RefusedCheckpoint, match="highest byte first"):
        opened(file)


def test_the_tar_layout_is_refused_with_the_cure(file):
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(RefusedCheckpoint, match=r"tar archive.*save it again"):
        opened(file)


def test_views_of_a_storage_as_old_writers_named_them(file):
    """A persistent id may name a part of a storage: first element and number of elements."""
    import pickle

    from bioinit.formats.torch_legacy import MAGIC, PROTOCOL

    class Part:
        def __init__(self, first, size):
            self.pid = ("storage", torch.FloatStorage, "0", "cpu", 6, ("1", first, size))

        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (self.pid, 1, (2,), (1,), False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj if type(obj) is tuple and obj[:1] == ("storage",) else None

    def write(part):
        stream = io.BytesIO()
        for value in (MAGIC, PROTOCOL, {"little_endian": True}, {"w": part}, ["0"]):
            Pickler(stream, 2).dump(value)
        stream.write((6).to_bytes(8, "little"))
        stream.write(torch.arange(6.0).numpy().tobytes())
        file.write_bytes(stream.getvalue())

    write(Part(2, 3))
    assert torch.equal(value_of(opened(file), "w"), torch.tensor([3.0, 4.0]))
    for part in (Part(2, 2), Part(5, 3)):
        write(part)
        with pytest.raises(CorruptCheckpoint, match="'w'"):
            opened(file)
