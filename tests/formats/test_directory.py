"""Which files of a directory are its weights: what people and programs really leave lying there."""

import hashlib
import json
import tracemalloc
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bioinit import formats
from bioinit.errors import (
    AmbiguousFormat,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    RefusedCheckpoint,
    StorageError,
    UnknownFormat,
)
from bioinit.formats.protocol import Contents, Format
from bioinit.storage import Folder

ONE = {"a": torch.ones(2)}
TWO = {"b": torch.ones(3)}


def opened(path: Path) -> Contents:
    return formats.open_weights(Folder.at(path))[1]


def shard(folder: Path, number: int, total: int, state: dict[str, torch.Tensor]) -> str:
    name = f"model-{number:05d}-of-{total:05d}.safetensors"
    save_file(state, folder / name)
    return name


def index(folder: Path, placed: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"weight_map": placed}))
    return folder / name


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    first, second = shard(tmp_path, 1, 2, ONE), shard(tmp_path, 2, 2, TWO)
    index(tmp_path, {"a": first, "b": second})
    return tmp_path


# What a person may point at


def test_the_index_stands_for_its_directory(sharded):
    assert set(opened(sharded / "model.safetensors.index.json").tensors) == {"a", "b"}


def test_one_shard_stands_for_the_set_it_belongs_to(sharded):
    assert set(opened(sharded / "model-00002-of-00002.safetensors").tensors) == {"a", "b"}


def test_one_shard_without_the_others_is_an_error(tmp_path):
    name = shard(tmp_path, 2, 3, ONE)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CorruptCheckpoint, match=r"1 of the 3 files.*number 1 is missing"):
            opened(path)


def test_a_single_file_is_only_itself(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    save_file(TWO, tmp_path / "other.safetensors")
    assert set(opened(tmp_path / "other.safetensors").tensors) == {"b"}


def test_optimizer_state_can_be_pointed_at(tmp_path):
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}}, tmp_path / "optimizer.pt")
    assert set(opened(tmp_path / "optimizer.pt").tensors) == {"state.0.exp_avg"}


def test_a_missing_path_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="no such file or directory"):
        Folder.at(tmp_path / "nowhere")


def test_an_empty_directory_says_so(tmp_path):
    with pytest.raises(UnknownFormat, match="empty directory"):
        opened(tmp_path)


def test_a_directory_without_weights_lists_what_is_there_and_what_is_known(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownFormat, match=r"config\.json.*safetensors.*torch_legacy.*torch_zip"):
        opened(tmp_path)


