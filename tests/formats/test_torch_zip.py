"""Archives of `torch.save`, from the real writer and from hostile hands."""

import io
import json
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from bioinit import formats
from bioinit.errors import (
    AmbiguousFormat,
    CheckpointError,
    CorruptCheckpoint,
    RefusedCheckpoint,
    UnknownFormat,
)
from bioinit.formats.protocol import Contents
from bioinit.storage import Folder


def write_tiny(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_tiny_lightning(folder: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"epoch": 3, "state_dict": OrderedDict(state), "loops": {}}, folder / "last.ckpt")


def write_tiny_sharded(folder: Path, state: dict[str, torch.Tensor]) -> None:
    names = list(state)
    placed = {}
    for number, part in enumerate((names[:-1], names[-1:]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        placed.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_lightning_is_told_by_what_it_keeps_beside_the_weights(tmp_path):
    held = {"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.5.1"}
    torch.save({**held, "global_step": 7, "epoch": 1}, tmp_path / "last.ckpt")
    metadata = opened(tmp_path).metadata
    assert metadata["writer"] == "Lightning 2.5.1" and metadata["iteration"] == 7


def opened(path: Path) -> Contents:
    return formats.open_weights(Folder.at(path))[1]


def saved(path: Path, value: object) -> Contents:
    torch.save(value, path)
    return opened(path)


def value_of(contents: Contents, name: str) -> torch.Tensor:
    stored = contents.tensors[name]
    (piece,) = stored.pieces
    steps = zip(piece.box.sizes, piece.box.strides, strict=True)
    reach = 1 + sum((size - 1) * step for size, step in steps)
    data = contents.files[piece.file].read(piece.offset, reach * stored.dtype.itemsize)
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
    return flat.as_strided(stored.shape, piece.box.strides)


def names_of(contents: Contents, kind: str = "weight") -> list[str]:
    return [name for name, stored in contents.tensors.items() if stored.kind == kind]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.pt"


def rezipped(path: Path, change) -> None:
    """Write the archive anew, each member as ``change(name, content)`` says; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts:
            changed = change(name, content)
            if changed is not None:
                archive.writestr(name, changed)


# What views there are


def test_a_transposed_tensor_comes_out_transposed(file):
    tensor = torch.arange(12.0).view(3, 4).t()
    contents = saved(file, {"w": tensor})
    assert contents.tensors["w"].pieces[0].box.strides == (1, 4)
    assert torch.equal(value_of(contents, "w"), tensor)


def test_slices_of_one_storage_each_come_out_right(file):
    whole = torch.arange(60.0).view(5, 4, 3)
    state = {"whole": whole, "row": whole[2], "column": whole[:, 1], "late": whole[4:, 2:, 1:]}
    contents = saved(file, state)
    for name, tensor in state.items():
        assert torch.equal(value_of(contents, name), tensor)
    assert len({stored.pieces[0].offset // 240 for stored in contents.tensors.values()}) >= 1


def test_tied_tensors_name_the_same_bytes(file):
    weight = torch.arange(6.0).view(2, 3)
    contents = saved(file, {"embed.weight": weight, "head.weight": weight})
    assert contents.tensors["embed.weight"] == contents.tensors["head.weight"]


def test_an_expanded_tensor_is_read_with_stride_zero(file):
    tensor = torch.arange(3.0).view(1, 3).expand(4, 3)
    contents = saved(file, {"w": tensor})
    assert contents.tensors["w"].pieces[0].box.strides == (0, 1)
    assert torch.equal(value_of(contents, "w"), tensor)


def test_the_stride_of_a_dim_of_size_one_does_not_matter(file):
    odd = torch.arange(3.0).as_strided((1, 3, 1), (77, 1, 55))
    contents = saved(file, {"w": odd, "usual": torch.zeros(1, 3, 1)})
    assert contents.tensors["w"].pieces[0].box == contents.tensors["usual"].pieces[0].box


def test_dtypes_that_have_no_typed_storage_come_out_right(file):
    state = {
        str(dtype): torch.arange(6).to(dtype)
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn)
    }
    contents = saved(file, state)
    for name, tensor in state.items():
        assert contents.tensors[name].dtype == tensor.dtype
        assert torch.equal(value_of(contents, name), tensor)


def test_parameters_and_the_marks_of_a_module_are_plain_tensors(file):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    contents = saved(file, OrderedDict({**state, "p": torch.nn.Parameter(torch.ones(2))}))
    assert set(names_of(contents)) == {*state, "p"}
    saved(file, state)  # has `_metadata`, which is state of an OrderedDict
    assert set(names_of(opened(file))) == set(state)


# Where the state dict is


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict"])
def test_a_state_dict_is_found_under_its_usual_keys(key, file):
    contents = saved(file, {key: {"a.weight": torch.ones(2)}, "epoch": 3})
    assert names_of(contents) == ["a.weight"]
    assert contents.metadata == {"state_dict": key, "objects": {"epoch": 3}}


def test_usual_keys_may_be_nested(file):
    contents = saved(file, {"state_dict": {"module": {"w": torch.ones(2)}}})
    assert names_of(contents) == ["w"]
    assert contents.metadata["state_dict"] == "state_dict.module"


def test_nested_state_dicts_get_dotted_names(file):
    state = {"model": {"encoder": {"w": torch.ones(2)}, "head": {"w": torch.ones(3)}}}
    assert names_of(saved(file, state)) == ["encoder.w", "head.w"]


def test_a_module_that_is_called_model_stays_part_of_its_names(file):
    state = {"state_dict": {"model": {"w": torch.ones(2)}, "head": {"w": torch.ones(3)}}}
    assert names_of(saved(file, state)) == ["model.w", "head.w"]


def test_optimizer_state_is_listed_apart(file):
    adam = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.001}]}
    contents = saved(file, {"model": {"w": torch.ones(2)}, "optimizer": adam})
    assert names_of(contents) == ["w"]
    assert "optimizer.state.0.exp_avg" in names_of(contents, "optimizer")
    groups = contents.metadata["objects"]["optimizer"]["param_groups"]
    assert groups[0]["lr"] == 0.001


def test_optimizer_state_beside_bare_weights_is_no_weight(file):
    contents = saved(file, {"w": torch.ones(2), "optimizer": {"state": {0: torch.ones(2)}}})
    assert names_of(contents) == ["w"]
    assert names_of(contents, "optimizer") == ["optimizer.state.0"]


def test_two_state_dicts_are_ambiguous(file):
    with pytest.raises(AmbiguousFormat, match="'state_dict' and under 'model'"):
        saved(file, {"state_dict": {"w": torch.ones(2)}, "model": {"w": torch.ones(2)}})


def test_what_lightning_keeps_beside_the_weights_becomes_plain_data(file):
    contents = saved(
        file,
        {
            "state_dict": {"w": torch.ones(2)},
            "hyper_parameters": {"lr": 0.1, "where": Path("/data"), "dtype": torch.bfloat16},
            "args": Namespace(layers=2, sizes=(1, 2)),
        },
    )
    assert contents.metadata["objects"] == {
        "hyper_parameters": {"lr": 0.1, "where": "/data", "dtype": "torch.bfloat16"},
        "args": {"class": "argparse.Namespace", "state": {"layers": 2, "sizes": [1, 2]}},
    }
    assert json.dumps(dict(contents.metadata))


def test_a_tensor_outside_and_inside_the_state_dict_may_have_one_name(file):
    contents = saved(file, {"model": {"loss": torch.ones(2)}, "loss": torch.ones(3)})
    assert contents.tensors["loss"].shape == (2,)
    assert names_of(contents, "optimizer") == ["loss (beside the state dict)"]


def test_flat_and_nested_spellings_of_one_name_are_corrupt(file):
    with pytest.raises(CorruptCheckpoint, match=r"'a\.b'"):
        saved(file, {"a.b": torch.ones(2), "a": {"b": torch.ones(2)}})


# What is refused


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def test_a_pickle_that_runs_a_program_is_refused_and_does_not_run(file, tmp_path):
    trace = tmp_path / "ran"
    with pytest.raises(RefusedCheckpoint, match=r"posix\.system"):
        saved(file, Calls(os.system, f"touch {trace}"))
    assert not trace.exists()


def test_a_weight_that_only_a_call_would_give_makes_the_file_refused(file):
    with pytest.raises(RefusedCheckpoint, match="'w'"):
        saved(file, {"w": Calls(torch.add, torch.ones(2), torch.ones(2))})


def test_an_entry_that_would_call_something_is_left_out_and_named(file, tmp_path):
    trace = tmp_path / "ran"
    state = {"state_dict": {"w": torch.ones(2)}, "hook": Calls(os.system, f"touch {trace}")}
    contents = saved(file, state)
    assert names_of(contents) == ["w"]
    assert contents.metadata["refused"] == {"hook": "posix.system"}
    assert not trace.exists()


def test_a_whole_pickled_module_is_refused_with_the_cure(file):
    with pytest.raises(RefusedCheckpoint, match=r"torch\.nn\.modules\.linear\.Linear.*state dict"):
        saved(file, torch.nn.Linear(2, 2))
    with pytest.raises(RefusedCheckpoint, match=r"'model'.*Linear"):
        saved(file, {"model": torch.nn.Linear(2, 2), "epoch": 3})


def test_a_module_beside_a_state_dict_is_not_in_the_way(file):
    contents = saved(file, {"w": torch.ones(2), "loss": torch.nn.CrossEntropyLoss(torch.ones(3))})
    assert names_of(contents) == ["w"]
    assert contents.metadata["inert"] == {"loss": "torch.nn.modules.loss.CrossEntropyLoss"}


def test_a_bare_tensor_has_no_name(file):
    with pytest.raises(RefusedCheckpoint, match="without a name"):
        saved(file, torch.ones(2))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_tensor_is_refused(file):
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(RefusedCheckpoint, match="QInt8Storage"):
        saved(file, {"w": quantized})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_the_cure(file):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
    with pytest.raises(RefusedCheckpoint, match="TorchScript"):
        opened(file)


def test_big_endian_bytes_are_refused(file):
    torch.save({"w": torch.ones(2)}, file)
    rezipped(file, lambda name, content: b"big" if name.endswith("byteorder") else content)
    with pytest.raises(RefusedCheckpoint, match="byte order"):
        opened(file)


def test_compressed_members_are_refused(file):
    torch.save({"w": torch.ones(2)}, file)
    with zipfile.ZipFile(file) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    with pytest.raises(RefusedCheckpoint, match="compressed"):
        opened(file)


# What is damaged


def test_an_archive_that_was_packed_again_uncompressed_is_read(file):
    tensor = torch.arange(6.0)
    torch.save({"w": tensor}, file)
    rezipped(file, lambda name, content: content)
    assert torch.equal(value_of(opened(file), "w"), tensor)


def test_a_missing_storage_is_corrupt_and_says_which_tensor_needs_it(file):
    torch.save({"a.weight": torch.ones(2)}, file)
    rezipped(file, lambda name, content: None if name.endswith("data/0") else content)
    with pytest.raises(CorruptCheckpoint, match=r"'a\.weight'.*'0'"):
        opened(file)


def test_a_storage_that_is_too_small_is_corrupt(file):
    torch.save({"w": torch.ones(8)}, file)
    rezipped(file, lambda name, content: content[:-4] if name.endswith("data/0") else content)
    with pytest.raises(CorruptCheckpoint, match="28 bytes"):
        opened(file)


def hostile(path: Path, function, *args) -> None:
    """An archive whose one tensor is built with any arguments at all."""
    torch.save({"w": torch.ones(4)}, path)

    class Tensor:
        def __reduce__(self):
            return function, args

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj if type(obj) is tuple and obj[:1] == ("storage",) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Tensor()})
    rezipped(path, lambda name, old: buffer.getvalue() if name.endswith("data.pkl") else old)


STORAGE = ("storage", torch.FloatStorage, "0", "cpu", 4)
REBUILD = torch._utils._rebuild_tensor_v2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((STORAGE, 0, (5,), (1,), False, {}), "takes 5 elements"),
        ((STORAGE, 3, (2,), (1,), False, {}), "takes 2 elements"),
        ((STORAGE, 0, (2,), (4,), False, {}), "takes 5 elements"),
        ((STORAGE, -1, (2,), (1,), False, {}), "begins"),
        ((STORAGE, 0, (-2,), (1,), False, {}), "sizes"),
        ((STORAGE, 0, (2,), (-1,), False, {}), "sizes"),
        ((STORAGE, 0, (2,), (1, 1), False, {}), "sizes"),
        ((STORAGE, 0, ("2",), (1,), False, {}), "sizes"),
        ((STORAGE, 0, (1 << 40, 1 << 40), (0, 0), False, {}), "sizes"),
        ((STORAGE, 0, (0, 1 << 62, 1 << 62), (1, 1, 1), False, {}), "sizes"),
        ((STORAGE, 0, (0,), (1 << 63,), False, {}), "sizes"),
        ((STORAGE, 0, (1,) * 65, (1,) * 65, False, {}), "sizes"),
        (((*STORAGE[:4], 1 << 80), 0, (2,), (1,), False, {}), "no storage"),
        (((*STORAGE[:4], 400), 0, (2,), (1,), False, {}), "400 elements"),
        ((*STORAGE[:4], 0, (2,), (1,)), "damaged"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_corrupt(args, words, file):
    hostile(file, REBUILD, *args)
    with pytest.raises(CorruptCheckpoint, match=words):
        opened(file)


def test_an_archive_that_is_no_checkpoint_is_an_error(file, tmp_path):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CorruptCheckpoint, match=r"data\.pkl"):
        opened(file)
    file.rename(tmp_path / "hello.zip")
    with pytest.raises(UnknownFormat):
        opened(tmp_path / "hello.zip")


def test_every_damaged_directory_is_an_error_of_ours(file):
    torch.save({f"w{i}": torch.ones(2) for i in range(4)}, file)
    whole = file.read_bytes()
    at = whole.rfind(b"PK\x01\x02", 0, whole.find(b"PK\x01\x02") + 1)
    for position in range(at, len(whole), 3):
        file.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        try:
            contents = opened(file)
        except CheckpointError:
            continue
        for stored in contents.tensors.values():
            assert stored.pieces[0].offset + 8 <= len(whole)


def test_archives_beyond_four_gigabytes_are_read_from_their_extra_fields(file):
    """Python writes the 64-bit records for a member that is said to be large."""
    tensor = torch.arange(4.0)
    torch.save({"w": tensor}, file)
    with zipfile.ZipFile(file) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, content in parts:
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(content)
    assert torch.equal(value_of(opened(file), "w"), tensor)
