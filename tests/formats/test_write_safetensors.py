"""Safetensors as we write it, read by the library, by transformers and by ourselves."""

import json
import os
import resource
import signal

import pytest
import torch
from safetensors import safe_open

from bioinit.errors import ConfigError, StorageError
from bioinit.formats import _filling
from bioinit.formats.safetensors import DTYPES
from bioinit.storage import Journal
from tests.writing import Killed, Source, assert_same, read, values, write


def by_library(path):
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: file.get_tensor(key) for key in file.keys()}


def state_of(count=5, rows=100):
    return {f"layers.{n}.weight": values((rows, 8), torch.float32, n) for n in range(count)}


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_is_what_the_library_reads(name, tmp_path):
    state = {"odd": values((3,), torch.uint8), "it": values((5, 3), DTYPES[name])}
    write("safetensors", tmp_path, state)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    if DTYPES[name] != torch.complex64:
        assert_same(by_library(tmp_path / "model.safetensors"), state)
    assert_same(read(tmp_path)[1], state)


def test_every_tensor_begins_where_its_elements_may(tmp_path):
    state = {
        "bytes": values((3,), torch.uint8),
        "halves": values((5,), torch.float16),
        "doubles": values((7,), torch.float64),
        "floats": values((1,), torch.float32),
    }
    write("safetensors", tmp_path, state)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for key, tensor in state.items():
        assert (8 + length + header[key]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_names_outside_of_ascii_stay_what_they_are(tmp_path):
    state = {'Gewichte.ä."x"\\\n\u2028': values((2, 2), torch.float32), "😀": torch.ones(1)}
    write("safetensors", tmp_path, state)
    assert_same(by_library(tmp_path / "model.safetensors"), state)


def test_shards_are_filled_in_the_order_given_and_the_index_names_them_all(tmp_path):
    state = state_of(5)
    write("safetensors", tmp_path, state, max_shard_bytes=2 * 3200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 3200}
    assert index["weight_map"] == {
        f"layers.{n}.weight": f"model-{1 + n // 2:05d}-of-00003.safetensors" for n in range(5)
    }
    for number in range(1, 4):
        held = by_library(tmp_path / f"model-{number:05d}-of-00003.safetensors")
        assert_same(held, {k: state[k] for k in list(state)[2 * number - 2 : 2 * number]})
    assert_same(read(tmp_path)[1], state)


def test_a_tensor_larger_than_a_file_may_be_has_one_alone(tmp_path):
    state = {"a": torch.ones(4), "large": torch.arange(100.0), "b": torch.zeros(4)}
    write("safetensors", tmp_path, state, max_shard_bytes=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert_same(read(tmp_path)[1], state)


def test_transformers_opens_the_shards(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers opens what is written")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertModel(config)
    write("safetensors", tmp_path, model.state_dict(), max_shard_bytes=4000)
    config.save_pretrained(tmp_path)
    opened, said = transformers.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert_same(opened.state_dict(), model.state_dict())


def test_a_killed_writer_is_gone_on_with_and_finished_shards_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(_filling, "worker_count", lambda: 1)
    state = state_of(6)
    with pytest.raises(Killed):
        write("safetensors", tmp_path, Source(state, breaks_at=3), max_shard_bytes=3200)
    first = tmp_path / "model-00001-of-00006.safetensors"
    before = first.stat()
    source = write("safetensors", tmp_path, state, max_shard_bytes=3200)
    assert source.keys() == {f"layers.{n}.weight" for n in (3, 4, 5)}
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert_same(read(tmp_path)[1], state)


@pytest.mark.parametrize("harm", ["gone", "shorter"])
def test_a_noted_shard_that_is_not_whole_any_more_is_written_again(harm, tmp_path, monkeypatch):
    monkeypatch.setattr(_filling, "worker_count", lambda: 1)
    state = state_of(4)
    with pytest.raises(Killed):
        write("safetensors", tmp_path, Source(state, breaks_at=3), max_shard_bytes=3200)
    second = tmp_path / "model-00002-of-00004.safetensors"
    if harm == "gone":
        second.unlink()
    else:
        os.truncate(second, second.stat().st_size - 1)
    source = write("safetensors", tmp_path, state, max_shard_bytes=3200)
    assert source.keys() == {f"layers.{n}.weight" for n in (1, 3)}
    assert_same(read(tmp_path)[1], state)


def test_a_shard_is_on_the_disk_before_it_is_noted(tmp_path, monkeypatch):
    events = []
    real, note = os.fsync, Journal.note

    def fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    def noted(self, key, value):
        events.append(f"note {key}")
        note(self, key, value)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Journal, "note", noted)
    write("safetensors", tmp_path, {"a": torch.ones(3)})
    assert events.index("model.safetensors") < events.index("note model.safetensors")


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(_filling, "worker_count", lambda: 1)
    source = Source({"a": torch.zeros(10), "b": torch.zeros(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(StorageError, match=r"cannot write .*model-00002.*too large"):
            write("safetensors", tmp_path, source, max_shard_bytes=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not source.requests


def test_several_threads_write_the_same_bytes_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(_filling, "SLAB_BYTES", 64)
    monkeypatch.setattr("bioinit.formats.safetensors.shards.SLAB_BYTES", 64)
    state = {f"t{n}": values((n, 5), torch.int16 if n % 2 else torch.float32, n) for n in range(40)}
    for workers in (1, 7):
        monkeypatch.setattr(_filling, "worker_count", lambda n=workers: n)
        source = write("safetensors", tmp_path / str(workers), state, max_shard_bytes=5000)
        assert source.largest <= 64
    files = sorted(os.listdir(tmp_path / "1"))
    assert files == sorted(os.listdir(tmp_path / "7")) and len(files) > 2
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "7" / name).read_bytes()


def test_the_first_error_of_a_thread_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("bioinit.formats.safetensors.shards.SLAB_BYTES", 8)
    monkeypatch.setattr(_filling, "worker_count", lambda: 4)
    source = Source({"a": torch.zeros(10_000)}, breaks_at=20)
    with pytest.raises(Killed):
        write("safetensors", tmp_path, source)
    assert len(source.requests) < 1000


def test_a_dtype_that_it_does_not_know_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"'wide'.*complex128"):
        write("safetensors", tmp_path, {"wide": torch.zeros(2, dtype=torch.complex128)})
    assert os.listdir(tmp_path) == [Journal.NAME]


def test_the_name_of_its_own_notes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="__metadata__"):
        write("safetensors", tmp_path, {"__metadata__": torch.zeros(2)})


def test_notes_of_other_work_are_not_believed(tmp_path):
    with Journal(tmp_path, "other work") as journal:
        (tmp_path / "model.safetensors").write_bytes(b"x")
        journal.note("model.safetensors", 1)
    state = {"a": torch.arange(3.0)}
    write("safetensors", tmp_path, state)
    assert_same(read(tmp_path)[1], state)