def test_a_directory_of_checkpoints_names_one_of_them(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    save_file(ONE, tmp_path / "checkpoint-500" / "model.safetensors")
    with pytest.raises(UnknownFormat, match=r"Point at the folder inside it.*checkpoint-500/"):
        opened(tmp_path)


# What is chosen


def test_safetensors_are_preferred_to_the_same_weights_as_pickles(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    torch.save(TWO, tmp_path / "pytorch_model.bin")
    name, contents = formats.open_weights(Folder.at(tmp_path))
    assert name == "safetensors" and set(contents.tensors) == {"a"}
    assert contents.metadata["ignored"] == {
        "pytorch_model.bin": "model.safetensors is read instead"
    }


def test_the_usual_name_is_preferred_to_other_safetensors(tmp_path):
    torch.save(ONE, tmp_path / "pytorch_model.bin")
    save_file(TWO, tmp_path / "extra.safetensors")
    assert formats.open_weights(Folder.at(tmp_path))[0] == "torch_zip"


def test_what_a_trainer_leaves_beside_the_weights_is_not_read(tmp_path):
    save_file(ONE, tmp_path / "model.safetensors")
    beside = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt")
    for name in beside:
        (tmp_path / name).write_bytes(b"not even a pickle")
    assert opened(tmp_path).metadata["ignored"] == dict.fromkeys(
        beside, "training state or an adapter"
    )


def test_pickled_weights_are_told_from_training_state(tmp_path):
    torch.save(ONE, tmp_path / "pytorch_model.bin")
    torch.save(TWO, tmp_path / "training_args.bin")
    torch.save(TWO, tmp_path / "optimizer.bin")
    assert set(opened(tmp_path).tensors) == {"a"}


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt", "epoch=0-step=9.0-last.ckpt"])
def test_the_only_weight_file_may_have_any_name(name, tmp_path):
    torch.save(ONE, tmp_path / name)
    assert set(opened(tmp_path).tensors) == {"a"}


def test_several_pickles_of_equal_rank_are_ambiguous(tmp_path):
    torch.save(ONE, tmp_path / "best.ckpt")
    torch.save(TWO, tmp_path / "last.ckpt")
    with pytest.raises(AmbiguousFormat, match=r"best\.ckpt, last\.ckpt.*Point at"):
        opened(tmp_path)


def test_a_single_file_beside_an_index_is_ambiguous(sharded):
    save_file({**ONE, **TWO}, sharded / "model.safetensors")
    with pytest.raises(AmbiguousFormat, match=r"index\.json, model\.safetensors"):
        opened(sharded)


def test_numbered_files_without_an_index_are_one_checkpoint(tmp_path):
    shard(tmp_path, 1, 2, ONE), shard(tmp_path, 2, 2, TWO)
    contents = opened(tmp_path)
    assert set(contents.tensors) == {"a", "b"}
    assert contents.metadata["layout"] == "2 numbered files, no index"


def test_two_sets_of_numbered_files_are_ambiguous(tmp_path):
    shard(tmp_path, 1, 1, ONE), shard(tmp_path, 1, 2, ONE), shard(tmp_path, 2, 2, TWO)
    with pytest.raises(AmbiguousFormat):
        opened(tmp_path)


@pytest.mark.parametrize("total", ["999999", "9999999999", "9" * 200])
def test_a_name_that_speaks_of_any_number_of_files_takes_no_memory(total, tmp_path):
    save_file(ONE, tmp_path / f"model-00001-of-{total}.safetensors")
    tracemalloc.start()
    try:
        if len(total) > 6:  # no number of files, so a file by itself
            assert set(opened(tmp_path).tensors) == {"a"}
        else:
            with pytest.raises(CorruptCheckpoint, match="number 2 is missing"):
                opened(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_old_shards_that_the_index_does_not_name_are_left_aside(sharded):
    old = shard(sharded, 1, 5, ONE)
    contents = opened(sharded)
    assert set(contents.tensors) == {"a", "b"}
    assert list(contents.metadata["ignored"]) == [old]


def test_an_index_may_name_files_in_inner_folders(tmp_path):
    (tmp_path / "parts").mkdir()
    save_file(ONE, tmp_path / "parts" / "x.safetensors")
    index(tmp_path, {"a": "parts/x.safetensors"})
    assert set(opened(tmp_path).tensors) == {"a"}


def test_metadata_of_shards_is_told_once_where_they_agree(tmp_path):
    save_file(ONE, tmp_path / "a.safetensors", metadata={"format": "pt", "part": "1"})
    save_file(TWO, tmp_path / "b.safetensors", metadata={"format": "pt", "part": "2"})
    metadata = opened(tmp_path).metadata
    assert metadata["format"] == "pt" and metadata["part"] == ("1", "2")


def test_shards_of_both_torch_layouts_may_be_mixed(tmp_path):
    torch.save(ONE, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(
        TWO,
        tmp_path / "pytorch_model-00002-of-00002.bin",
        _use_new_zipfile_serialization=False,
    )
    name, contents = formats.open_weights(Folder.at(tmp_path))
    assert name == "torch_legacy+torch_zip"
    assert {n: s.pieces[0].file for n, s in contents.tensors.items()} == {"a": 0, "b": 1}


# What contradicts itself


def test_a_shard_that_the_index_names_and_that_is_missing_is_corrupt(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"'b', in 'model-00002-of-00002.*missing"):
        opened(sharded)


def test_a_tensor_that_the_index_does_not_list_is_corrupt(sharded):
    shard(sharded, 2, 2, {**TWO, "c": torch.ones(1)})
    with pytest.raises(CorruptCheckpoint, match=r"'c', which .* does not list"):
        opened(sharded)


def test_a_tensor_that_the_shard_does_not_have_is_corrupt(sharded):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(sharded, {"a": first, "b": second, "c": second})
    with pytest.raises(CorruptCheckpoint, match=f"'c' in {second}, which does not hold it"):
        opened(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_corrupt(sharded):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(sharded, {"a": second, "b": first})
    with pytest.raises(CorruptCheckpoint, match=r"which .* places in"):
        opened(sharded)


def test_a_tensor_in_two_files_is_corrupt(tmp_path):
    shard(tmp_path, 1, 2, ONE), shard(tmp_path, 2, 2, {**ONE, **TWO})
    with pytest.raises(CorruptCheckpoint, match=r"'a' is in two files.*merge them"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not usable JSON"),
        ('{"weight_map": {', "not usable JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' stands twice"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "no file name"),
        ('{"weight_map": {"a": ["x"]}}', "no file name"),
        ('{"weight_map": {"a": ""}}', "leads out"),
        ("\xff", "."),
    ],
)
def test_an_index_that_makes_no_sense_is_an_error(text, words, sharded):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=words):
        opened(sharded)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "./x", "a//b"]
)
def test_an_index_cannot_lead_out_of_its_directory(name, sharded):
    save_file(ONE, sharded.parent / "secret.safetensors")
    index(sharded, {"a": name})
    with pytest.raises(RefusedCheckpoint, match="leads out"):
        opened(sharded)


# Plug-ins


def plugged_in(monkeypatch, name: str, value: str) -> None:
    entry = EntryPoint(name, value, formats.SIBLINGS.package)
    monkeypatch.setitem(vars(formats.SIBLINGS), "plug_ins", {name: entry})


ANY_BLOB = Format(
    recognizes=lambda folder: folder.is_file and folder.names()[0].endswith(".blob"),
    open=lambda folder, open_inner: Contents((folder.file(folder.names()[0]),), {}),
)


def test_a_package_can_bring_a_format(monkeypatch, tmp_path):
    monkeypatch.setattr("bioinit.formats.protocol.ANY_BLOB", ANY_BLOB, raising=False)
    plugged_in(monkeypatch, "blobs", "bioinit.formats.protocol:ANY_BLOB")
    assert "blobs" in formats.names()
    (tmp_path / "x.blob").write_bytes(b"anything")
    assert formats.open_weights(Folder.at(tmp_path / "x.blob"))[0] == "blobs"


def test_two_formats_that_recognize_one_file_are_both_named(monkeypatch, tmp_path):
    everything = Format(recognizes=lambda folder: folder.is_file, open=ANY_BLOB.open)
    monkeypatch.setattr("bioinit.formats.protocol.ANY_BLOB", everything, raising=False)
    plugged_in(monkeypatch, "greedy", "bioinit.formats.protocol:ANY_BLOB")
    save_file(ONE, tmp_path / "model.safetensors")
    with pytest.raises(AmbiguousFormat, match="safetensors, greedy"):
        opened(tmp_path)


def test_a_plug_in_that_does_not_import_is_named_and_left_out(monkeypatch, tmp_path):
    plugged_in(monkeypatch, "broken", "no_such_package.at_all:FORMAT")
    save_file(ONE, tmp_path / "model.safetensors")
    with pytest.warns(RuntimeWarning, match=r"'broken'.*no_such_package"):
        assert opened(tmp_path).tensors.keys() == ONE.keys()


def test_a_plug_in_cannot_take_the_name_of_a_format(monkeypatch):
    plugged_in(monkeypatch, "safetensors", "x:FORMAT")
    with pytest.raises(ConfigError, match="takes the name"):
        formats.names()


def test_an_unknown_format_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'zip'.*torch_zip"):
        formats.load("zip")


# Real checkpoints


def digest(contents: Contents, name: str) -> str:
    stored = contents.tensors[name]
    (piece,) = stored.pieces
    steps = zip(piece.box.sizes, piece.box.strides, strict=True)
    reach = 1 + sum((size - 1) * step for size, step in steps)
    data = contents.files[piece.file].read(piece.offset, reach * stored.dtype.itemsize)
    flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
    tensor = flat.as_strided(stored.shape, piece.box.strides).float().contiguous()
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "bin_sharded"])
@pytest.mark.parametrize("model", ["bert", "esm2", "gpt_neox", "llama", "mixtral"])
def test_reads_what_transformers_wrote(model, layout, fixtures_dir):
    expected = json.loads((fixtures_dir / "hf" / model / "expected.json").read_text())["tensors"]
    contents = opened(fixtures_dir / "hf" / model / layout)
    shared = expected.keys() & contents.tensors.keys()
    assert len(shared) >= 0.75 * len(expected)  # older writers spell some names differently
    if "bin" not in layout:
        assert contents.tensors.keys() == expected.keys()
    for name in shared:
        assert list(contents.tensors[name].shape) == expected[name]["shape"]
        assert digest(contents, name) == expected[name]["sha256_f32"]
